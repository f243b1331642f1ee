"""What HTTP costs beside a call of a replica's handle, and many streams at once.

    spanfill bench gateway --json gateway.json
    spanfill bench gateway --streams 200 --seconds 60

Overhead: the same prompts, the same output tokens, with an engine that answers at once, once by HTTP (Serve's proxy,
the key, admission, tokenizer, metering, JSON) and once by the handle with token ids (what a job's feeder does with a
micro-batch of one row), turn by turn; then as many at once as ``--at-once`` for some seconds each. All of it, this
client too, is on one machine. Streams: with the simulated engine (an H100's clock), so many closed loops of streamed
infills; an answer that is no 200, tells of an error or does not end as it should is an error, and the exit code 1.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from rich.table import Table

from serving.app import APP, DEPLOYMENT
from serving.formats import load_format
from serving.protocol import INTERACTIVE_PRIORITY, MicroBatch, Request, Sampling
from serving.router import streamed
from tests.benchmarks.output import above_zero, check_files, console, parser_of, positive, publish_json
from tests.benchmarks.people import asked_of, make_load
from tests.benchmarks.signals import end_by_signals
from tests.server import Server, joined, running_server

MODEL = "demo-codegen25"
Pair = tuple[str, str]
Ask = Callable[[Pair], Awaitable[None]]


@dataclass
class Streams:
    """What became of the streams: seconds to the first text and to the end, tokens, and errors by what they say."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def by_http(client: httpx.AsyncClient, max_tokens: int) -> Ask:
    """One request by HTTP."""

    async def ask(pair: Pair) -> None:
        body = {"prompt": pair[0], "suffix": pair[1], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        (await client.post("/v1/completions", json=body)).raise_for_status()

    return ask


def by_handle(max_tokens: int) -> Ask:
    """The same request by the replica's handle, rendered beforehand as a job does it."""
    fmt = load_format("codegen25")
    handle = streamed(serve.get_deployment_handle(DEPLOYMENT, app_name=APP))
    sampling = Sampling(max_tokens, ignore_eos=True)
    rendered: dict[Pair, list[int]] = {}

    async def ask(pair: Pair) -> None:
        if pair not in rendered:
            rendered[pair] = list(fmt.prompt(*pair, max_tokens=max_tokens, max_context=1_024).token_ids)
        batch = MicroBatch((Request(0, rendered[pair]),), sampling, priority=INTERACTIVE_PRIORITY)
        answers = [answer async for answer in handle.generate.remote(batch)]
        assert answers[0].results[0].completions

    return ask


async def in_turn(ways: dict[str, Ask], pairs: list[Pair]) -> dict[str, list[float]]:
    """Seconds of each pair's request, way by way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for pair in pairs:
        for name, ask in ways.items():
            began = time.perf_counter()
            await ask(pair)
            taken[name].append(time.perf_counter() - began)
    return taken


async def at_once(ask: Ask, pairs: list[Pair], count: int, seconds: float) -> float:
    """Requests a second of ``count`` closed loops."""
    ends = time.perf_counter() + seconds
    done = 0

    async def loop(number: int) -> None:
        nonlocal done
        while time.perf_counter() < ends:
            number += count
            await ask(pairs[number % len(pairs)])
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(loop(number) for number in range(count)))
    return done / (time.perf_counter() - began)


async def overhead(server: Server, key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways, one by one and at once; milliseconds."""
    pairs = some_pairs(options)
    async with http_client(server, key) as client:
        ways = {"http": by_http(client, options.max_tokens), "handle": by_handle(options.max_tokens)}
        await in_turn(ways, pairs[:50])
        taken = await in_turn(ways, pairs)
        rates = {n: await at_once(w, pairs, options.at_once, options.seconds / 4) for n, w in ways.items()}
    found: dict[str, Any] = {name: percentiles(values, 1_000) for name, values in taken.items()}
    costs = [http - handle for http, handle in zip(taken["http"], taken["handle"], strict=True)]
    return found | {
        "overhead": percentiles(costs, 1_000),
        f"requests/s, {options.at_once} at once": {name: round(rate) for name, rate in rates.items()},
    }


async def stream_once(client: httpx.AsyncClient, pair: Pair, max_tokens: int, into: Streams) -> None:
    """One stream from its beginning to its end."""
    body = asked_of(pair, max_tokens)
    began, first, last = time.perf_counter(), 0.0, ""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                last = line or last
                first = first or time.perf_counter() - began
                if '"usage":{' in line:
                    into.tokens += json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        last = repr(error)
    if last != "data: [DONE]":
        into.errors[last] += 1
        return
    into.first.append(first)
    into.total.append(time.perf_counter() - began)


async def streams(server: Server, key: str, options: argparse.Namespace) -> dict[str, Any]:
    """So many closed loops of streams for so many seconds."""
    pairs, into = some_pairs(options), Streams()
    ends = time.perf_counter() + options.seconds

    async def loop(client: httpx.AsyncClient, number: int) -> None:
        while time.perf_counter() < ends:
            number += options.streams
            await stream_once(client, pairs[number % len(pairs)], options.max_tokens, into)

    began = time.perf_counter()
    async with http_client(server, key) as client:
        await asyncio.gather(*(loop(client, number) for number in range(options.streams)))
    seconds = time.perf_counter() - began
    return {
        "at once": options.streams,
        "seconds": round(seconds, 1),
        "streams": len(into.total),
        "errors": dict(into.errors),
        "tokens/s": round(into.tokens / seconds),
        "ttft": percentiles(into.first),
        "e2e": percentiles(into.total),
    }


def percentiles(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """The 50th and 99th."""
    import numpy as np

    return {f"p{p}": round(float(np.percentile(values, p)) * scale, 3) for p in (50, 99)} if values else {}


def some_pairs(options: argparse.Namespace) -> list[Pair]:
    """Cursors in the standard library."""
    return make_load(options.requests, 1.0, options.max_tokens, options.chars, seed=0).prompts


def http_client(server: Server, key: str) -> httpx.AsyncClient:
    """A client with a key and as many connections as it needs."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=600, limits=limits)


@contextmanager
def served(engine: str, gateways: int) -> Iterator[tuple[Server, str]]:
    """A server with such an engine, which this process has joined, and a tenant's key."""
    with (
        tempfile.TemporaryDirectory(prefix="spanfill-gateway-") as folder,
        running_server(Path(folder), "--engine", engine, "--model", MODEL, "--gateways", str(gateways)) as server,
    ):
        key = server.new_tenant("acme")
        with joined(server):
            yield server, key


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both parts."""
    found: dict[str, Any] = {"gateways": options.gateways, "max_tokens": options.max_tokens}
    with served("instant", options.gateways) as (server, key):
        found["milliseconds of a request"] = asyncio.run(overhead(server, key, options))
    with served("simulated", options.gateways) as (server, key):
        found["streams"] = asyncio.run(streams(server, key, options))
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = parser_of("gateway", __doc__)
    add = parser.add_argument
    add("--gateways", type=positive, default=1)
    add("--requests", type=positive, default=500, help="requests of each way, one by one")
    add("--at-once", type=positive, default=32, help="requests of each way at once")
    add("--streams", type=positive, default=200, help="streams at once")
    add("--seconds", type=above_zero, default=60.0, help="of the streams; a quarter for each way at once")
    add("--max-tokens", type=positive, default=64)
    add("--chars", type=positive, default=600, help="characters of each prefix and each suffix")
    add("--json", type=Path)
    options = parser.parse_args(arguments)
    check_files(parser, options.json, None)
    return options


def main() -> int:
    """The command."""
    options = parse()
    end_by_signals()
    found = measure(options)
    table = Table(title="what the gateway costs", show_header=False)
    for part, values in found.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            table.add_row(f"{part} {name}", json.dumps(value))
    console().print(table)
    if options.json:
        publish_json(options.json, found)
    return int(bool(found["streams"]["errors"]))


if __name__ == "__main__":
    sys.exit(main())
