"""People and a job on one fleet: how long people wait, alone and beside the job, and what the job keeps of its speed.

    spanfill bench loads --engine simulated --rate 2 --seconds 120 --json loads.json
    spanfill bench loads --engine vllm --rate 0.25 --seconds 240

An open loop: people's requests (streamed infills cut from the standard library) come at moments drawn beforehand, the
same ones alone and beside the job, whatever the answers take. Three parts of ``--seconds`` each on one server: people
alone, the job alone, both. The job does not begin or end in any of them: it is told to stop when the last one is over.
``idle`` is the share of the time in which no engine had a row while people were alone; a job that keeps all of that has
lost nothing to them but what they used.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray import serve
from rich.table import Table

from jobs.bench import write_rows
from jobs.status import read_status
from serving.app import APP, DEPLOYMENT
from serving.protocol import EngineStats
from tests.benchmarks.output import above_zero, check_files, console, origin, parser_of, positive, publish_json
from tests.benchmarks.people import Taken, make_load, send
from tests.benchmarks.signals import end_by_signals
from tests.server import Server, joined, running_server

START_SECONDS = 300.0
STOP_SECONDS = 120.0


@dataclass(frozen=True)
class Reading:
    """All engines at one moment."""

    at: float
    busy_seconds: float
    output_tokens: int
    running: int


@dataclass(frozen=True)
class Window:
    """What happened between two readings."""

    seconds: float
    busy_seconds: float
    output_tokens: int

    @classmethod
    def between(cls, first: Reading, last: Reading) -> "Window":
        """From one to the other."""
        return cls(last.at - first.at, last.busy_seconds - first.busy_seconds, last.output_tokens - first.output_tokens)


class Engines:
    """The server's engines, asked directly."""

    def __init__(self, replicas: int) -> None:
        self._handle = serve.get_deployment_handle(DEPLOYMENT, app_name=APP)
        self._replicas = replicas

    def read(self) -> Reading:
        """Now."""
        asked = [self._handle.stats.remote(lane) for lane in range(self._replicas)]
        found: dict[str, EngineStats] = dict(answer.result(timeout_s=60) for answer in asked)
        stats = found.values()
        return Reading(
            time.monotonic(),
            sum(s.busy_seconds for s in stats) / self._replicas,
            sum(s.output_tokens for s in stats),
            sum(s.running for s in stats),
        )


