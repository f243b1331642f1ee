"""Are spanfill's outputs those of bare vLLM, row for row, given the same prompts? In float32, greedy."""

from dataclasses import asdict, dataclass, field
from typing import Any

PAIR = ("vllm-aligned", "spanfill")
"""Both are given the prompts that spanfill makes by default."""


@dataclass(frozen=True)
class Comparison:
    """Rows compared, those that differ, those that only one has."""

    compared: int
    unequal: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether there were rows and all of them agree."""
        return bool(self.compared) and not self.unequal and not self.missing

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(left: dict[int, list[int]], right: dict[int, list[int]]) -> Comparison:
    """Compare output token ids by row."""
    both = sorted(left.keys() & right.keys())
    return Comparison(len(both), [row for row in both if left[row] != right[row]], sorted(left.keys() ^ right.keys()))
