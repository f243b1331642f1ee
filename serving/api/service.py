"""The dialects' ``Service`` on the replicas: check, render, admit, call, write the text, meter. One model a service."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import WeakValueDictionary

from serving.api.ask import Answer, Ask, Choice, End, Piece, ServedModel, Token, Usage
from serving.api.calls import TRIES, WAIT_SECONDS, Call, answers
from serving.api.checks import check, text_of
from serving.api.edge import noted
from serving.api.metrics import Metrics
from serving.api.portions import Portion, portions_of
from serving.api.prompts import Rendered, render, request_of, sampling_of, visible
from serving.api.served import Served, demand_of
from serving.api.writing import Writing, prompt_tokens
from serving.errors import (
    EngineDeadError,
    EngineError,
    LimitError,
    ModelNotFoundError,
    OverloadedError,
    SpanfillError,
    UsageError,
)
from serving.formats import Format
from serving.protocol import INTERACTIVE_PRIORITY, Growth, MicroBatch, MicroBatchResult, Result
from serving.tenants.caller import Caller
from serving.tenants.limits import Standing
from serving.tenants.tickets import Capacity, Demand, Ticket, Used

PATIENCE_SECONDS = 30.0
"""How long a request waits for its turn."""

BEGUN_PATIENCE_SECONDS = 600.0
"""How long one of which something was made waits for the next."""

LARGE_CHARS = 200_000
"""Requests with more text are tokenised one after the other, tenants in turn: 4 MB take seconds, and nobody was
admitted yet."""

FEW_CHARS, RENDERS = 4_000, max(2, len(os.sched_getaffinity(0)) // 2)
"""Of those with more than a few characters so many of a tenant are tokenised at once: all share a gateway's threads."""


class Desk(Protocol):
    """What the service needs of ``serving.tenants.desk.Desk``."""

    @property
    def share(self) -> Capacity | None:
        """What one request may fill of the engines at once, where that is known."""

    async def admit(self, demand: Demand) -> Ticket:
        """Wait until the request may run."""

    async def standing(self, caller: Caller) -> Standing:
        """What the caller may ask for now."""

    def charge(self, ticket: Ticket, output_tokens: int) -> None:
        """So many output tokens are made by now."""

    def leave(self, ticket: Ticket, used: Used | None = None) -> None:
        """The request ended."""


Meter = Callable[[Caller, str, Usage, int], None]
"""Told of each request that ended: who asked, which model, what it used, and 1.

A long stream is told in several pieces, of which the first alone counts as a request: the others have 0.
"""

METER_SECONDS = 5.0
"""What a stream has used is told so often: its client has that, whatever becomes of the gateway."""


@dataclass(frozen=True)
class Engines:
    """How to call the replicas of one model: whole micro-batches and streams of them."""

    model: ServedModel
    fmt: Format
    tokenizer: str
    whole: Call[MicroBatchResult]
    stream: Call[list[Growth]]


