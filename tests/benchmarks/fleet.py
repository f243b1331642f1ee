"""Whether one machine's cores keep a fleet of simulated H100s full: real Serve replicas, and a study of more of them.

    spanfill bench fleet --replicas 4 16 --study 64 --feed 5000 [--seconds 60] [--json FILE]

``--replicas``: jobs of that many simulated engines (``serving.simulated``: CodeGen2.5-7B on an H100 at its roofline),
each a process behind Ray Serve, over rows of 2 kB. ``--study``: the job's own lanes and the engines' own schedulers on
a clock of their own in this process, where engines cost no cores. Rows come to the lanes at the rate that ``--feed``
says (measure it with ``spanfill bench feed``), and each call is ``--call`` seconds under way. ``--slowest 0.25`` makes
the engines' speeds fall evenly from 1 to a quarter; with ``--long 0.05`` a twentieth of the rows, the last of each unit
in the order of their tokens, have prompts of 1,900 tokens.
"""

import argparse
import asyncio
import heapq
import itertools
import random
import sys
import tempfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.bench import write_rows
from jobs.calibration import stop_share
from jobs.lanes import Lanes, Ticket
from jobs.runner import route_of, run_job
from jobs.spec import JobSpec
from serving.batching import Scheduler, Sequence
from serving.config import RooflineConfig
from serving.protocol import BATCH_PRIORITY
from serving.steady import Load, batch_size, steady_rows_per_second
from tests.benchmarks.output import above_zero, check_files, console, positive, publish_json, share

H100 = RooflineConfig()
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


@dataclass
class _Replica:
    """A scheduler on the study's clock, and the rows of each micro-batch that it has not finished."""

    speed: float
    scheduler: Scheduler = field(default_factory=lambda: Scheduler(H100))
    calls: list[tuple[Ticket, list[Sequence]]] = field(default_factory=list)
    stepping: bool = False
    row_seconds: float = 0.0
    busy_seconds: float = 0.0
    end: float = 0.0

    def step(self) -> float:
        """Plan a step; its seconds."""
        seconds = self.scheduler.step() / self.speed
        self.row_seconds += len(self.scheduler.running) * seconds
        self.busy_seconds += seconds
        return seconds

    def finish_step(self, now: float) -> list[Ticket]:
        """The micro-batches that the step has completed."""
        self.end = now
        self.scheduler.finish_step()
        done = [ticket for ticket, rows in self.calls if all(row.done.done() for row in rows)]
        self.calls = [call for call in self.calls if call[0] not in done]
        return done


