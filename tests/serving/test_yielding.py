"""Batch rows make way for people."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batching import Scheduler, Sequence
from serving.config import EngineConfig, RooflineConfig
from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY
from serving.yielding import turn

COUNT = st.integers(0, 300)
MakeSequence = Callable[..., Sequence]


@given(people=COUNT, rows=COUNT, beside=st.integers(0, 16), places=st.integers(1, 256), is_full=st.booleans())
def test_rows_beside_people_never_exceed_what_they_may(
    people: int, rows: int, beside: int, places: int, is_full: bool
) -> None:
    now = turn(people=people, rows=rows, beside=beside, places=places, is_full=is_full)
    assert 0 <= now.going <= rows
    assert now.beginning >= 0
    if people:
        assert now.going + now.beginning <= max(rows and now.going, beside)
    else:
        assert now.going == rows
        assert rows + now.beginning <= max(rows, places - 1, 1)


def scheduler(beside: int | None, **told: int) -> Scheduler:
    """One without overhead."""
    roofline = RooflineConfig(step_overhead_seconds=0, **told)
    return Scheduler(
        EngineConfig(model="m", max_model_len=2_048, kind="simulated", roofline=roofline).roofline, beside=beside
    )


@pytest.fixture(scope="module")
def sequence() -> Iterator[MakeSequence]:
    """A prompt of so many tokens and what is to be made of it; different numbers share nothing."""
    loop = asyncio.new_event_loop()

    def make(tokens: int = 64, left: int = 20, number: int = 0) -> Sequence:
        return Sequence([number] * tokens, left, None, loop.create_future())

    yield make
    loop.close()


def steps(plan: Scheduler, count: int) -> None:
    """So many."""
    for _ in range(count):
        plan.step()
        plan.finish_step()


def taken(plan: Scheduler) -> list[float]:
    """The seconds of each step until everything is done."""
    seconds = []
    while plan.busy:
        seconds.append(plan.step())
        plan.finish_step()
        assert len(seconds) < 50_000
    return seconds


def test_rows_stand_still_while_a_person_is_served_and_go_on_where_they_were(sequence: MakeSequence) -> None:
    plan = scheduler(beside=1)
    rows = [sequence() for _ in range(4)]
    for row in rows:
        plan.add(row, BATCH_PRIORITY)
    steps(plan, 5)
    assert [row.made for row in rows] == [5, 5, 5, 5]
    person = sequence(left=6)
    plan.add(person, INTERACTIVE_PRIORITY)
    steps(plan, 6)
    assert person.done.done()
    assert [row.made for row in rows] == [11, 5, 5, 5]
    steps(plan, 1)
    assert [row.made for row in rows] == [12, 6, 6, 6]


def test_without_people_ever_nothing_is_kept_free(sequence: MakeSequence) -> None:
    plan = scheduler(beside=None, max_num_seqs=8)
    for _ in range(8):
        plan.add(sequence(), BATCH_PRIORITY)
    steps(plan, 1)
    assert len(plan.running) == 8


def test_a_place_is_kept_free_for_whoever_comes(sequence: MakeSequence) -> None:
    plan = scheduler(beside=0, max_num_seqs=8)
    for _ in range(20):
        plan.add(sequence(), BATCH_PRIORITY)
    steps(plan, 1)
    assert len(plan.running) == 7
    person = sequence(left=1)
    plan.add(person, INTERACTIVE_PRIORITY)
    steps(plan, 1)
    assert person.done.done()


def test_an_engine_of_one_place_serves_jobs_too(sequence: MakeSequence) -> None:
    plan = scheduler(beside=1, max_num_seqs=1)
    row = sequence(left=3)
    plan.add(row, BATCH_PRIORITY)
    steps(plan, 3)
    assert row.done.done()


def test_a_row_waits_until_nobody_is_served(sequence: MakeSequence) -> None:
    plan = scheduler(beside=0)
    person, row = sequence(left=3), sequence(left=1)
    plan.add(person, INTERACTIVE_PRIORITY)
    plan.add(row, BATCH_PRIORITY)
    steps(plan, 3)
    assert person.done.done()
    assert not row.done.done()
    steps(plan, 1)
    assert row.done.done()


def test_rows_leave_where_people_would_find_no_place_and_are_done_later(sequence: MakeSequence) -> None:
    plan = scheduler(beside=1, max_num_seqs=8)
    rows, people = [sequence(left=30) for _ in range(20)], [sequence(left=4) for _ in range(6)]
    for row in rows:
        plan.add(row, BATCH_PRIORITY)
    steps(plan, 5)
    begun = list(plan.running)
    for person in people:
        plan.add(person, INTERACTIVE_PRIORITY)
    steps(plan, 1)
    assert set(plan.running) == {*people, *begun[:2]}
    steps(plan, 3)
    assert all(person.done.done() for person in people)
    assert [row.made for row in begun] == [9, *[5] * 6]
    taken(plan)
    assert [row.made for row in rows] == [30] * 20


def test_rows_leave_where_people_would_find_no_room(sequence: MakeSequence) -> None:
    plan = scheduler(beside=0, kv_cache_tokens=1_000)
    rows, person = [sequence(left=36, number=n) for n in range(20)], sequence(tokens=400, left=100, number=99)
    for row in rows:
        plan.add(row, BATCH_PRIORITY)
    steps(plan, 5)
    assert len(plan.running) > 7
    plan.add(person, INTERACTIVE_PRIORITY)
    steps(plan, 100)
    assert person.done.done()
    taken(plan)
    assert [row.made for row in rows] == [36] * 20


ARRIVAL = st.tuples(st.booleans(), st.integers(1, 120), st.integers(1, 20), st.integers(0, 5))


@given(beside=st.integers(0, 3), arrivals=st.lists(ARRIVAL, max_size=25))
def test_whoever_comes_whenever_all_are_served(
    sequence: MakeSequence, beside: int, arrivals: list[tuple[bool, int, int, int]]
) -> None:
    plan = scheduler(beside=beside, max_num_seqs=4, kv_cache_tokens=256, max_num_batched_tokens=64)
    came = []
    for number, (is_person, tokens, left, pause) in enumerate(arrivals):
        came.append((sequence(tokens, left, number), left))
        plan.add(came[-1][0], INTERACTIVE_PRIORITY if is_person else BATCH_PRIORITY)
        steps(plan, pause)
    taken(plan)
    assert all(s.done.done() and s.made == left for s, left in came)
    assert plan.used_tokens == 0


def test_whoever_comes_never_waits_for_a_long_step_and_rows_lose_little_by_that(sequence: MakeSequence) -> None:
    seconds: dict[int | None, list[float]] = {}
    for beside in (None, 4):
        plan = scheduler(beside=beside)
        for number in range(300):
            plan.add(sequence(tokens=1_000, left=64, number=number), BATCH_PRIORITY)
        seconds[beside] = taken(plan)
    assert max(seconds[None]) > 0.1
    assert max(seconds[4]) < 0.02
    assert sum(seconds[4]) < 1.1 * sum(seconds[None])