class FleetService:
    """Answers what the dialects ask; the asks of one request are decoded alike, as its first one says."""

    def __init__(self, engines: Engines, desk: Desk, meter: Meter, metrics: Metrics) -> None:
        self._engines = engines
        self._desk = desk
        self._meter = meter
        self._metrics = metrics
        self._large = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._renders: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

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
        """Answer all at once, from a stream where there is one, so that what was made is known if nobody waits on."""
        if _in_one_piece(asks):
            return await self._whole(asks, caller, model)
        rendered = await self._render(asks, caller)
        async with self._served(rendered, caller, model) as served:
            choices = [choice for portion in served.portions for choice in await self._collected(served, portion)]
            return self._answer(choices, served)

    async def stream(self, asks: Sequence[Ask], caller: Caller, model: str) -> AsyncGenerator[Piece | End, None]:
        """Answer piece by piece; an echo with logprobs and a prompt alone come in one piece."""
        if _in_one_piece(asks):
            for item in _as_pieces(await self._whole(asks, caller, model)):
                yield item
            return
        rendered = await self._render(asks, caller)
        async with self._served(rendered, caller, model) as served:
            for portion in served.portions:
                async with aclosing(self._pieces(served, portion)) as pieces:
                    async for piece in pieces:
                        yield piece
                        if time.monotonic() - served.metered_at >= METER_SECONDS:
                            self._tell(served, model)
            yield End(served.usage, served.is_truncated, served.timing, self._prompts(served))

    async def _whole(self, asks: Sequence[Ask], caller: Caller, model: str) -> Answer:
        """An answer that the replica gives whole."""
        rendered = await self._render(asks, caller)
        async with self._served(rendered, caller, model) as served:
            results: dict[int, Result] = {}
            for portion in served.portions:
                for key, result in (await self._results(served, portion)).items():
                    results[key] = _joined_results(results[key], result) if key in results else result
            # The texts of a quarter of a million tokens take seconds: not on the loop that others' tokens come by.
            made = await asyncio.to_thread(
                lambda: [choice for key, r in enumerate(rendered) for choice in self._choices(r, results[key])]
            )
            return self._answer(made, served)

    def _answer(self, choices: Sequence[Choice], served: Served) -> Answer:
        return Answer(tuple(choices), served.usage, served.is_truncated, served.timing, self._prompts(served))

    async def _results(self, served: Served, portion: Portion) -> dict[int, Result]:
        results: dict[int, Result] = {}
        async with (
            self._running(served, portion),
            aclosing(answers(self._engines.whole, self._batch(served, portion))) as found,
        ):
            async for came in found:
                for result in came.results:
                    _check(result.error_code, result.error_message)
                    results[result.key] = result
                    served.cached[result.key, portion.samples[result.key].start] = result.cached_tokens
                    served.completion_tokens += _made(served.rendered[result.key], result)
                self._charge(served)
        if len(results) < len(portion.samples):
            raise _ended_early()
        return results

    def _choices(self, rendered: Rendered, result: Result) -> list[Choice]:
        """The choices of one ask, each written as a stream of one piece."""
        ask, tokens = rendered.ask, self._echo(rendered, result)
        head = "".join(token.text for token in tokens)
        if ask.max_tokens == 0:
            return [Choice(head, "length", tokens)] * ask.n
        choices = []
        for sample, completion in enumerate(result.completions):
            writing = self._writing(ask, sample, len(head))
            piece = writing.add(Growth.of(result.key, sample, completion))
            assert piece is not None
            assert piece.reason is not None
            choices.append(Choice(head + piece.text, piece.reason, tokens + piece.tokens, piece.stop_word))
        return choices

    def _echo(self, rendered: Rendered, result: Result | None = None) -> tuple[Token, ...]:
        """The prompt's tokens where they are wanted, with their logprobs where the engine has told them."""
        if not rendered.ask.echo:
            return ()
        logprobs, alternatives = (result.prompt_logprobs, result.prompt_alternatives) if result else (None, None)
        as_sent = rendered.ask.suffix is None and rendered.ask.token_ids is None
        return prompt_tokens(self._engines.fmt, rendered.token_ids, logprobs, alternatives, as_sent=as_sent)

    def _writing(self, ask: Ask, index: int, offset: int) -> Writing:
        return Writing(
            index,
            self._engines.fmt,
            ask.stop,
            offset=offset,
            indent=ask.indent,
            least=ask.decoding.min_tokens,
            detailed=ask.logprobs is not None,
            through=ask.decoding.ignore_eos,
        )

    async def _pieces(self, served: Served, portion: Portion) -> AsyncGenerator[Piece, None]:
        """The pieces of a portion, until each choice has ended, by itself or by its time; echoes wait for a token."""
        writings: dict[tuple[int, int], Writing] = {}
        echoes: list[Piece] = []
        for key, samples in portion.samples.items():
            r, before = served.rendered[key], sum(each.ask.n for each in served.rendered[:key])
            echo = "".join(token.text for token in await asyncio.to_thread(self._echo, r)) if r.ask.echo else ""
            for sample in samples:
                if echo:
                    echoes.append(Piece(before + sample, echo))
                writings[key, sample] = self._writing(r.ask, before + sample, len(echo))
        async with (
            self._running(served, portion),
            aclosing(answers(self._engines.stream, self._batch(served, portion))) as bunches,
        ):
            async for growths in bunches:
                served.comes()
                pieces = [piece for growth in growths for piece in _grow(writings, growth, served, portion)]
                for piece in [*echoes, *pieces]:
                    yield piece
                echoes = []
                self._charge(served)
                if not writings:
                    return
        raise _ended_early()

    async def _collected(self, served: Served, portion: Portion) -> list[Choice]:
        """The choices of a portion's stream; as nobody has seen any of it, one that loses its replica begins again."""
        tries = TRIES
        while True:
            texts: dict[int, list[Piece]] = {}
            made, cached = served.completion_tokens, dict(served.cached)
            try:
                async with aclosing(self._pieces(served, portion)) as pieces:
                    async for piece in pieces:
                        texts.setdefault(piece.index, []).append(piece)
            except EngineDeadError:
                tries -= 1
                if not tries or served.cached == cached:
                    raise
                await asyncio.sleep(WAIT_SECONDS)
                served.completion_tokens, served.cached = made, cached
            else:
                return [_joined(texts[index]) for index in sorted(texts)]

    async def _render(self, asks: Sequence[Ask], caller: Caller) -> list[Rendered]:
        """Check, and tokenise on a thread: another request's next token shall not wait for it."""
        fmt, model = self._engines.fmt, self._engines.model
        check(asks, model, fmt)

        def rendered() -> list[Rendered]:
            return [render(ask, fmt, model.context) for ask in asks]

        chars = sum(map(text_of, asks))
        if chars <= FEW_CHARS:
            return await asyncio.to_thread(rendered)
        if chars <= LARGE_CHARS:
            return await self._in_turn([self._renders.setdefault(caller.tenant, asyncio.Semaphore(RENDERS))], rendered)
        # Of each tenant one waits with those of others.
        return await self._in_turn([self._turns.setdefault(caller.tenant, asyncio.Lock()), self._large], rendered)

    async def _in_turn(
        self, locks: Sequence[asyncio.Lock | asyncio.Semaphore], work: Callable[[], list[Rendered]]
    ) -> list[Rendered]:
        """Tokenise on a thread with these locks.

        No thread can be stopped: the turn is over when it has ended, although its client may be gone before.
        """
        with ExitStack() as held:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    for lock in locks:
                        await lock.acquire()
                        held.callback(lock.release)
            except TimeoutError:
                raise OverloadedError("too many texts wait to be tokenised.", remedy="Try again later.") from None
            working = asyncio.get_running_loop().run_in_executor(None, work)
            turn = held.pop_all()
        working.add_done_callback(lambda _: turn.close())
        return await asyncio.shield(working)

    def _prompts(self, served: Served) -> tuple[str, ...]:
        return tuple(visible(r, self._engines.fmt) for r in served.rendered if r.ask.reported)

    def _batch(self, served: Served, portion: Portion) -> MicroBatch:
        engines, ask = self._engines, served.rendered[0].ask
        sampling = sampling_of(ask, engines.fmt, format_name=engines.model.format, tokenizer=engines.tokenizer)
        if all(samples.start for samples in portion.samples.values()):
            sampling = replace(sampling, prompt_logprobs=False)  # An earlier portion has told them.
        requests = tuple(request_of(served.rendered[key], key, samples) for key, samples in portion.samples.items())
        return MicroBatch(requests, sampling, priority=INTERACTIVE_PRIORITY, cache_salt=served.caller.cache_salt)

    @asynccontextmanager
    async def _served(self, rendered: Sequence[Rendered], caller: Caller, model: str) -> AsyncIterator[Served]:
        """Inside, the request is admitted, its portions aside; however it ends, what it used is told."""
        portions = portions_of(rendered, self._desk.share)
        ticket = await self._admit(demand_of(rendered, caller, PATIENCE_SECONDS, runs=len(portions) == 1))
        served = Served(rendered, portions, caller, ticket, time.monotonic())
        try:
            yield served
        except SpanfillError:
            served.failed = True
            raise
        finally:
            usage = served.usage
            self._desk.leave(ticket, Used(usage.prompt_tokens, usage.completion_tokens))
            self._tell(served, model)
            if served.first is not None:
                self._metrics.began(served.first - served.started)

    @asynccontextmanager
    async def _running(self, served: Served, portion: Portion) -> AsyncIterator[None]:
        """Inside, a portion may run, by a ticket of its own unless it is the whole request."""
        if len(served.portions) == 1:
            served.begun.update(portion.samples)
            yield
            return
        asked = time.monotonic()
        patience = BEGUN_PATIENCE_SECONDS if served.begun else PATIENCE_SECONDS
        ticket = await self._desk.admit(portion.demand(served.rendered, served.caller, patience))
        if not served.begun:
            served.started = time.monotonic()
            self._metrics.waited(served.started - asked)
        served.begun.update(portion.samples)
        before = served.completion_tokens
        served.running = ticket, before
        try:
            yield
        finally:
            served.running = None
            self._desk.leave(ticket, Used(ticket.demand.prompt_tokens, served.completion_tokens - before))

    def _tell(self, served: Served, model: str) -> None:
        """Meter what was not metered yet."""
        usage = served.usage
        new = usage.beyond(served.metered)
        if new.total_tokens:
            self._meter(served.caller, model, new, 0 if served.metered.total_tokens else 1)
            self._metrics.used(new)
            served.metered = usage
        served.metered_at = time.monotonic()

    def _charge(self, served: Served) -> None:
        for ticket, made in served.made:
            self._desk.charge(ticket, made)

    async def _admit(self, demand: Demand) -> Ticket:
        """Wait for the ticket; how the caller then stands goes into the answer's headers."""
        asked = time.monotonic()
        try:
            ticket = await self._desk.admit(demand)
        except (LimitError, UsageError):
            _note(await self._desk.standing(demand.caller))
            raise
        _note(ticket.standing)
        if demand.runs:
            self._metrics.waited(time.monotonic() - asked)
        return ticket


