import itertools
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import LimitError, UsageError
from serving.tenants.caller import Caller, Limits
from serving.tenants.limits import Claim, Level, Limiter, Standing, duration

NONE = Limits()
STEPS = st.lists(
    st.tuples(st.floats(0, 30), st.sampled_from(["claim", "use", "end"]), st.integers(1, 120), st.integers(0, 5)),
    max_size=60,
)


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


def caller(limits: Limits = NONE, key_limits: Limits = NONE, *, key: str = "ana") -> Caller:
    return Caller("acme", key, limits=limits, key_limits=key_limits)


@dataclass
class Running:
    """A request that has claimed, and used, so many tokens."""

    claim: Claim
    tokens: int
    used: int = 0


@given(steps=STEPS)
def test_within_any_time_no_more_is_used_than_a_full_bucket_and_what_filled_it_meanwhile(
    steps: list[tuple[float, str, int, int]],
) -> None:
    clock = Clock()
    limiter, who = Limiter(clock), caller(Limits(tokens_per_minute=100))
    running: list[Running] = []
    used: list[tuple[float, int]] = []
    for seconds, step, tokens, which in steps:
        clock.now += seconds
        if step == "claim":
            with suppress(LimitError, UsageError):
                running.append(Running(limiter.claim(who, tokens), tokens))
        elif running:
            chosen = running[which % len(running)]
            if step == "use":
                total = min(chosen.used + tokens, chosen.tokens)
                used.append((clock.now, total - chosen.used))
                chosen.used = total
                chosen.claim.use(total)
            else:
                chosen.claim.end()
                running.remove(chosen)
    for first, (start, _) in enumerate(used):
        sums = itertools.accumulate(tokens for _, tokens in used[first:])
        for (end, _), tokens in zip(used[first:], sums, strict=True):
            assert tokens <= 100 * (1 + (end - start) / 60) + 0.01


@given(first=st.integers(1, 1_000), second=st.integers(1, 1_000))
def test_who_comes_again_when_he_was_told_to_is_admitted(first: int, second: int) -> None:
    clock = Clock()
    limiter, who = Limiter(clock), caller(Limits(tokens_per_minute=1_000))
    claim = limiter.claim(who, first)
    claim.use(first)
    claim.end()
    try:
        limiter.claim(who, second)
        assert first + second <= 1_000
    except LimitError as refusal:
        assert first + second > 1_000
        clock.now += refusal.retry_after
        limiter.claim(who, second)


def test_not_one_token_beyond_the_limit_is_admitted() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), caller(Limits(tokens_per_minute=1_000))
    for _ in range(10):
        limiter.claim(who, 100)
    with pytest.raises(LimitError, match="tenant acme may use 1,000 tokens a minute") as refused:
        limiter.claim(who, 1)
    assert refused.value.retry_after == pytest.approx(0.06)
    assert "Try again in 60ms" in refused.value.remedy


def test_not_one_request_beyond_the_limit_is_admitted() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), caller(key_limits=Limits(requests_per_minute=5))
    for _ in range(5):
        limiter.claim(who, 0).begin()
    with pytest.raises(LimitError, match="key ana may use 5 requests a minute") as refused:
        limiter.claim(who, 0)
    assert refused.value.retry_after == pytest.approx(12)
    clock.now += 12
    limiter.claim(who, 0)
    with pytest.raises(LimitError):
        limiter.claim(who, 0)


def test_a_tenants_keys_share_its_limit_and_each_has_its_own() -> None:
    limiter = Limiter(Clock())
    tenant, key = Limits(concurrency=3), Limits(concurrency=2)
    ana, bob, eve = (caller(tenant, key, key=name) for name in ("ana", "bob", "eve"))
    first = limiter.claim(ana, 10)
    limiter.claim(ana, 10)
    with pytest.raises(LimitError, match="key ana may have 2 requests at once"):
        limiter.claim(ana, 10)
    limiter.claim(bob, 10)
    with pytest.raises(LimitError, match="tenant acme may have 3 requests at once"):
        limiter.claim(eve, 10)
    first.end()
    limiter.claim(eve, 10)


def test_a_request_that_no_waiting_would_admit_is_refused_for_good() -> None:
    limiter, who = Limiter(Clock()), caller(Limits(tokens_per_minute=1_000))
    with pytest.raises(UsageError, match="1,001 tokens") as refused:
        limiter.claim(who, 1_001)
    assert "tenant acme may use 1,000 a minute" in refused.value.message
    assert not refused.value.retryable
    assert "lower max_tokens" in refused.value.remedy
    limiter.claim(who, 1_000)


