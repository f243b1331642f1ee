import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.lanes import Lanes, Ticket
from jobs.runner import route_of
from jobs.spec import JobSpec
from serving.protocol import EngineInfo

GROUPS = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), max_size=12)

EVEN = [1.0] * 2_000


def weights(rows: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(0.5, 2_000), min_size=rows, max_size=rows)


def groups_of(sizes: list[list[int]], first: int = 0) -> list[list[list[int]]]:
    rows = itertools.count(first)
    return [[[next(rows) for _ in range(size)] for size in group] for group in sizes]


def two_calls(lanes: Lanes) -> tuple[Ticket, Ticket]:
    """The first lane's next two."""
    first, second = lanes.take(0), lanes.take(0)
    assert first
    assert second
    return first, second


@given(st.lists(GROUPS, min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 3), st.data())
def test_every_row_is_taken_once_whoever_asks(
    units: list[list[list[int]]], count: int, window: int, data: st.DataObject
) -> None:
    now = itertools.count()
    lanes = Lanes(count, window, 8, clock=lambda: float(next(now)))
    for number, sizes in enumerate(units):
        lanes.add(number, groups_of(sizes), data.draw(weights(sum(map(sum, sizes)))))
    taken: dict[int, list[int]] = {number: [] for number in range(len(units))}
    flying: list[Ticket] = []
    idle = 0
    while idle < count or flying:
        lane = data.draw(st.integers(0, count - 1))
        ticket = lanes.take(lane) if idle < count else None
        if ticket is not None:
            taken[ticket.unit] += ticket.rows
            flying.append(ticket)
            assert sum(t.places for t in flying if t.lane == lane) < (4 * window + 1) * 8
            idle = 0
        elif flying:
            done = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            lanes.settle(done, answered=True, waiting=data.draw(st.integers(0, 40)))
            idle = 0
        else:
            idle += lane == idle
    for number, sizes in enumerate(units):
        assert sorted(taken[number]) == list(range(sum(map(sum, sizes))))


def test_a_group_stays_in_one_lane_in_order() -> None:
    lanes = Lanes(2, 8, 4)
    lanes.add(0, groups_of([[4, 4, 4], [4, 4, 4]]), EVEN)
    taken = [[ticket.rows[0] for _ in range(3) if (ticket := lanes.take(lane))] for lane in (0, 1)]
    assert taken == [[0, 4, 8], [12, 16, 20]]


def test_the_window_bounds_what_is_in_flight_and_follows_the_engines_queue() -> None:
    now = itertools.count()
    lanes = Lanes(1, 2, 4, clock=lambda: float(next(now)))
    lanes.add(0, groups_of([[4] * 100]), EVEN)
    first, second = two_calls(lanes)
    assert lanes.take(0) is None
    lanes.settle(first, answered=True, waiting=0)
    lanes.settle(first, answered=True, waiting=0)
    more = [lanes.take(0), lanes.take(0)]
    assert all(more), "nothing waited in the engine: three may fly"
    assert lanes.take(0) is None
    lanes.settle(second, answered=True, waiting=100)
    assert lanes.take(0) is None, "much waited: two are enough"


def test_the_places_of_rows_that_are_answered_are_given_to_others() -> None:
    now = itertools.count()
    lanes = Lanes(1, 2, 4, clock=lambda: float(next(now)))
    lanes.add(0, groups_of([[4] * 10]), EVEN)
    first, second = two_calls(lanes)
    lanes.lighten(first, 0.5)
    assert lanes.take(0), "two of eight places are free"
    assert lanes.take(0) is None
    lanes.lighten(first, 0.25)
    lanes.lighten(second, 0.25)
    assert lanes.take(0), "six places are taken"
    assert lanes.take(0) is None
    for ticket in (first, first, second):
        lanes.settle(ticket, answered=True)
    lanes.lighten(first, 0.0)
    assert lanes.take(0) is None, "the later two have all eight, no place was given back twice"


def test_the_last_rows_of_a_lane_do_not_wait_for_one_that_runs_on() -> None:
    now = 0.0
    lanes = Lanes(1, 2, 64, clock=lambda: now)
    lanes.add(0, groups_of([[64, 64, 3]]), [0.1] * 131)
    first, _ = two_calls(lanes)
    now = 1.0
    lanes.lighten(first, 1 / 64)
    last = lanes.take(0)
    assert last
    assert len(last.rows) == 3


@pytest.mark.parametrize(
    ("rows", "n", "replicas"), [(164, 200, 8), (64, 16, 8), (10, 100, 8), (3_000, 1, 100), (7, 1, 8)]
)
def test_a_small_job_has_something_for_every_replica(rows: int, n: int, replicas: int) -> None:
    spec = JobSpec(input="", output="", n=n, temperature=1.0)
    route, _ = route_of(replicas, EngineInfo("vllm", "", 2_048, 256, 16, 117_000), spec, rows=rows, units=1)
    lanes = Lanes(replicas, route.window, route.batch_rows, n=n, room=route.room)
    size = route.batch_rows
    lanes.add(0, groups_of([[min(size, rows - at) for at in range(0, rows, size)]]), [1.0] * rows)
    taken = [len(ticket.rows) for lane in range(replicas) if (ticket := lanes.take(lane))]
    assert len(taken) == min(rows, replicas)
    assert max(taken) * replicas <= rows + 4 * replicas
    assert route.window * route.batch_rows * n >= 512


