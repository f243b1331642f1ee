"""One contestant's own process: ``python -m tests.benchmarks.peers.contestant NAME SETTING.json RESULT.json``.

Nothing is warm from another contestant, and what one leaves behind ends with it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.peers.bare import run_bare
from tests.benchmarks.peers.card import run_transformers
from tests.benchmarks.peers.figures import Measured, figures_of
from tests.benchmarks.peers.inputs import Row, read_rows
from tests.benchmarks.peers.ours import run_spanfill
from tests.benchmarks.peers.raydata import run_raydata
from tests.benchmarks.peers.runbatch import run_runbatch
from tests.benchmarks.peers.setting import Setting

Contestant = Callable[[list[Row], Setting], Measured]

CONTESTANTS: dict[str, Contestant] = {
    "vllm": lambda rows, setting: run_bare(rows, setting, align=1, ordered=False),
    "vllm-aligned": lambda rows, setting: run_bare(rows, setting, align=setting.align, ordered=False),
    "vllm-sorted": lambda rows, setting: run_bare(rows, setting, align=setting.align, ordered=True),
    "raydata": run_raydata,
    "runbatch": run_runbatch,
    "transformers": run_transformers,
    "spanfill": lambda rows, setting: run_spanfill(rows, setting, align=setting.align),
    "spanfill-1": lambda rows, setting: run_spanfill(rows, setting, align=1),
}
"""Only spanfill orders rows itself; ``vllm-aligned`` and ``vllm-sorted`` tell alignment's part from order's."""


def main(name: str, setting_file: str, result_file: str) -> None:
    """Run one contestant and leave its figures, and its outputs where they are wanted."""
    setting = Setting.load(Path(setting_file))
    measured = CONTESTANTS[name](read_rows(Path(setting.rows)), setting)
    outputs = measured.outputs if setting.keep_outputs else {}
    result = {"figures": figures_of(measured, setting.block_size).as_dict(), "outputs": outputs}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