def test_what_was_reserved_and_not_used_is_given_back() -> None:
    limiter, who = Limiter(Clock()), caller(Limits(tokens_per_minute=1_000))
    claim = limiter.claim(who, 900)
    with pytest.raises(LimitError):
        limiter.claim(who, 200)
    claim.use(30)
    claim.use(50)
    claim.end()
    assert limiter.standing(who).tokens == Level(1_000, 950, 3.0)
    limiter.claim(who, 950)


def test_what_is_reserved_for_long_does_not_fill_the_bucket_a_second_time() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), caller(Limits(tokens_per_minute=1_000))
    claims = []
    for _ in range(5):
        claims.append(limiter.claim(who, 200))
        clock.now += 60
    with pytest.raises(LimitError):
        limiter.claim(who, 200)
    for claim in claims:
        claim.end()
    limiter.claim(who, 1_000)
    with pytest.raises(LimitError):
        limiter.claim(who, 1)


def test_a_request_that_used_more_than_it_reserved_is_counted_whole() -> None:
    limiter, who = Limiter(Clock()), caller(Limits(tokens_per_minute=1_000))
    claim = limiter.claim(who, 100)
    claim.use(150)
    claim.end()
    assert limiter.standing(who).tokens == Level(1_000, 850, 9.0)


def test_a_request_that_never_began_is_not_counted() -> None:
    limiter, who = Limiter(Clock()), caller(Limits(requests_per_minute=1))
    limiter.claim(who, 10).end()
    served = limiter.claim(who, 10)
    served.begin()
    served.end()
    with pytest.raises(LimitError):
        limiter.claim(who, 10)


def test_a_refusal_takes_nothing() -> None:
    limiter, who = Limiter(Clock()), caller(Limits(tokens_per_minute=100, requests_per_minute=2, concurrency=2))
    limiter.claim(who, 80)
    for _ in range(5):
        with pytest.raises(LimitError):
            limiter.claim(who, 50)
    limiter.claim(who, 20)


def test_of_several_limits_the_longest_wait_is_told() -> None:
    limiter = Limiter(Clock())
    who = caller(Limits(concurrency=1), Limits(requests_per_minute=1))
    limiter.claim(who, 0).begin()
    with pytest.raises(LimitError, match="key ana") as refused:
        limiter.claim(who, 0)
    assert refused.value.retry_after == pytest.approx(60)


def test_a_changed_limit_counts_at_once_and_what_was_used_stays_used() -> None:
    limiter = Limiter(Clock())
    limiter.claim(caller(Limits(tokens_per_minute=100)), 80)
    remaining = []
    for limit in (50, 200, None):
        level = limiter.standing(caller(Limits(tokens_per_minute=limit))).tokens
        remaining.append(level.remaining if level else None)
    assert remaining == [0, 120, None]


def test_a_request_that_runs_already_is_counted_whatever_the_limits_say() -> None:
    limiter, who = Limiter(Clock()), caller(Limits(tokens_per_minute=100, concurrency=1))
    limiter.force(who, 60)
    claim = limiter.force(who, 60)
    with pytest.raises(LimitError):
        limiter.claim(who, 1)
    claim.end()
    standing = limiter.standing(who)
    assert standing.tokens
    assert standing.tokens.remaining == 40


def test_without_limits_there_are_none() -> None:
    limiter, who = Limiter(Clock()), caller()
    for _ in range(1_000):
        limiter.claim(who, 10**9).use(10**9)
    assert limiter.standing(who) == Standing()
    assert limiter.standing(who).headers() == {}


def test_the_tighter_limit_is_told_as_openai_tells_it() -> None:
    limiter = Limiter(Clock())
    who = caller(Limits(tokens_per_minute=60_000, requests_per_minute=60), Limits(tokens_per_minute=6_000))
    limiter.claim(who, 1_000)
    assert limiter.standing(who).headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5000",
        "x-ratelimit-reset-tokens": "10s",
    }


def test_how_many_more_requests_there_may_be_at_once_is_told() -> None:
    limiter = Limiter(Clock())
    who = caller(Limits(concurrency=3), Limits(concurrency=2))
    claim = limiter.claim(who, 10)
    told = {"x-ratelimit-limit-concurrency": "2", "x-ratelimit-remaining-concurrency": "1"}
    assert limiter.standing(who).headers() == told
    limiter.claim(who, 10)
    assert limiter.standing(who).headers()["x-ratelimit-remaining-concurrency"] == "0"
    claim.end()
    assert limiter.standing(who).headers() == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0ms"), (0.0001, "1ms"), (0.012, "12ms"), (1, "1s"), (1.2, "1.2s"), (60.5, "1m0.5s"), (360, "6m0s")],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
