"""Sums over rows: what progress, reports and the manifest tell."""

from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class Tally:
    """Sums over rows; two add up. ``replayed`` counts the rows among ``rows`` that came from the journal."""

    rows: int = 0
    replayed: int = 0
    errors: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    truncated: int = 0
    empty: int = 0
    repeated_ids: int = 0
    seconds: float = 0.0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    error_codes: dict[str, int] = field(default_factory=dict)
    replicas: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Tally") -> "Tally":
        """Add ``other`` to this one."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, f.name, mine + theirs)
        return self


def count(counts: dict[str, int], key: str) -> None:
    """One more of ``key``."""
    counts[key] = counts.get(key, 0) + 1
