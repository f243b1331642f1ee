"""What a tenant and its keys may use: requests and tokens a minute, and requests at once.

What a request may come to use is reserved before it is admitted, counts as used once it is, and the rest is given back
when the request ends. A limit a minute is a token bucket that holds one minute's worth and fills evenly: within any
``t`` seconds no more than ``limit * (1 + t / 60)`` is used. What is reserved keeps its place in the bucket. No I/O.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from serving.errors import LimitError, UsageError
from serving.tenants.caller import Caller, Limits

MINUTE = 60.0
ROUNDING = 1e-6
"""A part of a token that sums of floating-point numbers may be off by."""


@dataclass(frozen=True, slots=True)
class Level:
    """A limit a minute, how much of it may be asked for now, and seconds until it is whole again if nobody asks."""

    limit: int
    remaining: int
    reset: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a caller stands: of the tenant's limit and the key's the one that leaves less; None where neither has one.

    ``concurrency`` is of requests at once, and how many more there may be.
    """

    requests: Level | None = None
    tokens: Level | None = None
    concurrency: tuple[int, int] | None = None

    def headers(self) -> dict[str, str]:
        """``x-ratelimit-{limit,remaining,reset}-{requests,tokens}``, in the form that OpenAI's have.

        And ``x-ratelimit-{limit,remaining}-concurrency``, of which nobody knows when it is whole again.
        """
        found: dict[str, str] = {}
        for what, level in (("requests", self.requests), ("tokens", self.tokens)):
            if level is not None:
                found[f"x-ratelimit-limit-{what}"] = str(level.limit)
                found[f"x-ratelimit-remaining-{what}"] = str(level.remaining)
                found[f"x-ratelimit-reset-{what}"] = duration(level.reset)
        if self.concurrency is not None:
            limit, remaining = self.concurrency
            found["x-ratelimit-limit-concurrency"] = str(limit)
            found["x-ratelimit-remaining-concurrency"] = str(remaining)
        return found


def duration(seconds: float) -> str:
    """Seconds rounded up to milliseconds, as ``12ms``, ``1.2s`` or ``1m0.5s``."""
    milliseconds = math.ceil(seconds * 1_000 - ROUNDING)
    if milliseconds < 1_000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1_000:g}s" if minutes else f"{rest / 1_000:g}s"