class Study:
    """A job on a clock of its own: events in the order of their times."""

    def __init__(self, speeds: list[float], *, feed: float, call: float, long: float = 0.0, seed: int = 0) -> None:
        spec = JobSpec(input="", output="", engine="simulated")
        route, _ = route_of(len(speeds), H100.max_num_seqs, H100.block_size, spec)
        self.now = 0.0
        self._lanes = Lanes(route.replicas, route.window, spec.batch_rows, clock=lambda: self.now)
        self._batch_rows, self._unit_rows = spec.batch_rows, spec.rows_per_part
        self._replicas = [_Replica(speed) for speed in speeds]
        self._feed, self._call, self._long = feed, call, long
        self.load = Load(PROMPT_TOKENS + long * (LONG_TOKENS - PROMPT_TOKENS), OUTPUT_TOKENS)
        self._prompts: dict[int, list[int]] = {}
        self._draw = random.Random(seed)
        self._futures = asyncio.new_event_loop()
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()

    def run(self, rows: int) -> dict[str, Any]:
        """Work off ``rows`` rows; the figures."""
        for unit, start in enumerate(range(0, rows, self._unit_rows)):
            count = min(self._unit_rows, rows - start)
            self._at((start + count) / self._feed, lambda unit=unit, count=count: self._unit(unit, count))
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        count, replicas = len(self._replicas), self._replicas
        steady = steady_rows_per_second(H100, self.load) * sum(replica.speed for replica in replicas)
        first = min(rows, self._unit_rows) / self._feed
        seconds = self.now - first
        ends = [replica.end for replica in replicas]
        return {
            "engines": f"{count} in a study",
            "rows": rows,
            "seconds": seconds,
            "rows/s": rows / seconds,
            "of steady": rows / seconds / steady,
            "busy_share": sum(replica.busy_seconds for replica in replicas) / seconds / count,
            "mean_running": sum(r.row_seconds for r in replicas) / sum(r.busy_seconds for r in replicas),
            "occupancy": sum(r.row_seconds for r in replicas) / seconds / count / batch_size(H100, self.load),
            "ends within": (max(ends) - min(ends)) / seconds,
        }

    def _at(self, seconds: float, event: Any) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), event))

    def _unit(self, unit: int, rows: int) -> None:
        """A unit is tokenised: rows that share nothing, so each micro-batch is a group."""
        batches = [list(range(at, min(at + self._batch_rows, rows))) for at in range(0, rows, self._batch_rows)]
        short = rows - int(self._long * rows)
        prompts = [self._draw.randint(PROMPT_TOKENS - 70, PROMPT_TOKENS + 70) for _ in range(short)]
        self._prompts[unit] = prompts = prompts + [LONG_TOKENS] * (rows - short)
        self._lanes.add(unit, [[batch] for batch in batches], [prompt + MAX_TOKENS for prompt in prompts])
        self._pump()

    def _pump(self) -> None:
        more = True
        while more:
            more = False
            for lane in range(len(self._lanes)):
                if ticket := self._lanes.take(lane):
                    more = True
                    self._at(self.now + self._call / 2, lambda ticket=ticket: self._arrive(ticket))

    def _arrive(self, ticket: Ticket) -> None:
        replica = self._replicas[ticket.lane]
        rows = [self._sequence(self._prompts[ticket.unit][row]) for row in ticket.rows]
        for row in rows:
            replica.scheduler.add(row, BATCH_PRIORITY)
        replica.calls.append((ticket, rows))
        if not replica.stepping:
            replica.stepping = True
            self._at(self.now + replica.step(), lambda: self._stepped(replica))

    def _sequence(self, prompt: int) -> Sequence:
        tokens = array("i", [self._draw.getrandbits(30)]) * prompt
        output = self._draw.randint(1, MAX_TOKENS)
        return Sequence(tokens, output, None, self._futures.create_future())

    def _stepped(self, replica: _Replica) -> None:
        for ticket in replica.finish_step(self.now):
            waiting = len(replica.scheduler.waiting)
            self._at(self.now + self._call / 2, lambda t=ticket, w=waiting: self._answered(t, w))
        replica.stepping = replica.scheduler.busy
        if replica.stepping:
            self._at(self.now + replica.step(), lambda: self._stepped(replica))

    def _answered(self, ticket: Ticket, waiting: int) -> None:
        self._lanes.settle(ticket, answered=True, waiting=waiting)
        self._pump()


def study(
    replicas: int, seconds: float, *, feed: float, call: float, slowest: float, long: float = 0.0
) -> dict[str, Any]:
    """``replicas`` engines with work for about ``seconds`` of the study's clock."""
    speeds = [1.0 - (1.0 - slowest) * number / max(1, replicas - 1) for number in range(replicas)]
    made = Study(speeds, feed=feed, call=call, long=long)
    told = made.run(_rows(made.load, seconds, sum(speeds)))
    return told | {"feed": feed, "call": call, "slowest": slowest, "long": long}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=positive, nargs="*", default=[])
    parser.add_argument("--study", type=positive, nargs="*", default=[])
    parser.add_argument("--seconds", type=above_zero, default=60.0)
    parser.add_argument("--feeders", type=positive, default=2)
    parser.add_argument("--feed", type=above_zero, default=5_000.0, help="rows/s that come to the lanes of the study")
    parser.add_argument("--call", type=above_zero, default=0.02, help="seconds of a call's way to a replica and back")
    parser.add_argument("--slowest", type=above_zero, default=1.0)
    parser.add_argument("--long", type=share, default=0.0, help="share of rows with long prompts in the study")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not asked.replicas and not asked.study:
        parser.error("nothing to measure: give --replicas, --study, or both")
    check_files(parser, asked.json, None)
    options = {"feed": asked.feed, "call": asked.call, "slowest": asked.slowest, "long": asked.long}
    lines = [measure(count, asked.seconds, asked.feeders) for count in asked.replicas]
    lines += [study(count, asked.seconds, **options) for count in asked.study]
    console().print(shown(lines))
    if asked.json:
        publish_json(asked.json, {"command": sys.argv, "lines": lines})


if __name__ == "__main__":
    main()
