"""A request under way: what was asked, and what is known of its use and of its times so far."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serving.api.ask import Timing, Usage
from serving.api.portions import Portion
from serving.api.prompts import Rendered
from serving.tenants.caller import Caller
from serving.tenants.tickets import Demand, Ticket


@dataclass
class Served:
    """An admitted request; ``started`` and ``first``, when its first tokens came, are of ``time.monotonic``.

    ``begun`` has the keys of asks that went to an engine, ``running`` the ticket of the portion that runs where it is
    one of several, and the ``completion_tokens`` of those before it.
    ``cached`` is what the prefix cache held of a prompt, by its key and sample, or for all its samples together, of
    whatever has come. One that ``failed`` before anything came has used nothing. ``metered`` is what was told of its
    usage, at ``metered_at``.
    """

    rendered: Sequence[Rendered]
    portions: Sequence[Portion]
    caller: Caller
    ticket: Ticket
    started: float
    first: float | None = None
    completion_tokens: int = 0
    cached: dict[tuple[int, int], int] = field(default_factory=dict)
    failed: bool = False
    begun: set[int] = field(default_factory=set)
    running: tuple[Ticket, int] | None = None
    metered: Usage = field(default_factory=Usage)
    metered_at: float = 0.0

    def __post_init__(self) -> None:
        self.metered_at = self.started

    @property
    def is_truncated(self) -> bool:
        """Whether texts were cut to fit."""
        return any(r.truncated for r in self.rendered)

    @property
    def usage(self) -> Usage:
        """What it used by now; a prompt counts once, and no more of it is cached than there is."""
        if self.failed and not self.cached:
            return Usage()
        prompt = sum(len(self.rendered[key].token_ids) for key in self.begun)
        samples = sum(r.samples for r in self.rendered) / max(1, len(self.rendered))
        return Usage(prompt, self.completion_tokens, min(prompt, round(sum(self.cached.values()) / max(1, samples))))

    @property
    def timing(self) -> Timing:
        """Seconds to the first token and from there on."""
        now = time.monotonic()
        first = now if self.first is None else self.first
        return Timing(first - self.started, now - first)

    @property
    def made(self) -> Iterator[tuple[Ticket, int]]:
        """Each ticket and the tokens that came of it."""
        yield self.ticket, self.completion_tokens
        if self.running is not None:
            ticket, before = self.running
            yield ticket, self.completion_tokens - before

    def comes(self) -> None:
        """Tokens are there."""
        if self.first is None:
            self.first = time.monotonic()

    def is_late(self, key: int) -> bool:
        """Whether the time of an ask is over."""
        seconds = self.rendered[key].ask.seconds
        return seconds is not None and self.first is not None and time.monotonic() - self.first > seconds


def demand_of(rendered: Sequence[Rendered], caller: Caller, patience: float, *, runs: bool) -> Demand:
    """What a request may come to use; it waits ``patience`` seconds at most, and ``runs`` unless its portions do."""
    return Demand(
        caller,
        sum(len(r.token_ids) for r in rendered),
        sum(r.output_tokens for r in rendered),
        sum(r.samples for r in rendered),
        patience,
        runs=runs,
    )
