"""Whether one machine's cores keep a fleet of simulated H100s full: real Serve replicas, and a study of more of them.

    spanfill bench fleet --replicas 4 16 --study 64 --feed 5000 [--seconds 60] [--json FILE]

``--replicas``: jobs of that many simulated engines (``serving.simulated``: CodeGen2.5-7B on an H100 at its roofline),
each a process behind Ray Serve, over rows of 2 kB. ``--study``: the job's own lanes and the engines' own schedulers on
a clock of their own in this process, where engines cost no cores. Rows come to the lanes at the rate that ``--feed``
says (measure it with ``spanfill bench feed``), and each call is ``--call`` seconds under way. ``--slowest 0.25`` makes
the engines' speeds fall evenly from 1 to a quarter; with ``--long 0.05`` a twentieth of the rows, the last of each unit
in the order of their tokens, have prompts of 1,900 tokens.
"""

import random
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.bench import write_rows
from jobs.calibration import stop_share
from jobs.runner import run_job
from jobs.spec import JobSpec
from serving.steady import Load, batch_size, steady_rows_per_second
from tests.benchmarks.clockwork import DEFAULTS, H100, Dealt, Study
from tests.benchmarks.output import (
    above_zero,
    check_files,
    console,
    origin,
    parser_of,
    positive,
    publish_json,
    share,
    share_above_zero,
)

ROW_BYTES, MAX_TOKENS = 2_048, 64
PROMPT_TOKENS, OUTPUT_TOKENS, LONG_TOKENS = 670, 32.5, 1_900
"""Means of such rows and of the simulated engine's answers to them; what a job really had stands in its figures."""


def measure(replicas: int, seconds: float, feeders: int) -> dict[str, Any]:
    """A job of ``replicas`` simulated engines that has work for about ``seconds``."""
    rows = _rows(Load(PROMPT_TOKENS, OUTPUT_TOKENS), seconds, replicas)
    with tempfile.TemporaryDirectory(prefix="spanfill-fleet-") as folder:
        source, output = f"{folder}/rows.parquet", f"{folder}/out"
        write_rows(Path(source), rows, ROW_BYTES, seed=0)
        spec = JobSpec(input=source, output=output, engine="simulated", replicas=replicas, feeders=feeders)
        manifest = run_job(spec.model_copy(update={"max_tokens": MAX_TOKENS}))
    prompt, output = manifest["prompt_tokens"] / rows, manifest["completion_tokens"] / rows
    load = Load(prompt, output, manifest["prefix_cache_hit_share"], stop_share=stop_share(manifest))
    steady = steady_rows_per_second(H100, load)
    return {
        "engines": f"{replicas} behind Ray Serve",
        "rows": rows,
        "seconds": manifest["running_seconds"],
        "rows/s": manifest["rows_per_second"],
        "of steady": manifest["rows_per_second"] / replicas / steady,
        **manifest["engines"],
        "cpu_seconds": manifest["cpu_seconds"],
        "startup_seconds": manifest["startup_seconds"],
        "errors": manifest["errors"],
    }


def _rows(load: Load, seconds: float, speeds: float) -> int:
    return int(steady_rows_per_second(H100, load) * speeds * seconds)


def _unshared(rows: int, unit_rows: int, long: float, seed: int = 1) -> Callable[[int], Dealt]:
    """Units of rows that share nothing, so each micro-batch is a group; the last of each are long."""
    draw, batch_rows = random.Random(seed), DEFAULTS.batch_rows

    def deal(unit: int) -> Dealt:
        count = min(unit_rows, rows - unit * unit_rows)
        batches = [list(range(at, min(at + batch_rows, count))) for at in range(0, count, batch_rows)]
        short = count - int(long * count)
        lengths = [draw.randint(PROMPT_TOKENS - 70, PROMPT_TOKENS + 70) for _ in range(short)]
        lengths += [LONG_TOKENS] * (count - short)
        weights = [length + float(MAX_TOKENS) for length in lengths]
        return Dealt(
            [[batch] for batch in batches], weights, lambda row: array("i", [draw.getrandbits(30)]) * lengths[row]
        )

    return deal


def study(
    replicas: int,
    seconds: float,
    *,
    feed: float,
    call: float,
    slowest: float,
    long: float = 0.0,
    feeders: int = 2,
    places: int = H100.max_num_seqs,
) -> dict[str, Any]:
    """``replicas`` engines with work for about ``seconds`` of the study's clock, each feeder with lanes of its own.

    ``places`` is the engines' ``max_num_seqs``, of which their KV cache holds some 170.
    """
    speeds = [1.0 - (1.0 - slowest) * number / max(1, replicas - 1) for number in range(replicas)]
    load = Load(PROMPT_TOKENS + long * (LONG_TOKENS - PROMPT_TOKENS), OUTPUT_TOKENS)
    rows, unit_rows = _rows(load, seconds, sum(speeds)), DEFAULTS.rows_per_part
    deal = _unshared(rows, unit_rows, long)
    roofline = H100.model_copy(update={"max_num_seqs": places})
    made = Study(speeds, deal, feed=feed, call=call, max_tokens=MAX_TOKENS, feeders=feeders, roofline=roofline)
    told = made.run([min(unit_rows, rows - start) for start in range(0, rows, unit_rows)])
    return {
        "engines": f"{replicas} in a study",
        **told,
        "of steady": told["rows/s"] / sum(speeds) / steady_rows_per_second(H100, load),
        "occupancy": told["running"] / batch_size(H100, load),
        "feed": feed,
        "call": call,
        "slowest": slowest,
        "long": long,
        "feeders": feeders,
        "places": places,
    }


def shown(lines: list[dict[str, Any]]) -> Table:
    """The figures for people."""
    table = Table("engines", "rows", "s", "rows/s", "of steady", "busy", "occupancy", "ends within")
    for line in lines:
        within = f"{line['ends within']:.1%}" if "ends within" in line else ""
        shares = [f"{line[name]:.3f}" for name in ("of steady", "busy_share", "occupancy")]
        table.add_row(
            line["engines"], f"{line['rows']:,}", f"{line['seconds']:.1f}", f"{line['rows/s']:,.0f}", *shares, within
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = parser_of("fleet", __doc__)
    parser.add_argument("--replicas", type=positive, nargs="*", default=[])
    parser.add_argument("--study", type=positive, nargs="*", default=[])
    parser.add_argument("--seconds", type=above_zero, default=60.0)
    parser.add_argument("--feeders", type=positive, default=2)
    parser.add_argument("--feed", type=above_zero, default=5_000.0, help="rows/s that come to the lanes of the study")
    parser.add_argument("--call", type=above_zero, default=0.02, help="seconds of a call's way to a replica and back")
    parser.add_argument(
        "--slowest", type=share_above_zero, default=1.0, help="speed of the slowest engine of the study"
    )
    parser.add_argument("--long", type=share, default=0.0, help="share of rows with long prompts in the study")
    parser.add_argument("--places", type=positive, default=H100.max_num_seqs, help="rows in a batch of the study's")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not asked.replicas and not asked.study:
        parser.error("nothing to measure: give --replicas, --study, or both")
    check_files(parser, asked.json, None)
    options = {name: getattr(asked, name) for name in ("feed", "call", "slowest", "long", "feeders", "places")}
    lines = [measure(count, asked.seconds, asked.feeders) for count in asked.replicas]
    lines += [study(count, asked.seconds, **options) for count in asked.study]
    console().print(shown(lines))
    if asked.json:
        publish_json(asked.json, origin("fleet") | {"lines": lines})


if __name__ == "__main__":
    main()