def _note(standing: Standing) -> None:
    if (about := noted.get()) is not None:
        about.headers |= standing.headers()


def _check(code: str | None, message: str | None) -> None:
    if code is not None:
        raise EngineError(f"{code}: {message}", remedy="Change the request.")


def _made(rendered: Rendered, result: Result) -> int:
    """Tokens of a result that were asked for; an engine that is asked for none makes one all the same."""
    if rendered.ask.max_tokens == 0:
        return 0
    return sum(len(each.token_ids) + (each.stop_token_id is not None) for each in result.completions)


def _ended_early() -> EngineDeadError:
    return EngineDeadError("the replica ended its answer before it was whole.", remedy="Ask again: another answers.")


def _in_one_piece(asks: Sequence[Ask]) -> bool:
    """Whether an engine tells what is asked only at the end: a prompt's logprobs come with no stream."""
    return any(ask.max_tokens == 0 or (ask.echo and ask.logprobs is not None) for ask in asks)


def _as_pieces(answer: Answer) -> list[Piece | End]:
    pieces = [Piece(i, each.text, each.tokens, each.reason, each.stop_word) for i, each in enumerate(answer.choices)]
    return [*pieces, End(answer.usage, answer.truncated, answer.timing, answer.prompts)]


def _grow(writings: dict[tuple[int, int], Writing], growth: Growth, served: Served, portion: Portion) -> list[Piece]:
    """What may be shown of a growth; a choice that ends, by itself or by its time, leaves ``writings``."""
    _check(growth.error_code, growth.error_message)
    place = growth.key, portion.samples[growth.key].start + growth.sample
    served.cached[place] = max(growth.cached_tokens, served.cached.get(place, 0))
    if (writing := writings.get(place)) is None:
        return []
    before = writing.count
    piece = writing.add(growth)
    served.completion_tokens += writing.count - before
    pieces = [] if piece is None else [piece]
    if growth.finish_reason is not None:
        del writings[place]
    elif writing.is_outside or (served.is_late(growth.key) and "\n" in writing.text):
        pieces.append(writing.cut())
        del writings[place]
    return pieces


def _joined_results(first: Result, more: Result) -> Result:
    """The answer to one ask of two, the one to its samples and the one to those behind them."""
    return replace(
        first,
        completions=first.completions + more.completions,
        cached_tokens=first.cached_tokens + more.cached_tokens,
    )


def _joined(pieces: list[Piece]) -> Choice:
    last = pieces[-1]
    assert last.reason is not None
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Choice("".join(piece.text for piece in pieces), last.reason, tokens, last.stop_word)
