"""The dialects' ``Service`` on the replicas: render, admit, call, write the text, meter. One model an application."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from serving.api.ask import Answer, Ask, Choice, End, Piece, ServedModel, Timing, Usage
from serving.api.calls import Call, answers
from serving.api.edge import noted
from serving.api.metrics import Metrics
from serving.api.prompts import Rendered, render, request_of, sampling_of, visible
from serving.api.writing import Writing, prompt_tokens
from serving.errors import EngineError, LimitError, ModelNotFoundError
from serving.formats import Format
from serving.protocol import INTERACTIVE_PRIORITY, Growth, MicroBatch, MicroBatchResult, Result
from serving.tenants.caller import Caller
from serving.tenants.limits import Standing
from serving.tenants.tickets import Demand, Ticket, Used

PATIENCE_SECONDS = 30.0
"""How long a request waits for its turn."""


class Desk(Protocol):
    """What the service needs of ``serving.tenants.desk.Desk``."""

    async def admit(self, demand: Demand) -> Ticket:
        """Wait until the request may run."""

    async def standing(self, caller: Caller) -> Standing:
        """What the caller may ask for now."""

    def charge(self, ticket: Ticket, output_tokens: int) -> None:
        """So many output tokens are made by now."""

    def leave(self, ticket: Ticket, used: Used | None = None) -> None:
        """The request ended."""


Meter = Callable[[Caller, str, Usage], None]
"""Told of each request that ended: who asked, which model, what it used."""


@dataclass(frozen=True)
class Engines:
    """How to call the replicas of one model: whole micro-batches and streams of them."""

    model: ServedModel
    fmt: Format
    tokenizer: str
    whole: Call[MicroBatchResult]
    stream: Call[list[Growth]]


@dataclass
class _Served:
    """A request under way: what was asked, and what is known of its use so far."""

    rendered: list[Rendered]
    caller: Caller
    ticket: Ticket
    started: float
    first: float | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def usage(self) -> Usage:
        """What it used by now; a prompt counts once, and no more of it is cached than there is."""
        prompt = sum(len(r.token_ids) for r in self.rendered)
        samples = sum(r.ask.n for r in self.rendered) / max(1, len(self.rendered))
        return Usage(prompt, self.completion_tokens, min(prompt, round(self.cached_tokens / max(1, samples))))

    @property
    def timing(self) -> Timing:
        """Seconds to the first token and from there on."""
        now = time.monotonic()
        first = now if self.first is None else self.first
        return Timing(first - self.started, now - first)


class FleetService:
    """Answers what the dialects ask."""

    def __init__(self, engines: Engines, desk: Desk, meter: Meter, metrics: Metrics) -> None:
        self._engines = engines
        self._desk = desk
        self._meter = meter
        self._metrics = metrics

    @property
    def models(self) -> Sequence[ServedModel]:
        """The one model."""
        return [self._engines.model]

    def model(self, name: str | None, caller: Caller) -> ServedModel:
        """The model of a name; raises ``ModelNotFoundError``."""
        model = self._engines.model
        named = not name or name in (model.name, f"{model.name}:latest")
        if named and (caller.models is None or model.name in caller.models):
            return model
        known = model.name if caller.models is None or model.name in caller.models else "none for this key"
        raise ModelNotFoundError(f"model {name or model.name} is not served here.", remedy=f"There is: {known}.")

    async def answer(self, asks: Sequence[Ask], caller: Caller, model: str) -> Answer:
        """Answer all at once."""
        if any(ask.seconds is not None for ask in asks):
            return await self._collected(asks, caller, model)
        rendered = await self._render(asks)
        async with self._served(rendered, caller, model) as served:
            results: dict[int, Result] = {}
            async for came in answers(self._engines.whole, self._batch(served, caller)):
                served.first = served.first or time.monotonic()
                for result in came.results:
                    _check(result.error_code, result.error_message)
                    results[result.key] = result
            choices: list[Choice] = []
            for key, r in enumerate(rendered):
                choices += self._choices(r, results[key], served)
            return Answer(
                tuple(choices),
                served.usage,
                any(r.truncated for r in rendered),
                served.timing,
                tuple(visible(r, self._engines.fmt) for r in rendered),
            )

    def _choices(self, rendered: Rendered, result: Result, served: _Served) -> list[Choice]:
        """The choices of one ask, each written as a stream of one piece."""
        fmt, ask = self._engines.fmt, rendered.ask
        served.cached_tokens += result.cached_tokens
        head, tokens = "", ()
        if ask.echo:
            tokens = prompt_tokens(fmt, rendered.token_ids, result.prompt_logprobs, result.prompt_alternatives)
            head = "".join(token.text for token in tokens)
        choices = []
        for sample, completion in enumerate(result.completions):
            writing = self._writing(ask, sample, len(head))
            growth = Growth(
                result.key,
                sample,
                completion.token_ids,
                completion.logprobs,
                completion.alternatives,
                completion.finish_reason,
                completion.stop_token_id,
            )
            if ask.max_tokens == 0:
                choices.append(Choice(head, "length", tokens))
                continue
            piece = writing.add(growth)
            assert piece is not None
            assert piece.reason is not None
            served.completion_tokens += writing.count
            choices.append(Choice(head + piece.text, piece.reason, tokens + piece.tokens, piece.stop_word))
        return choices

    def _writing(self, ask: Ask, index: int, offset: int = 0) -> Writing:
        return Writing(
            index,
            self._engines.fmt,
            ask.stop,
            offset=offset,
            detailed=ask.logprobs is not None,
            through=ask.decoding.ignore_eos,
        )

    async def stream(self, asks: Sequence[Ask], caller: Caller, model: str) -> AsyncGenerator[Piece | End, None]:
        """Answer piece by piece; an echo with logprobs and a prompt alone come in one piece."""
        if any(ask.max_tokens == 0 or (ask.echo and ask.logprobs is not None) for ask in asks):
            async for item in _in_one_piece(await self.answer(asks, caller, model)):
                yield item
            return
        rendered = await self._render(asks)
        async with self._served(rendered, caller, model) as served:
            async with aclosing(self._pieces(served)) as pieces:
                async for piece in pieces:
                    yield piece
            yield End(
                served.usage,
                any(r.truncated for r in rendered),
                served.timing,
                tuple(visible(r, self._engines.fmt) for r in rendered),
            )

    async def _pieces(self, served: _Served) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices, until each has ended by itself or by its time."""
        writings: dict[tuple[int, int], Writing] = {}
        for key, r in enumerate(served.rendered):
            echo = visible(r, self._engines.fmt) if r.ask.echo else ""
            for sample in range(r.ask.n):
                writing = self._writing(r.ask, len(writings), len(echo))
                if echo:
                    yield Piece(len(writings), echo)
                writings[key, sample] = writing
        batch = self._batch(served, served.caller)
        async with aclosing(answers(self._engines.stream, batch)) as bunches:
            async for growths in bunches:
                served.first = served.first or time.monotonic()
                for growth in growths:
                    _check(growth.error_code, growth.error_message)
                    served.cached_tokens += growth.cached_tokens
                    writing = writings.get((growth.key, growth.sample))
                    if writing is None:
                        continue
                    before = writing.count
                    piece = writing.add(growth)
                    served.completion_tokens += writing.count - before
                    if piece is not None:
                        yield piece
                    if growth.finish_reason is not None:
                        del writings[growth.key, growth.sample]
                    elif self._is_late(served, growth.key) and "\n" in writing.text:
                        yield writing.cut()
                        del writings[growth.key, growth.sample]
                self._desk.charge(served.ticket, served.completion_tokens)
                if not writings:
                    return

    def _is_late(self, served: _Served, key: int) -> bool:
        seconds = served.rendered[key].ask.seconds
        return seconds is not None and served.first is not None and time.monotonic() - served.first > seconds

    async def _collected(self, asks: Sequence[Ask], caller: Caller, model: str) -> Answer:
        """A stream's pieces as one answer."""
        texts: dict[int, list[Piece]] = {}
        end = End(Usage())
        async with aclosing(self.stream(asks, caller, model)) as items:
            async for item in items:
                if isinstance(item, End):
                    end = item
                else:
                    texts.setdefault(item.index, []).append(item)
        choices = tuple(_joined(texts[index]) for index in sorted(texts))
        return Answer(choices, end.usage, end.truncated, end.timing, end.prompts)

    async def _render(self, asks: Sequence[Ask]) -> list[Rendered]:
        """Tokenise on a thread: another request's next token shall not wait for it."""
        fmt, context = self._engines.fmt, self._engines.model.context
        return await asyncio.to_thread(lambda: [render(ask, fmt, context) for ask in asks])

    def _batch(self, served: _Served, caller: Caller) -> MicroBatch:
        engines, ask = self._engines, served.rendered[0].ask
        sampling = sampling_of(ask, engines.fmt, format_name=engines.model.format, tokenizer=engines.tokenizer)
        requests = tuple(request_of(r, key) for key, r in enumerate(served.rendered))
        return MicroBatch(requests, sampling, priority=INTERACTIVE_PRIORITY, cache_salt=caller.cache_salt)

    @asynccontextmanager
    async def _served(self, rendered: list[Rendered], caller: Caller, model: str) -> AsyncIterator[_Served]:
        """Inside, the request is admitted; however it ends, what it used is told."""
        demand = Demand(
            caller,
            sum(len(r.token_ids) for r in rendered),
            sum(r.output_tokens for r in rendered),
            sum(r.ask.n for r in rendered),
            PATIENCE_SECONDS,
        )
        ticket = await self._admit(demand)
        served = _Served(rendered, caller, ticket, time.monotonic())
        try:
            yield served
        finally:
            usage = served.usage
            self._desk.leave(ticket, Used(usage.prompt_tokens, usage.completion_tokens))
            self._meter(caller, model, usage)
            self._metrics.used(usage)
            if served.first is not None:
                self._metrics.began(served.first - served.started)

    async def _admit(self, demand: Demand) -> Ticket:
        """Wait for the ticket; how the caller then stands goes into the answer's headers."""
        asked = time.monotonic()
        try:
            ticket = await self._desk.admit(demand)
        except LimitError:
            _note(await self._desk.standing(demand.caller))
            raise
        _note(ticket.standing)
        self._metrics.waited(time.monotonic() - asked)
        return ticket


def _note(standing: Standing) -> None:
    if (about := noted.get()) is not None:
        about.headers |= standing.headers()


def _check(code: str | None, message: str | None) -> None:
    if code is not None:
        raise EngineError(f"{code}: {message}", remedy="Change the request.")


async def _in_one_piece(answer: Answer) -> AsyncGenerator[Piece | End, None]:
    for index, choice in enumerate(answer.choices):
        yield Piece(index, choice.text, choice.tokens, choice.reason, choice.stop_word)
    yield End(answer.usage, answer.truncated, answer.timing, answer.prompts)


def _joined(pieces: list[Piece]) -> Choice:
    last = pieces[-1]
    assert last.reason is not None
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Choice("".join(piece.text for piece in pieces), last.reason, tokens, last.stop_word)