class Bucket:
    """A limit a minute (None: none), what is used of it, which becomes less evenly, and what is reserved."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.limit: int | None = None
        self._clock = clock
        self._at = clock()
        self._used = 0.0
        self._reserved = 0

    def resize(self, limit: int | None) -> None:
        """Change the limit; what is used of it stays used."""
        self._refill()
        self.limit = limit

    def _refill(self) -> None:
        now = self._clock()
        freed = math.inf if self.limit is None else (now - self._at) * self.limit / MINUTE
        self._used, self._at = max(0.0, self._used - freed), now

    def wait(self, count: int) -> float:
        """Seconds until so much fits, as soon as it can if what is reserved is used; 0: it fits now."""
        self._refill()
        if self.limit is None:
            return 0.0
        missing = self._used + self._reserved + count - self.limit
        return self._seconds(missing) if missing > ROUNDING else 0.0

    def reserve(self, count: int) -> None:
        """Keep room, whether there is any or not."""
        self._reserved += count

    def settle(self, *, reserved: int, used: int) -> None:
        """Of what was reserved, so much is reserved no longer, and so much was used."""
        self._refill()
        self._reserved -= reserved
        self._used += used

    def level(self) -> Level | None:
        """How full it is; None without a limit."""
        self._refill()
        if self.limit is None:
            return None
        taken = self._used + self._reserved
        return Level(self.limit, max(0, math.floor(self.limit - taken + ROUNDING)), self._seconds(taken))

    def _seconds(self, count: float) -> float:
        """Seconds in which so much is filled in."""
        return count * MINUTE / max(1, self.limit or 0)


class Account:
    """What one tenant or one key has of its limits; ``who`` names it in errors."""

    def __init__(self, who: str, clock: Callable[[], float]) -> None:
        self.who = who
        self.open = 0
        self.requests = Bucket(clock)
        self.tokens = Bucket(clock)
        self._concurrency: int | None = None

    def adopt(self, limits: Limits) -> None:
        """Go by these limits from now on."""
        self.requests.resize(limits.requests_per_minute)
        self.tokens.resize(limits.tokens_per_minute)
        self._concurrency = limits.concurrency

    @property
    def concurrency(self) -> tuple[int, int] | None:
        """Requests at once, and how many more there may be; None without a limit."""
        return None if self._concurrency is None else (self._concurrency, max(0, self._concurrency - self.open))

    def check_size(self, tokens: int) -> None:
        """Raise ``UsageError`` for a request that no waiting would make fit."""
        limit = self.tokens.limit
        if limit is not None and tokens > limit:
            raise UsageError(
                f"the request may use {tokens:,} tokens, prompt and n * max_tokens together, "
                f"and {self.who} may use {limit:,} a minute.",
                remedy="Shorten the prompt, lower max_tokens or n, or have tokens-per-minute raised.",
            )

    def refusals(self, tokens: int) -> Iterator[LimitError]:
        """Why a request of so many tokens may not begin now, one error a limit that is reached."""
        for name, bucket, count in (("requests", self.requests, 1), ("tokens", self.tokens, tokens)):
            if wait := bucket.wait(count):
                yield LimitError(
                    f"{self.who} may use {bucket.limit:,} {name} a minute, and {count:,} more do not fit now.",
                    remedy=f"Try again in {duration(wait)}, or have {name}-per-minute raised.",
                    retry_after=wait,
                )
        if self._concurrency is not None and self.open >= self._concurrency:
            yield LimitError(
                f"{self.who} may have {self._concurrency:,} requests at once, and has {self.open:,}.",
                remedy="Wait until one of them ends, or have max-concurrency raised.",
            )


class Claim:
    """What one request holds of its tenant's and its key's limits, until ``end``."""

    def __init__(self, accounts: Iterable[Account], tokens: int) -> None:
        self._accounts = tuple(accounts)
        self._left = tokens
        self._used = 0
        self._begun = False
        for account in self._accounts:
            account.open += 1
            account.requests.reserve(1)
            account.tokens.reserve(tokens)

    def begin(self) -> None:
        """The request is served, and so counts as one, however often that is said."""
        if self._begun:
            return
        self._begun = True
        for account in self._accounts:
            account.requests.settle(reserved=1, used=1)

    def use(self, tokens: int) -> None:
        """The request, once served, has used so many tokens in all by now; what was reserved for them is used up."""
        if tokens:
            self.begin()
        more = max(0, tokens - self._used)
        covered = min(more, self._left)
        self._used, self._left = self._used + more, self._left - covered
        for account in self._accounts:
            account.tokens.settle(reserved=covered, used=more)

    def end(self) -> None:
        """Give back what was not used, once."""
        for account in self._accounts:
            account.open -= 1
            account.tokens.settle(reserved=self._left, used=0)
            if not self._begun:
                account.requests.settle(reserved=1, used=0)


class Limiter:
    """The accounts of all tenants and keys; ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[tuple[str, str | None], Account] = {}

    def claim(self, caller: Caller, tokens: int) -> Claim:
        """Reserve one request of so many tokens, prompt and ``n * max_tokens``, by the tenant's limits and the key's.

        Raises ``LimitError`` while a limit leaves too little, with the longest wait of those that do, and
        ``UsageError`` for more tokens than a whole minute's limit.
        """
        accounts = self._accounts_of(caller)
        for account in accounts:
            account.check_size(tokens)
        if refusals := [refusal for account in accounts for refusal in account.refusals(tokens)]:
            raise max(refusals, key=lambda refusal: refusal.retry_after)
        return Claim(accounts, tokens)

    def force(self, caller: Caller, tokens: int) -> Claim:
        """Reserve for a request that runs already, whatever the limits say."""
        return Claim(self._accounts_of(caller), tokens)

    def standing(self, caller: Caller) -> Standing:
        """What the caller may ask for now."""
        accounts = self._accounts_of(caller)
        return Standing(
            _tightest(account.requests.level() for account in accounts),
            _tightest(account.tokens.level() for account in accounts),
            min((c for account in accounts if (c := account.concurrency)), key=itemgetter(1), default=None),
        )

    def _accounts_of(self, caller: Caller) -> tuple[Account, Account]:
        return (
            self._account(caller.tenant, None, f"tenant {caller.tenant}", caller.limits),
            self._account(caller.tenant, caller.key, f"key {caller.key}", caller.key_limits),
        )

    def _account(self, tenant: str, key: str | None, who: str, limits: Limits) -> Account:
        account = self._accounts.get((tenant, key))
        if account is None:
            account = self._accounts[tenant, key] = Account(who, self._clock)
        account.adopt(limits)
        return account


def _tightest(levels: Iterable[Level | None]) -> Level | None:
    return min((level for level in levels if level), key=lambda level: level.remaining, default=None)
