"""Sums over rows: what progress, reports and the manifest tell."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from serving.threads import pool_seconds

LEAST_ROWS = 100


@dataclass(slots=True)
class Tally:
    """Sums over rows; two add up.

    ``replayed`` counts the rows among ``rows`` that came from the journal, ``prepared`` those whose prompt was made or
    could not be made, ``refused`` the latter: no engine ever saw them. ``ideal_tokens`` is what ``cached_tokens`` would
    be with a prefix cache that forgets nothing within a unit; ``twins`` are rows that took another's answer because
    their prompt and seeds were the same. ``stopped`` are samples that a stop token ended, which ``completion_tokens``
    leaves out. ``sum_logprob`` is that of all ``scored_tokens``, texts of ``scored_bytes``.
    ``cpu_seconds`` are the feeder's, by what it did.
    """

    rows: int = 0
    replayed: int = 0
    prepared: int = 0
    refused: int = 0
    errors: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped: int = 0
    scored_tokens: int = 0
    scored_bytes: int = 0
    sum_logprob: float = 0.0
    cached_tokens: int = 0
    ideal_tokens: int = 0
    twins: int = 0
    truncated: int = 0
    empty: int = 0
    repeated_ids: int = 0
    seconds: float = 0.0
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    error_codes: dict[str, int] = field(default_factory=dict)
    replicas: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Tally") -> "Tally":
        """Add ``other`` to this one."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, dict):
                for key, more in theirs.items():
                    mine[key] = mine.get(key, 0) + more
            else:
                setattr(self, f.name, mine + theirs)
        return self

    @property
    def error_share(self) -> float:
        """The share of error rows to expect: of refused rows among those prepared, plus of failed among those asked.

        The two run apart, since rows are prepared long before an engine has answered as many. A part with fewer than
        ``LEAST_ROWS`` tells nothing yet.
        """
        asked, failed = self.rows - self.refused, self.errors - self.refused
        shares = ((self.refused, self.prepared), (failed, asked))
        return sum(bad / of for bad, of in shares if of >= LEAST_ROWS)


def count(counts: dict[str, int], key: str) -> None:
    """One more of ``key``."""
    counts[key] = counts.get(key, 0) + 1


@contextmanager
def timed(tally: Tally, work: str) -> Iterator[None]:
    """Count the CPU time that this thread, and for ``tokenize`` the tokenizer's threads, use in the block."""

    def used() -> float:
        return time.thread_time() + (pool_seconds() if work == "tokenize" else 0.0)

    started = used()
    try:
        yield
    finally:
        tally.cpu_seconds[work] = tally.cpu_seconds.get(work, 0.0) + used() - started
