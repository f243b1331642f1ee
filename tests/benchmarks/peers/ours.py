"""spanfill itself: ``run_job`` with its defaults."""

import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from jobs.order import prefix_order, sort_key
from jobs.process import since_birth
from jobs.runner import Progress, Watcher, run_job
from jobs.spec import JobSpec
from tests.benchmarks.peers.figures import Measured
from tests.benchmarks.peers.inputs import Row, make_prompts
from tests.benchmarks.peers.setting import Setting


class _Start(Watcher):
    """Remembers when the engine was up."""

    seconds = 0.0

    def update(self, progress: Progress) -> None:
        """Called once a second, and when something is finished."""
        if progress.stage == "running" and not self.seconds:
            self.seconds = since_birth() - progress.seconds


def run_spanfill(rows: list[Row], setting: Setting, *, align: int) -> Measured:
    """Run the job on the Parquet file of the rows; busy from the moment its engine is up to the last part written."""
    start = _Start()
    with tempfile.TemporaryDirectory(prefix="spanfill-peers-") as folder:
        manifest = run_job(_spec(setting, Path(folder, "out"), align), watcher=start)
        table = pq.read_table(Path(folder, "out", "data"))
    outputs = dict(enumerate(table["token_ids"].to_pylist())) if setting.keep_outputs else {}
    prompts = make_prompts(rows, setting, align=align)
    order = prefix_order([sort_key(prompt) for prompt in prompts])
    return Measured(
        start.seconds,
        manifest["running_seconds"],
        [prompts[row] for row in order],
        outputs,
        manifest["cached_tokens"],
        answered=table.num_rows,
        prompt_tokens=manifest["prompt_tokens"],
        output_tokens=manifest["completion_tokens"],
        errors=manifest["errors"],
        extra={"seconds": manifest["seconds"], "engines": manifest["engines"], "startup": manifest["startup_seconds"]},
    )


def _spec(setting: Setting, output: Path, align: int) -> JobSpec:
    return JobSpec(
        input=setting.rows,
        output=str(output),
        model=setting.model,
        dtype=setting.dtype,
        max_model_len=setting.context,
        max_tokens=setting.max_tokens,
        prefix_align=align,
        engine_args=setting.job_engine_args,
        extra_columns=("token_ids",) if setting.keep_outputs else (),
    )
