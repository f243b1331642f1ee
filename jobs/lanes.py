"""Which micro-batch goes to which replica next: neighbours to one replica, idle replicas help, all end together.

Every unit's groups of micro-batches, which share prompts within but not between them, are dealt to one lane a replica.
A lane works off its own groups, oldest unit first, and takes from another lane's end when it has none. No I/O.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SMALLEST = 8
"""Completions of a micro-batch at least, when the last ones are cut smaller so that all replicas end together."""

MOST_WINDOWS = 4
"""Times its first size that a lane's window may grow to."""

LARGEST = 512
CALL_SECONDS = 0.25
"""A call carries several micro-batches, up to ``LARGEST`` completions, where an engine does them in less time."""

ROUNDING = 1e-6
"""Sums of weights are as exact as that: by less no row shall be left behind."""

MEMORY_SECONDS = 60.0
"""How far back a lane's speed is measured, weights falling with e."""

Batch = list[int]


@dataclass(slots=True)
class Ticket:
    """A micro-batch that a lane has taken: rows of a unit and what they weigh, until ``Lanes.settle``.

    Of the lane's window it takes the places of so many rows. The share ``left`` of it is in flight.
    """

    lane: int
    unit: int
    rows: Batch
    weight: float
    places: int
    left: float = 1.0
    open: bool = True

    def places_of(self, share: float) -> int:
        """The places that a share of it takes."""
        return math.ceil(round(self.places * share, 6))


@dataclass(slots=True)
class _Lane:
    """What is in flight to a replica, and its speed in weight a second.

    A ``window`` of so many micro-batches is full when their ``places`` are taken.
    """

    window: int
    calls: int = 0
    places: int = 0
    weight: float = 0.0
    done: float = 0.0
    seconds: float = 0.0
    since: float = 0.0

    def measure(self, now: float, weight: float) -> None:
        """Count what was answered since the last time."""
        passed, self.since = max(0.0, now - self.since), now
        fade = math.exp(-passed / MEMORY_SECONDS)
        self.done, self.seconds = self.done * fade + weight, self.seconds * fade + passed

    def left(self, now: float) -> float:
        """The weight in flight that is still to be done, by its speed since the last answer."""
        return max(0.0, self.weight - self.speed * (now - self.since)) if self.calls else 0.0

    @property
    def speed(self) -> float:
        """Weight a second while it had any; 0 before the first answer."""
        return self.done / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Queue:
    """A unit's micro-batches that wait, by lane, and what each of its rows weighs."""

    unit: int
    weights: Sequence[float]
    runs: list[deque[Batch]] = field(default_factory=list)

    def weigh(self, rows: Batch) -> float:
        """What rows of the unit weigh together."""
        return sum(self.weights[row] for row in rows)


