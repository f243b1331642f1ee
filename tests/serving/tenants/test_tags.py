"""Tags of batch rows, on a model of an engine that runs a few rows and takes the waiting one of the lowest priority."""

import heapq
import itertools
import random
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY
from serving.tenants.tags import Tag, Tags
from serving.tenants.terms import LEAST_WEIGHT, MOST_WEIGHT

SLOTS = 4
DEPTH = 8
"""Rows that wait of each tenant."""


class Engine:
    """Rows of each tenant that are expected to be of ``service``, by its weight; some turn out as ``true`` says."""

    def __init__(self, service: float = 100.0) -> None:
        self.tags = Tags()
        self.weights: dict[str, float] = {}
        self.true: dict[str, float] = {}
        self._service = service
        self._waiting: list[tuple[int, int, Tag]] = []
        self._running: deque[Tag] = deque()
        self._order = itertools.count()

    def serve(self, rows: int) -> Counter[str]:
        """Whose rows ended next, so many in all."""
        ended: Counter[str] = Counter()
        for _ in range(rows):
            self._fill()
            while len(self._running) < SLOTS:
                self._running.append(heapq.heappop(self._waiting)[2])
            tag = self._running.popleft()
            self.tags.close(tag, self.true.get(tag.tenant, tag.service))
            ended[tag.tenant] += 1
        return ended

    def _fill(self) -> None:
        for tenant, weight in self.weights.items():
            while sum(tag.tenant == tenant for _, _, tag in self._waiting) < DEPTH:
                tag = self.tags.open(tenant, self._service, weight=weight)
                heapq.heappush(self._waiting, (tag.priority, next(self._order), tag))


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 0.5, "b": 3.0, "c": 1.5}])
def test_rows_are_served_in_proportion_to_weights(weights: dict[str, float]) -> None:
    engine = Engine()
    engine.weights = weights
    ended = engine.serve(500)
    for tenant, weight in weights.items():
        assert ended[tenant] / 500 == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_a_tenant_pays_for_what_was_made_and_not_for_what_it_might_have_been() -> None:
    engine = Engine()
    engine.weights, engine.true = {"short": 1.0, "full": 1.0}, {"short": 10.0}
    engine.serve(2 * (DEPTH + SLOTS) * 10)  # Until the first rows are through, whose tags could not know it.
    ended = engine.serve(1_000)
    assert ended["short"] / ended["full"] == pytest.approx(10, rel=0.2)


def test_who_comes_later_is_owed_nothing_and_owes_nothing() -> None:
    engine = Engine()
    engine.weights = {"a": 1.0}
    engine.serve(50)
    engine.weights = {"a": 1.0, "b": 1.0}
    assert 14 <= engine.serve(40)["b"] <= 26


ROWS = st.tuples(st.sampled_from("abc"), st.integers(0, 10**6), st.floats(LEAST_WEIGHT, MOST_WEIGHT), st.floats(0, 1.0))


@given(st.lists(ROWS, max_size=50), st.randoms())
def test_priorities_are_never_better_than_a_persons_and_begin_anew_after_idleness(
    rows: list[tuple[str, int, float, float]], chance: random.Random
) -> None:
    tags = Tags()
    opened: list[tuple[Tag, float]] = []
    for tenant, service, weight, share in rows:
        opened.append((tags.open(tenant, service, weight=weight), share * service))
        while opened and chance.random() < 0.3:
            tags.close(*opened.pop(chance.randrange(len(opened))))
    assert all(INTERACTIVE_PRIORITY < BATCH_PRIORITY <= tag.priority < 2**63 for tag, _ in opened)
    for tag, made in opened:
        tags.close(tag, made)
    assert tags.open("a", 1).priority == BATCH_PRIORITY


@given(st.lists(st.tuples(st.integers(0, 1_000), st.floats(0, 1.0)), min_size=2, max_size=50), st.randoms())
def test_a_tenants_rows_keep_their_order(rows: list[tuple[int, float]], chance: random.Random) -> None:
    tags = Tags()
    opened: list[tuple[Tag, float]] = []
    latest = BATCH_PRIORITY
    for service, share in rows:
        opened.append((tags.open("a", service, weight=2.0), share * service))
        assert opened[-1][0].priority >= latest
        latest = opened[-1][0].priority
        if len(opened) > 1 and chance.random() < 0.5:  # One stays open, or all would begin anew.
            tags.close(*opened.pop(0))


def test_a_row_starts_when_those_before_it_have_had_their_share() -> None:
    tags = Tags()
    opened = [tags.open("a", 100, weight=2.0).priority for _ in range(4)]
    assert opened == [BATCH_PRIORITY + 50 * row for row in range(4)]


def test_what_was_given_up_costs_nobody_anything() -> None:
    tags = Tags()
    first, *others = [tags.open("a", 100) for _ in range(10)]
    for tag in others:
        tags.close(tag)
    assert tags.open("b", 100).priority == first.priority
    assert tags.open("a", 100).priority == others[-1].priority, "behind its own latest, no further"
