"""People and a job on one fleet: how long people wait, alone and beside the job, and what the job keeps of its speed.

    spanfill bench loads --engine simulated --rate 1 --seconds 60
    spanfill bench loads --engine vllm --rate 0.2 --seconds 120 --job-rows 300

An open loop: people's requests (streamed infills cut from the standard library) come at moments drawn beforehand, the
same ones alone and beside the job, whatever the answers take. Three parts on one server: people alone, the job alone,
both. ``idle`` is the share of the time in which no engine had a row while people were alone; a job that keeps all of
that has lost nothing to them but what they used.
"""

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from jobs.bench import write_rows
from jobs.pairs import standard_library
from tests.benchmarks.output import console, publish_json
from tests.server import Server, running_server


@dataclass(frozen=True)
class Taken:
    """One request: seconds from the moment when it was due to its first text and to its end."""

    first: float
    total: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """People's requests: prompts, and the seconds at which they come."""

    prompts: list[tuple[str, str]]
    moments: list[float]
    max_tokens: int


def make_load(rate: float, seconds: float, max_tokens: int, chars: int, seed: int) -> Load:
    """Poisson arrivals; cursors anywhere in files of the standard library."""
    draw = random.Random(seed)
    gaps = iter(lambda: draw.expovariate(rate), None)
    moments = list(itertools.takewhile(lambda moment: moment < seconds, itertools.accumulate(gaps)))
    texts = [path.read_text("utf-8", errors="ignore") for path in sorted(standard_library().glob("*.py"))]
    texts = [text for text in texts if len(text) > 2 * chars]
    prompts = []
    for _ in moments:
        text = draw.choice(texts)
        at = draw.randrange(chars, len(text) - chars)
        prompts.append((text[at - chars : at], text[at : at + chars]))
    return Load(prompts, moments, max_tokens)


async def people(url: str, load: Load) -> list[Taken]:
    """Send every request when it is due."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        requests = zip(load.moments, load.prompts, strict=True)
        return await asyncio.gather(*(_one(client, began + due, pair, load.max_tokens) for due, pair in requests))


async def _one(client: httpx.AsyncClient, due: float, pair: tuple[str, str], max_tokens: int) -> Taken:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    asked = {"prompt": pair[0], "suffix": pair[1], "max_tokens": max_tokens, "temperature": 0, "stream": True}
    first, tokens = 0.0, 0
    body = asked | {"stream_options": {"include_usage": True}, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            told = json.loads(line.removeprefix("data: "))
            if "error" in told:
                raise RuntimeError(told["error"]["message"])
            first = first or time.perf_counter() - due
            tokens = (told.get("usage") or {}).get("completion_tokens", tokens)
    return Taken(first, time.perf_counter() - due, tokens)


def describe(taken: list[Taken]) -> dict[str, float]:
    """Percentiles in seconds."""
    found: dict[str, float] = {"requests": len(taken)}
    for name, values in (("ttft", [t.first for t in taken]), ("e2e", [t.total for t in taken])):
        for percentile in (50, 99):
            found[f"{name} p{percentile}"] = round(float(np.percentile(values, percentile)), 4)
    return found


def reading(url: str, name: str) -> float:
    """One of the engines' sums in the gateway's metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    (found,) = [line for line in lines if line.startswith(f'spanfill_engine{{reading="{name}"}}')]
    return float(found.split()[-1])


def job(server: Server, rows: Path, output: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a job that joins the server's engines."""
    command = [sys.executable, "-m", "jobs.cli", "run", "--input", str(rows), "--output", output, "--json"]
    command += ["--engine", options.engine, "--model", options.model, "--max-tokens", str(options.job_max_tokens)]
    command += [item for argument in options.engine_arg for item in ("--engine-arg", argument)]
    return subprocess.Popen(
        command, env=server.job_environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The job's manifest."""
    told, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}")
    manifest: dict[str, Any] = json.loads(told)
    return manifest


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All three parts."""
    load = make_load(options.rate, options.seconds, options.max_tokens, options.chars, options.seed)
    arguments = ["--engine", options.engine, "--model", options.model]
    arguments += [item for argument in options.engine_arg for item in ("--engine-arg", argument)]
    with (
        tempfile.TemporaryDirectory(prefix="spanfill-loads-") as folder,
        running_server(Path(folder), *arguments) as server,
    ):
        rows = Path(folder, "rows.parquet")
        write_rows(rows, options.job_rows, 2 * options.chars, seed=1)
        warm = make_load(2.0, 2.0, options.max_tokens, options.chars, seed=options.seed + 1)
        asyncio.run(people(server.url, warm))
        busy, began = reading(server.url, "busy_seconds"), time.monotonic()
        alone = asyncio.run(people(server.url, load))
        time.sleep(2.5)
        idle = 1 - (reading(server.url, "busy_seconds") - busy) / (time.monotonic() - began)
        batch = finished(job(server, rows, f"{folder}/alone", options))
        process = job(server, rows, f"{folder}/beside", options)
        while reading(server.url, "running") == 0:
            time.sleep(0.5)
        beside = asyncio.run(people(server.url, load))
        ended = process.poll() is not None
        both = finished(process)
    share = both["rows_per_second"] / batch["rows_per_second"]
    return {
        "engine": options.engine,
        "people alone": describe(alone),
        "people beside the job": describe(beside),
        "p99 e2e ratio": round(describe(beside)["e2e p99"] / describe(alone)["e2e p99"], 3),
        "p99 ttft ratio": round(describe(beside)["ttft p99"] / describe(alone)["ttft p99"], 3),
        "idle while people are alone": round(idle, 3),
        "job alone, rows/s": batch["rows_per_second"],
        "job beside people, rows/s": both["rows_per_second"],
        "job's share": round(share, 3),
        "job's share of idle": round(share / idle, 3) if idle > 0 else None,
        "job ended before the people": ended,
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="spanfill bench loads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=["simulated", "vllm"], default="simulated")
    add("--model", default="demo-codegen25")
    add("--engine-arg", action="append", default=[])
    add("--rate", type=float, default=1.0, help="people's requests a second")
    add("--seconds", type=float, default=60.0)
    add("--max-tokens", type=int, default=64)
    add("--chars", type=int, default=1_024, help="characters of each prefix and each suffix")
    add("--job-rows", type=int, default=3_000, help="enough that the job does not end before the people")
    add("--job-max-tokens", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--json", type=Path)
    options = parser.parse_args()
    report = measure(options)
    table = Table(title="one fleet for people and a job", show_header=False)
    for name, value in report.items():
        table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
    console().print(table)
    if options.json:
        publish_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
