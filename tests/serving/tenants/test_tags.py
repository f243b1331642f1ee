"""Tags of batch rows, on a model of an engine that runs a few rows and takes the waiting one of the lowest priority."""

import heapq
import itertools
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY
from serving.tenants.tags import MOST_PRIORITY, Tags

SLOTS = 4
DEPTH = 8
"""Rows that wait of each tenant."""


class Engine:
    """Rows of so many tokens of each tenant, by its weight."""

    def __init__(self, tokens: int = 100) -> None:
        self.tags = Tags()
        self.weights: dict[str, float] = {}
        self._tokens = tokens
        self._waiting: list[tuple[int, int, str]] = []
        self._running: deque[tuple[int, int, str]] = deque()
        self._order = itertools.count()

    def serve(self, rows: int) -> Counter[str]:
        """Whose rows ended next, so many in all."""
        ended: Counter[str] = Counter()
        for _ in range(rows):
            self._fill()
            while len(self._running) < SLOTS:
                self._running.append(heapq.heappop(self._waiting))
            priority, _, tenant = self._running.popleft()
            self.tags.close(priority)
            ended[tenant] += 1
        return ended

    def _fill(self) -> None:
        for tenant, weight in self.weights.items():
            while sum(other == tenant for _, _, other in self._waiting) < DEPTH:
                priority = self.tags.open(tenant, self._tokens, weight=weight)
                heapq.heappush(self._waiting, (priority, next(self._order), tenant))


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 0.5, "b": 3.0, "c": 1.5}])
def test_rows_are_served_in_proportion_to_weights(weights: dict[str, float]) -> None:
    engine = Engine()
    engine.weights = weights
    ended = engine.serve(500)
    for tenant, weight in weights.items():
        assert ended[tenant] / 500 == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_who_comes_later_is_owed_nothing_and_owes_nothing() -> None:
    engine = Engine()
    engine.weights = {"a": 1.0}
    engine.serve(50)
    engine.weights = {"a": 1.0, "b": 1.0}
    assert 14 <= engine.serve(40)["b"] <= 26


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**6), st.floats(0.01, 100), st.booleans()), max_size=50)
)
def test_priorities_are_never_better_than_a_persons_and_begin_anew_after_idleness(
    rows: list[tuple[str, int, float, bool]],
) -> None:
    tags = Tags()
    opened = [tags.open(tenant, tokens, weight=weight) for tenant, tokens, weight, _ in rows]
    assert all(INTERACTIVE_PRIORITY < BATCH_PRIORITY <= priority <= MOST_PRIORITY for priority in opened)
    for priority, (_, _, _, served) in zip(opened, rows, strict=True):
        tags.close(priority, served=served)
    assert tags.open("a", 1) == BATCH_PRIORITY


def test_a_tenants_rows_keep_their_order() -> None:
    tags = Tags()
    opened = [tags.open("a", 100, weight=2.0) for _ in range(4)]
    assert opened == [BATCH_PRIORITY + 50 * row for row in range(4)]


def test_what_was_given_up_moves_nobody_back() -> None:
    tags = Tags()
    first, *others = [tags.open("a", 100) for _ in range(10)]
    for priority in others:
        tags.close(priority, served=False)
    assert tags.open("b", 100) == first


def test_no_weight_is_too_small() -> None:
    tags = Tags()
    tags.open("a", 10**6, weight=1e-300)
    assert tags.open("a", 1) == MOST_PRIORITY