@contextmanager
def running_job(server: Server, folder: Path, options: argparse.Namespace) -> Iterator["subprocess.Popen[bytes]"]:
    """A job that joins the server's engines, told to stop at the end."""
    rows = folder / "rows.parquet"
    write_rows(rows, options.job_rows, 2 * options.chars, seed=1)
    command = [sys.executable, "-m", "jobs.cli", "run", "--input", str(rows), "--output", str(folder / "out")]
    command += ["--engine", options.engine, "--model", options.model, "--max-tokens", str(options.job_max_tokens)]
    command += ["--replicas", str(options.replicas), *_engine_args(options)]
    with folder.joinpath("job.log").open("wb") as log:
        process = subprocess.Popen(command, env=server.job_environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _engine_args(options: argparse.Namespace) -> list[str]:
    return [item for argument in options.engine_arg for item in ("--engine-arg", argument)]


def serve_arguments(folder: Path, options: argparse.Namespace) -> list[str]:
    """Those of ``spanfill serve``."""
    told = {"replicas": options.replicas}
    if options.rows_beside is not None:
        told["rows_beside"] = options.rows_beside
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump({"replicas": told}))
    return ["--config", str(config), "--engine", options.engine, "--model", options.model, *_engine_args(options)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All three parts."""
    with (
        tempfile.TemporaryDirectory(prefix="spanfill-loads-") as temporary,
        running_server(Path(temporary), *serve_arguments(Path(temporary), options)) as server,
        joined(server),
    ):
        return _measured(server, Path(temporary), options)


def _measured(server: Server, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    load = make_load(options.rate, options.seconds, options.max_tokens, options.chars, options.seed)
    engines = Engines(options.replicas)
    warm = make_load(2.0, 5.0, options.max_tokens, options.chars, options.seed + 1)
    asyncio.run(send(server.url, warm))
    first = engines.read()
    alone = asyncio.run(send(server.url, load.headed("# 1")))
    people = Window.between(first, engines.read())
    with running_job(server, folder, options) as process:
        before = engines.read()
        _wait_until_it_runs(process, engines, folder)
        time.sleep(options.warm_up)
        first = engines.read()
        time.sleep(options.seconds)
        job = Window.between(first, engines.read())
        first = engines.read()
        beside = asyncio.run(send(server.url, load.headed("# 2")))
        last = engines.read()
        both = Window.between(first, last)
        if process.poll() is not None:
            raise SystemExit("the job ended before the people did: give it more --job-rows")
        rows = read_status(str(folder / "out")).rows
    of_people = sum(taken.tokens for taken in beside)
    row_tokens = (last.output_tokens - before.output_tokens - of_people) / max(1, rows)
    return report(options, alone, beside, people, job, both, row_tokens)


def _wait_until_it_runs(process: "subprocess.Popen[bytes]", engines: Engines, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while engines.read().running == 0:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the job does not run: {folder.joinpath('job.log').read_text()[-2_000:]}")
        time.sleep(0.5)


def report(
    options: argparse.Namespace,
    alone: list[Taken],
    beside: list[Taken],
    people: Window,
    job: Window,
    both: Window,
    row_tokens: float,
) -> dict[str, Any]:
    """The figures; seconds are people's, rows are the job's."""
    of_people = sum(taken.tokens for taken in beside)
    share = (both.output_tokens - of_people) / both.seconds / (job.output_tokens / job.seconds)
    idle = 1 - people.busy_seconds / people.seconds
    quiet, loud = describe(alone), describe(beside)
    return {
        "engine": options.engine,
        "model": options.model,
        "requests a second": options.rate,
        "people alone": quiet,
        "people beside the job": loud,
        "ratios": {name: round(loud[name] / quiet[name], 3) for name in quiet if name != "requests"},
        "idle while people are alone": round(idle, 3),
        "job alone, rows/s": round(job.output_tokens / job.seconds / row_tokens, 2),
        "job beside people, rows/s": round((both.output_tokens - of_people) / both.seconds / row_tokens, 2),
        "job's share of its speed alone": round(share, 3),
        "job's share of what is idle": round(share / idle, 3) if idle > 0 else None,
    }


def describe(taken: list[Taken]) -> dict[str, float]:
    """Percentiles in seconds."""
    import numpy as np

    found: dict[str, float] = {"requests": len(taken)}
    for name, values in (("ttft", [t.first for t in taken]), ("e2e", [t.total for t in taken])):
        for percentile in (50, 99):
            found[f"{name} p{percentile}"] = round(float(np.percentile(values, percentile)), 4)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = parser_of("loads", __doc__)
    add = parser.add_argument
    add("--engine", choices=["simulated", "vllm"], default="simulated")
    add("--model", default="demo-codegen25")
    add("--engine-arg", action="append", default=[])
    add("--replicas", type=positive, default=1)
    add("--rows-beside", type=int, help="batch rows that go on in an engine while it serves people")
    add("--rate", type=above_zero, default=1.0, help="people's requests a second")
    add("--seconds", type=above_zero, default=60.0, help="of each of the three parts")
    add("--max-tokens", type=positive, default=64)
    add("--chars", type=positive, default=1_024, help="characters of each prefix and each suffix")
    add("--job-rows", type=positive, default=20_000, help="enough that the job does not end before the people")
    add("--job-max-tokens", type=positive, default=64)
    add("--warm-up", type=float, default=10.0, help="seconds of the job before it is measured")
    add("--seed", type=int, default=0)
    add("--json", type=Path)
    options = parser.parse_args(arguments)
    check_files(parser, options.json, None)
    return options


def main() -> int:
    """The command."""
    options = parse()
    end_by_signals()
    about = origin("loads")
    found = measure(options)
    table = Table(title="one fleet for people and a job", show_header=False)
    for name, value in found.items():
        told = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, told)
    console().print(table)
    if options.json:
        publish_json(options.json, about | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
