"""Batch rows make way for people."""

from hypothesis import given
from hypothesis import strategies as st

from serving.config import EngineConfig, RooflineConfig
from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY
from serving.simulated import Scheduler, Sequence
from serving.yielding import turn

COUNT = st.integers(0, 300)


@given(people=COUNT, rows=COUNT, beside=st.integers(0, 16), places=st.integers(2, 256), is_full=st.booleans())
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
        assert rows + now.beginning <= max(rows, places - 1)


def scheduler(beside: int | None, **told: int) -> Scheduler:
    """One without overhead."""
    roofline = RooflineConfig(step_overhead_seconds=0, **told)
    return Scheduler(
        EngineConfig(model="m", max_model_len=2_048, kind="simulated", roofline=roofline).roofline, beside=beside
    )


def sequence(tokens: int = 64, left: int = 20) -> Sequence:
    """A prompt and what is to be made of it."""
    import asyncio

    return Sequence([tokens] * tokens, left, None, asyncio.new_event_loop().create_future())


def steps(plan: Scheduler, count: int) -> None:
    """So many."""
    for _ in range(count):
        plan.step()
        plan.finish_step()


def test_rows_stand_still_while_a_person_is_served_and_go_on_where_they_were() -> None:
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


def test_without_people_ever_nothing_is_kept_free() -> None:
    plan = scheduler(beside=None, max_num_seqs=8)
    for _ in range(8):
        plan.add(sequence(), BATCH_PRIORITY)
    steps(plan, 1)
    assert len(plan.running) == 8


def test_a_place_is_kept_free_for_whoever_comes() -> None:
    plan = scheduler(beside=0, max_num_seqs=8)
    for _ in range(20):
        plan.add(sequence(), BATCH_PRIORITY)
    steps(plan, 1)
    assert len(plan.running) == 7
    person = sequence(left=1)
    plan.add(person, INTERACTIVE_PRIORITY)
    steps(plan, 1)
    assert person.done.done()


def test_a_row_waits_until_nobody_is_served() -> None:
    plan = scheduler(beside=0)
    person, row = sequence(left=3), sequence(left=1)
    plan.add(person, INTERACTIVE_PRIORITY)
    plan.add(row, BATCH_PRIORITY)
    steps(plan, 3)
    assert person.done.done()
    assert not row.done.done()
    steps(plan, 1)
    assert row.done.done()
