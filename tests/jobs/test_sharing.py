"""The ideal cached share against a count that knows nothing of trees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.sharing import ideal_cached_share

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12)


def counted(prompts: list[list[int]], size: int) -> float:
    """For each prompt the longest run of whole blocks that some earlier prompt holds whole."""
    hits = 0
    for at, prompt in enumerate(prompts):
        lengths = range((max(0, len(prompt) - 1) // size) * size, 0, -size)
        hits += next((n for n in lengths if any(p[:n] == prompt[:n] for p in prompts[:at])), 0)
    return hits / total if (total := sum(map(len, prompts))) else 0.0


@given(PROMPTS, st.integers(1, 5))
def test_it_is_what_counting_gives(prompts: list[list[int]], size: int) -> None:
    assert ideal_cached_share(prompts, size) == pytest.approx(counted(prompts, size))


def test_the_last_token_is_always_computed() -> None:
    assert ideal_cached_share([[1, 2, 3, 4]] * 2, 2) == 2 / 8
    assert ideal_cached_share([[1, 2, 3, 4, 5]] * 2, 2) == 4 / 10


def test_nothing_is_shared_by_nothing() -> None:
    assert ideal_cached_share([], 16) == 0.0
    assert ideal_cached_share([[], []], 16) == 0.0