class Lanes:
    """``count`` lanes of at first ``window`` calls in flight, each of micro-batches of at most ``batch_rows`` rows.

    A row weighs what it costs an engine, in any unit: tokens to compute, say; of each row it makes ``n`` completions.
    Where so many calls of the first unit's rows would weigh more than ``room``, windows begin smaller, with two at
    least. Of units with few rows for a lane a window holds more calls.
    """

    def __init__(
        self,
        count: int,
        window: int,
        batch_rows: int,
        *,
        n: int = 1,
        room: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes = [_Lane(window) for _ in range(count)]
        self._first, self._most = window, MOST_WINDOWS * window
        self._batch_rows, self._n = batch_rows, n
        self._smallest, self._largest = max(1, SMALLEST // n), LARGEST // n
        self._room_at_first = room
        self._queues: dict[int, _Queue] = {}
        self._waiting = self._added = 0.0
        self._added_rows = 0
        self._clock = clock

    def __len__(self) -> int:
        return len(self._lanes)

    def add(self, unit: int, groups: Sequence[Sequence[Batch]], weights: Sequence[float]) -> None:
        """Deal a unit's groups, the heaviest first, each to the lane that has the least of the unit.

        A group of more than a lane's share is cut between micro-batches. A lane begins with its heaviest rows, so that
        the last ones to end are light. ``weights`` has one of each row that the groups name, at its index.
        """
        queue = _Queue(unit, weights, [deque() for _ in self._lanes])
        weighed = [[(batch, queue.weigh(batch)) for batch in group] for group in groups]
        total = sum(weight for group in weighed for _, weight in group)
        pieces = [piece for group in weighed for piece in _pieces(group, total / max(1, len(self._lanes)))]
        dealt: list[list[_Piece]] = [[] for _ in self._lanes]
        loads = [0.0] * len(self._lanes)
        for piece in sorted(pieces, key=lambda piece: -piece.weight):
            lane = loads.index(min(loads))
            dealt[lane].append(piece)
            loads[lane] += piece.weight
        for run, own in zip(queue.runs, dealt, strict=True):
            for piece in sorted(own, key=lambda piece: -piece.weight / piece.rows):
                run.extend(reversed(piece.batches) if piece.is_heavier_later else piece.batches)
        if pieces:
            self._queues[unit] = queue
        self._waiting += total
        if not self._added_rows and total:
            self._narrow(total / sum(piece.rows for piece in pieces))
        self._added += total
        self._added_rows += sum(piece.rows for piece in pieces)

    def widen(self, count: int) -> None:
        """Have ``count`` lanes from now on, where there were fewer; the new ones take from the others' ends."""
        more = range(len(self._lanes), count)
        self._lanes += [_Lane(self._first) for _ in more]
        for queue in self._queues.values():
            queue.runs += [deque() for _ in more]

    def _narrow(self, row: float) -> None:
        """Let windows begin with no more than there is room for, where a row weighs so much."""
        fitting = self._room_at_first / (row * self._batch_rows)
        if fitting < self._first:
            self._first = max(2, math.ceil(fitting))
            for lane in self._lanes:
                lane.window = self._first

    def take(self, lane: int) -> Ticket | None:
        """The lane's next micro-batch; None when its window is full, nothing waits, or others will be sooner done."""
        state = self._lanes[lane]
        if state.places >= state.window * self._batch_rows or (found := self._own(lane) or self._other()) is None:
            return None
        queue, run, last = found
        row = self._added / self._added_rows
        call = max(self._batch_rows, min(self._largest, int(state.speed * CALL_SECONDS / row)))
        room = self._room(state, call * row, self._smallest * row)
        if room <= 0:
            return None
        batch = run.pop() if last else run.popleft()
        weight = queue.weigh(batch)
        while run and len(batch) + len(more := run[-1 if last else 0]) <= call:
            if weight + queue.weigh(more) > room:
                break
            batch = run.pop() + batch if last else batch + run.popleft()
            weight += queue.weigh(more)
        fitting = min(call, _fitting(queue, batch, room, self._smallest))
        if fitting < len(batch):
            (run.append if last else run.appendleft)(batch[fitting:])
            batch = batch[:fitting]
            weight = queue.weigh(batch)
        if not any(queue.runs):
            del self._queues[queue.unit]
        self._waiting -= weight
        if not state.calls:
            state.since = self._clock()
        state.calls, state.weight = state.calls + 1, state.weight + weight
        # What is cut near the job's end counts whole: the less is in flight then, the better it can be dealt.
        places = self._batch_rows if run else min(len(batch), self._batch_rows)
        state.places += places
        return Ticket(lane, queue.unit, batch, weight, places)

    def _own(self, lane: int) -> tuple[_Queue, deque[Batch], bool] | None:
        return next(((q, q.runs[lane], False) for q in self._queues.values() if q.runs[lane]), None)

    def _other(self) -> tuple[_Queue, deque[Batch], bool] | None:
        """The end of the longest run of the oldest unit that waits."""
        queue = next(iter(self._queues.values()), None)
        return None if queue is None else (queue, max(queue.runs, key=len), True)

    def _room(self, state: _Lane, call: float, smallest: float) -> float:
        """Weight that the lane may take: any, until so little is left that a slow one would be late with it.

        A lane that has answered nothing yet is thought to be as fast as the others in the mean.
        """
        now, speeds = self._clock(), [lane.speed for lane in self._lanes if lane.speed]
        flying = sum(lane.left(now) for lane in self._lanes)
        if not speeds or self._waiting > 2 * flying + call:
            return math.inf
        mean = sum(speeds) / len(speeds)
        seconds = (self._waiting + flying) / (mean * len(self._lanes))
        left = state.left(now)
        fair = seconds * (state.speed or mean) - left
        return fair if fair >= min(smallest, self._waiting) * (1 - ROUNDING) else 0.0 if left else smallest

    def lighten(self, ticket: Ticket, left: float) -> None:
        """Give the places of rows back that are answered; the share ``left`` of the micro-batch is in flight still."""
        if ticket.open:
            self._give_back(ticket, left, answered=True)

    def settle(self, ticket: Ticket, *, answered: bool, waiting: int | None = None) -> None:
        """Give all of a micro-batch's places in the window back, once.

        ``waiting`` completions in the engine's queue say whether it has enough to do: the window grows while fewer than
        a micro-batch's wait, and shrinks while more than those of three do.
        """
        if not ticket.open:
            return
        ticket.open = False
        self._give_back(ticket, 0.0, answered=answered)
        state = self._lanes[ticket.lane]
        state.calls -= 1
        if waiting is None:
            return
        if waiting < self._batch_rows * self._n:
            state.window = min(state.window + 1, self._most)
        elif waiting > 3 * self._batch_rows * self._n:
            state.window = max(state.window - 1, 2)

    def _give_back(self, ticket: Ticket, left: float, *, answered: bool) -> None:
        state, weight = self._lanes[ticket.lane], ticket.weight * (ticket.left - left)
        state.measure(self._clock(), weight if answered else 0.0)
        state.weight -= weight
        state.places -= ticket.places_of(ticket.left) - ticket.places_of(left)
        ticket.left = left

    def drop(self, unit: int) -> int:
        """Forget what waits of a unit; returns how many rows."""
        queue = self._queues.pop(unit, None)
        if queue is None:
            return 0
        left = [row for run in queue.runs for batch in run for row in batch]
        self._waiting -= queue.weigh(left)
        return len(left)


@dataclass(slots=True)
class _Piece:
    """Micro-batches that stay together."""

    batches: list[Batch] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    rows: int = 0
    weight: float = 0.0

    def add(self, batch: Batch, weight: float) -> None:
        """One more."""
        self.batches.append(batch)
        self.weights.append(weight)
        self.rows += len(batch)
        self.weight += weight

    @property
    def is_heavier_later(self) -> bool:
        """Whether its rows weigh more towards its end: backwards too, neighbours follow each other."""
        middle = len(self.batches) // 2
        first, last = (sum(map(len, half)) for half in (self.batches[:middle], self.batches[middle:]))
        return middle > 0 and sum(self.weights[middle:]) / last > sum(self.weights[:middle]) / first


def _pieces(group: Sequence[tuple[Batch, float]], most: float) -> list[_Piece]:
    """A group of weighed micro-batches cut into pieces that weigh ``most`` at most, or are one micro-batch."""
    pieces: list[_Piece] = []
    for batch, weight in group:
        if not pieces or pieces[-1].weight + weight > most:
            pieces.append(_Piece())
        pieces[-1].add(batch, weight)
    return pieces


def _fitting(queue: _Queue, batch: Batch, room: float, smallest: int) -> int:
    """How many of a micro-batch's first rows weigh no more than ``room``, ``smallest`` at least."""
    total = 0.0
    for count, row in enumerate(batch):
        total += queue.weights[row]
        if total > room * (1 + ROUNDING) and count >= smallest:
            return count
    return len(batch)
