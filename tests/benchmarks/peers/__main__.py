"""One table: the same rows, model and limits through every contestant.

    python -m tests.benchmarks.peers --input spans100 --json spans100.json --plot spans100.svg
    python -m tests.benchmarks.peers --input spans100 --check

Nothing else may run on the machine. ``--check`` compares outputs instead of speeds. The ``--json`` file is written
after every attempt; the same command goes on with those that it lacks.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from serving.engine_args import CPU_BLOCK_SIZE
from serving.truncation import DEFAULT_PREFIX_ALIGN
from tests.benchmarks.output import check_files, console, origin, parser_of, positive, publish_json
from tests.benchmarks.peers.begun import Rounds, begun
from tests.benchmarks.peers.check import PAIR, compare
from tests.benchmarks.peers.contestant import CONTESTANTS
from tests.benchmarks.peers.inputs import INPUTS, ROWS, make_rows, write_rows
from tests.benchmarks.peers.model import SIZES, cached_model
from tests.benchmarks.peers.report import plot, ratio_lines, summarise, table
from tests.benchmarks.peers.rounds import Attempt, play
from tests.benchmarks.peers.setting import Setting
from tests.benchmarks.signals import end_by_signals


def main() -> int:
    """The command."""
    parser = _parser()
    options = parser.parse_args()
    if unknown := set(options.contestants) - set(CONTESTANTS):
        parser.error(f"no contestant: {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    check_files(parser, options.json, options.plot)
    end_by_signals()
    rows = make_rows(options.input, options.rows, seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="spanfill-peers-") as temporary:
        folder = Path(temporary)
        setting = _setting(options, write_rows(rows, folder / "rows.parquet"))
        if options.check:
            return _check(options, replace(setting, dtype="float32", keep_outputs=True), folder, len(rows))
        about = _about(options, setting, len(rows))
        try:
            made = begun(options.json, about) if options.json else {}
        except ValueError as error:
            parser.error(f"{options.json} is no report to go on with: {error}")
        report = _play(options, setting, folder, about, made)
    _tell(report, options)
    return 1 if any(found["failure"] for found in report["results"].values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("peers", __doc__)
    add = parser.add_argument
    add("--input", choices=list(INPUTS), default="spans100")
    add("--contestants", type=lambda text: text.split(","), default=list(CONTESTANTS), help=", ".join(CONTESTANTS))
    add("--rounds", type=positive, default=3)
    add("--rows", type=positive, help=f"rows at most; few hold fewer files [default: {ROWS:,}; of humaneval all]")
    add("--seed", type=int, default=0, help="which files, spans and order of the rows")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--context", type=positive, default=1_100)
    add("--max-tokens", type=positive, default=16)
    add("--kv-cache-gib", type=positive, default=1)
    add("--block-size", type=positive, default=CPU_BLOCK_SIZE, help="of every engine [default: spanfill's]")
    add("--align", type=positive, default=DEFAULT_PREFIX_ALIGN, help="of those that align [default: spanfill's]")
    add("--transformers-rows", type=positive, default=20)
    add("--timeout", type=float, default=7_200.0, help="seconds of one contestant in one round")
    add("--check", action="store_true", help="compare spanfill's outputs with bare vLLM's in float32 instead")
    add("--json", type=Path, help="the report with every round's figures")
    add("--plot", type=Path, help="an .svg or .png file")
    return parser


def _setting(options: argparse.Namespace, rows: Path) -> Setting:
    return Setting(
        rows=str(rows),
        model=str(cached_model()),
        context=options.context,
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        kv_cache_gib=options.kv_cache_gib,
        block_size=options.block_size,
        transformers_rows=options.transformers_rows,
        align=options.align,
    )


def _about(options: argparse.Namespace, setting: Setting, rows: int) -> dict[str, Any]:
    """What was asked, where, of which versions; the temporary paths are left out."""
    told = {key: value for key, value in asdict(setting).items() if key not in ("rows", "model")}
    arguments = {key: value for key, value in setting.engine_arguments().items() if key != "model"}
    return origin("peers") | {
        "input": options.input,
        "rows": rows,
        "contestants": options.contestants,
        "rounds": options.rounds,
        "seed": options.seed,
        "setting": told | {"engine_arguments": arguments, "model": SIZES | {"vocabulary": 51_200, "weights": "random"}},
    }


def _play(
    options: argparse.Namespace, setting: Setting, folder: Path, about: dict[str, Any], made: Rounds
) -> dict[str, Any]:
    """The report, on disk after every attempt; ``made`` are the figures of earlier ones."""
    attempts = {name: [Attempt(figures) for figures in made.get(name, [])] for name in options.contestants}

    def report() -> dict[str, Any]:
        return about | summarise({name: [a.figures for a in found] for name, found in attempts.items()})

    def publish() -> None:
        if options.json:
            publish_json(options.json, report())

    play(attempts, options.rounds, setting, folder, options.timeout, tell=publish)
    return report()


def _tell(report: dict[str, Any], options: argparse.Namespace) -> None:
    terminal = console()
    terminal.print(table(report))
    for line in ratio_lines(report):
        terminal.print(line, highlight=False)
    if options.plot:
        plot(report, options.plot)


def _check(options: argparse.Namespace, setting: Setting, folder: Path, rows: int) -> int:
    about = _about(options, setting, rows) | {"contestants": PAIR, "rounds": 1}
    played: dict[str, list[Attempt]] = {name: [] for name in PAIR}
    play(played, 1, setting, folder, options.timeout)
    attempts = {name: found[0] for name, found in played.items()}
    if failures := _failures(attempts):
        print(failures, file=sys.stderr)
        return 1
    found = compare(*(attempts[name].outputs for name in PAIR))
    print(f"{' and '.join(PAIR)} in float32: {found.compared:,} rows compared, {len(found.unequal):,} unequal")
    if options.json:
        publish_json(options.json, about | {"check": found.as_dict()})
    return 0 if found.equal else 1


def _failures(attempts: dict[str, Attempt]) -> str:
    return "; ".join(f"{name}: {said}" for name, a in attempts.items() if (said := a.figures.get("failure")))


if __name__ == "__main__":
    sys.exit(main())