def test_small_calls_fill_a_window_as_well() -> None:
    lanes = Lanes(1, 2, 8)
    for unit in range(30):
        lanes.add(unit, [[[0, 1]]], [1.0, 1.0])
    taken = list(iter(lambda: lanes.take(0), None))
    assert len(taken) == 8, "16 rows, two of each unit"
    lanes.settle(taken[0], answered=True)
    assert lanes.take(0)
    assert lanes.take(0) is None


@pytest.mark.parametrize(("room", "calls"), [(1_000_000.0, 10), (200.0, 5), (1.0, 2)])
def test_windows_begin_no_larger_than_there_is_room_for(room: float, calls: int) -> None:
    lanes = Lanes(2, 10, 4, room=room)
    lanes.add(0, groups_of([[4]] * 100), [10.0] * 400)
    for lane in (0, 1):
        assert len(list(iter(lambda lane=lane: lanes.take(lane), None))) == calls  # type: ignore[misc]
    lanes.widen(3)
    assert len(list(iter(lambda: lanes.take(2), None))) == calls


def test_lanes_that_come_later_take_from_the_others() -> None:
    lanes = Lanes(1, 2, 4)
    lanes.add(0, groups_of([[4] * 10]), EVEN)
    first = [lanes.take(0), lanes.take(0)]
    assert lanes.take(0) is None
    lanes.widen(2)
    assert len(lanes) == 2
    later = [lanes.take(1), lanes.take(1)]
    assert [ticket.rows[0] for ticket in [*first, *later] if ticket] == [0, 4, 36, 32]
    lanes.add(1, groups_of([[4], [4]], first=0), EVEN)
    assert lanes.drop(0) == 24
    for ticket in [*first, *later]:
        assert ticket
        lanes.settle(ticket, answered=True)
    assert [taken.unit for lane in (0, 1) if (taken := lanes.take(lane))] == [1, 1]


def test_a_fast_engine_gets_several_micro_batches_in_one_call() -> None:
    now = 0.0
    lanes = Lanes(1, 1, 8, clock=lambda: now)
    lanes.add(0, groups_of([[8] * 200]), EVEN)
    sizes = []
    for _ in range(4):
        ticket = lanes.take(0)
        assert ticket
        assert ticket.rows == sorted(ticket.rows)
        sizes.append(len(ticket.rows))
        now += 0.01
        lanes.settle(ticket, answered=True)
    assert sizes[0] == 8
    assert sizes[-1] > 100


def test_what_waits_of_a_dropped_unit_is_forgotten() -> None:
    lanes = Lanes(2, 1, 4)
    lanes.add(0, groups_of([[4, 4, 4]]), EVEN)
    assert lanes.take(0)
    assert lanes.drop(0) == 8
    assert lanes.take(1) is None


@pytest.mark.parametrize("silent", [0, 1])
@pytest.mark.parametrize("speeds", [[1, 1, 1, 1, 2, 2, 4, 4], [3, 5, 7, 8, 10, 11, 12, 13], [10] * 8])
def test_replicas_of_unequal_speed_end_together(speeds: list[int], silent: int) -> None:
    """A fluid model: a replica answers its micro-batches in turn, ``speed`` rows a second; the clock is the model's.

    A replica that is ``silent`` was never there to be asked.
    """
    now = 0.0
    lanes = Lanes(len(speeds) + silent, 4, 64, clock=lambda: now)
    rows = sum(speeds) * 1_000
    lanes.add(0, groups_of([[64] * (rows // 64)]), [1.0] * rows)
    free, ends = [0.0] * len(speeds), [0.0] * len(speeds)
    flying: list[tuple[float, int, Ticket]] = []
    order = itertools.count()
    while True:
        while found := [t for lane in range(len(speeds)) if (t := lanes.take(lane))]:
            for ticket in found:
                free[ticket.lane] = max(free[ticket.lane], now) + len(ticket.rows) / speeds[ticket.lane]
                heapq.heappush(flying, (free[ticket.lane], next(order), ticket))
        if not flying:
            break
        now, _, ticket = heapq.heappop(flying)
        ends[ticket.lane] = now
        waiting = sum(len(t.rows) for _, _, t in flying if t.lane == ticket.lane)
        lanes.settle(ticket, answered=True, waiting=max(0, waiting - 64))
    assert max(ends) - min(ends) <= 0.02 * max(ends)
    assert max(ends) <= 1.02 * rows / sum(speeds)


def test_an_input_in_its_own_order_is_dealt_by_stretches() -> None:
    lanes = Lanes(2, 100, 4)
    lanes.add(0, [[[row, row + 1] for row in range(0, 16, 2)]], [1.0, 9.0] * 8)
    taken = [[row for _ in range(2) if (t := lanes.take(lane)) for row in t.rows] for lane in (0, 1)]
    assert sorted(taken) == [list(range(8)), list(range(8, 16))]


def test_a_group_whose_end_is_heavier_is_worked_off_from_there() -> None:
    lanes = Lanes(1, 100, 4)
    lanes.add(0, groups_of([[4] * 5]), [1.0] * 16 + [9.0] * 4)
    taken = [ticket.rows for _ in range(5) if (ticket := lanes.take(0))]
    assert taken == [[at, at + 1, at + 2, at + 3] for at in (16, 12, 8, 4, 0)]


def test_a_lane_begins_with_its_heaviest_rows() -> None:
    lanes = Lanes(1, 100, 4)
    heavy = [1.0] * 8 + [9.0] * 4 + [5.0] * 4
    lanes.add(0, groups_of([[4], [4], [4], [4]]), heavy)
    taken = [ticket.rows[0] for _ in range(4) if (ticket := lanes.take(0))]
    assert taken[:2] == [8, 12]
    assert sorted(taken[2:]) == [0, 4]
