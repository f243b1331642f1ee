"""How much of what prompts share the engines' prefix caches find, by order, part size, replicas, KV cache and window.

    spanfill bench locality [--rows 8000] [--json FILE]

Real prompts (``spanfill bench peers``' input of 100 spans a file, shuffled), the job's own order, micro-batches and
lanes, and the engines' own schedulers with caches of so many tokens, simulated H100s on a clock of their own in one
process. The first line is a job's defaults. ``of all`` is what was found over what a cache that forgets nothing would
have had with all rows together, ``of parts`` with those of each part together: a cache that still holds what an earlier
part had finds more.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from jobs.order import TOKEN_BYTES, cut, grouped, ideal_cached_tokens, prefix_order, sort_key
from jobs.sharing import ideal_cached_share, share_inside
from tests.benchmarks.clockwork import DEFAULTS, H100, Dealt, Study
from tests.benchmarks.output import above_zero, check_files, console, origin, parser_of, positive, publish_json
from tests.benchmarks.peers.inputs import make_prompts, make_rows
from tests.benchmarks.peers.setting import Setting

FEED, CALL = 50_000.0, 0.02
"""Rows a second that come to the lanes, and seconds of a call's way: see ``tests.benchmarks.fleet``."""

LEAST_ROWS = 400


@dataclass(frozen=True)
class Case:
    """One line of the table; ``kv`` are the tokens of each engine's KV cache.

    ``order`` is one of a job's, or ``leaders``: of each part the first row of every group goes before all others.
    """

    order: str = "prefix"
    rows_per_part: int = 10_000
    replicas: int = 1
    feeders: int = 1
    kv: int = H100.kv_cache_tokens
    window: float = 1.0


WINDOWS = (0.25, 1.0, 4.0)


def window_cases(rows: int, windows: Sequence[float]) -> list[Case]:
    """Sixteen replicas, eight parts of rows that were gathered, and windows of so many times a job's own."""
    gathered = Case(rows_per_part=rows // 8, order="global", replicas=16)
    return [replace(gathered, window=window) for window in windows]


def cases(rows: int) -> list[Case]:
    """A job's defaults, and what changes when one or two of them do; ``rows`` rows are one part by default."""
    base, small, smaller = Case(), rows // 8, rows // 40
    gathered = replace(base, rows_per_part=small, order="global")
    return [
        base,
        *(replace(base, order=order) for order in ("input", "leaders")),
        *(
            replace(base, rows_per_part=part, order=order)
            for part in (small, smaller)
            for order in ("prefix", "global")
        ),
        *(replace(base, replicas=count) for count in (4, 16)),
        *(replace(gathered, replicas=4, feeders=feeders) for feeders in (1, 2)),
        *(replace(base, kv=kv, order=order) for kv in (30_000, 10_000) for order in ("prefix", "leaders", "input")),
        *(replace(base, kv=10_000, replicas=count) for count in (4, 16)),
        *window_cases(rows, WINDOWS),
    ]


Prompts = Sequence[Sequence[int]]
T = TypeVar("T")


def cut_evenly(values: Sequence[T], size: int) -> list[list[T]]:
    """Consecutive pieces of ``size`` values, the last one of what is left."""
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def measure(case: Case, shuffled: Prompts, gathered: Prompts, *, block: int, max_tokens: int) -> dict[str, Any]:
    """One line: the same prompts, shuffled and as ``--order global`` gathers them."""
    parts = cut_evenly(gathered if case.order == "global" else shuffled, case.rows_per_part)
    study = Study(
        [1.0] * case.replicas,
        lambda unit: dealt(parts[unit], case.order, block, max_tokens),
        feed=FEED,
        call=CALL,
        max_tokens=max_tokens,
        roofline=H100.model_copy(update={"kv_cache_tokens": case.kv, "block_size": block}),
        feeders=case.feeders,
        window=case.window,
    )
    told = study.run([len(part) for part in parts])
    ideals = {"ideal of all": ideal_cached_share(shuffled, block), "ideal of parts": share_inside(parts, block)}
    return asdict(case) | told | ideals


def dealt(prompts: Prompts, order: str, block: int, max_tokens: int) -> Dealt:
    """A part as ``jobs.unit`` makes it of these prompts."""
    keys, size = [sort_key(prompt) for prompt in prompts], DEFAULTS.batch_rows
    ordered = prefix_order(keys)
    cached = dict(zip(ordered, ideal_cached_tokens(keys, ordered, block), strict=True))
    weights = [float(len(key) // TOKEN_BYTES - cached[row] + max_tokens) for row, key in enumerate(keys)]
    groups = grouped(keys, cut(keys, ordered, size), block)
    if order == "input":
        groups = [[rows] for rows in cut_evenly(range(len(keys)), size)]
    if order == "leaders":
        first = [group[0].pop(0) for group in groups]
        rest = ([batch for batch in group if batch] for group in groups)
        groups = [[rows] for rows in cut_evenly(first, size)] + [group for group in rest if group]
    return Dealt(groups, weights, prompts.__getitem__)


def shown(lines: list[dict[str, Any]]) -> Table:
    """The figures for people."""
    names = ("order", "rows a part", "replicas", "feeders", "KV tokens", "window")
    table = Table(*names, "cached", "of parts", "of all", "rows/s", "running", "busy", "ends within")
    for line in lines:
        cached = line["cached"]
        ideals = [line[name] for name in ("ideal of parts", "ideal of all")]
        shares = [f"{cached / ideal:.3f}" if ideal else "-" for ideal in ideals]
        table.add_row(
            line["order"],
            *(f"{line[name]:,}" for name in ("rows_per_part", "replicas", "feeders", "kv")),
            f"{line['window']:g}",
            f"{cached:.3f}",
            *shares,
            f"{line['rows/s']:,.0f}",
            f"{line['running']:.1f}",
            f"{line['busy_share']:.3f}",
            f"{line['ends within']:.1%}",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = parser_of("locality", __doc__)
    parser.add_argument("--rows", type=positive, default=8_000)
    parser.add_argument("--seed", type=int, default=0, help="which files, spans and order of the rows")
    parser.add_argument("--align", type=positive, default=256, help="as run's --prefix-align")
    parser.add_argument("--context", type=positive, default=1_100)
    parser.add_argument("--max-tokens", type=positive, default=16)
    parser.add_argument("--block-size", type=positive, default=H100.block_size)
    parser.add_argument("--windows", type=above_zero, nargs="+", metavar="TIMES", help="these alone, on 16 replicas")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.rows < LEAST_ROWS:
        parser.error(f"--rows {asked.rows}: cut into 40 parts that is too few, give {LEAST_ROWS} at least")
    check_files(parser, asked.json, None)
    rows = make_rows("spans100", asked.rows, seed=asked.seed)
    setting = Setting(rows="", model="", context=asked.context, max_tokens=asked.max_tokens)
    prompts = make_prompts(rows, setting, align=asked.align)
    gathered = sorted(range(len(rows)), key=lambda row: (rows[row]["prefix"], rows[row]["suffix"]))
    lines = []
    tried = cases(len(rows)) if asked.windows is None else window_cases(len(rows), asked.windows)
    for case in tried:
        options = {"block": asked.block_size, "max_tokens": asked.max_tokens}
        lines.append(measure(case, prompts, [prompts[row] for row in gathered], **options))
        print(f"{len(lines)} of {len(tried)}", file=sys.stderr)
    console().print(shown(lines))
    if asked.json:
        publish_json(asked.json, origin("locality") | {"options": vars(asked) | {"json": None}, "lines": lines})


if __name__ == "__main__":
    main()
