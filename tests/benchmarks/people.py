"""People's load: streamed infills that come at moments drawn beforehand, whatever the answers take."""

import asyncio
import itertools
import json
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx

from jobs.pairs import standard_library


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

    def headed(self, line: str) -> "Load":
        """The same under a first line of its own: no prompt finds what the prefix cache holds of another one's."""
        return replace(self, prompts=[(f"{line}\n{prefix}", suffix) for prefix, suffix in self.prompts])


def make_load(rate: float, seconds: float, max_tokens: int, chars: int, seed: int) -> Load:
    """Poisson arrivals, one at least; cursors anywhere in files of the standard library."""
    draw = random.Random(seed)
    gaps = iter(lambda: draw.expovariate(rate), None)
    moments = list(itertools.takewhile(lambda moment: moment < seconds, itertools.accumulate(gaps))) or [0.0]
    texts = [path.read_text("utf-8", errors="ignore") for path in sorted(standard_library().glob("*.py"))]
    texts = [text for text in texts if len(text) > 2 * chars]
    prompts = []
    for _ in moments:
        text = draw.choice(texts)
        at = draw.randrange(chars, len(text) - chars)
        prompts.append((text[at - chars : at], text[at : at + chars]))
    return Load(prompts, moments, max_tokens)


async def send(url: str, load: Load) -> list[Taken]:
    """Send every request when it is due."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        requests = zip(load.moments, load.prompts, strict=True)
        return await asyncio.gather(*(_one(client, began + due, pair, load.max_tokens) for due, pair in requests))


def asked_of(pair: tuple[str, str], max_tokens: int) -> dict[str, Any]:
    """The body of a streamed infill of so many tokens, which tells its usage."""
    asked = {"prompt": pair[0], "suffix": pair[1], "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return asked | {"stream_options": {"include_usage": True}, "ignore_eos": True}


async def _one(client: httpx.AsyncClient, due: float, pair: tuple[str, str], max_tokens: int) -> Taken:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    first, tokens = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=asked_of(pair, max_tokens)) as response:
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
