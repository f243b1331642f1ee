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
"""Rows of a micro-batch at least, when the last ones are cut smaller so that all replicas end together."""

MOST_WINDOWS = 4
"""Times its first size that a lane's window may grow to."""

LARGEST = 512
CALL_SECONDS = 0.25
"""A call carries several micro-batches, up to ``LARGEST`` rows, where an engine does them in less time than this."""

MEMORY_SECONDS = 60.0
"""How far back a lane's speed is measured, weights falling with e."""

Batch = list[int]


@dataclass(slots=True)
class Ticket:
    """A micro-batch that a lane has taken: rows of a unit, until ``Lanes.settle``."""

    lane: int
    unit: int
    rows: Batch
    open: bool = True


@dataclass(slots=True)
class _Lane:
    window: int
    calls: int = 0
    rows: int = 0
    done: float = 0.0
    seconds: float = 0.0
    since: float = 0.0

    def measure(self, now: float, rows: int) -> None:
        """Count rows that were answered since the last time."""
        passed, self.since = max(0.0, now - self.since), now
        fade = math.exp(-passed / MEMORY_SECONDS)
        self.done, self.seconds = self.done * fade + rows, self.seconds * fade + passed

    def left(self, now: float) -> float:
        """Rows of those in flight that are still to be done, by its speed since the last answer."""
        return max(0.0, self.rows - self.speed * (now - self.since)) if self.rows else 0.0

    @property
    def speed(self) -> float:
        """Rows a second while it had any; 0 before the first answer."""
        return self.done / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Queue:
    """A unit's micro-batches that wait, by lane."""

    unit: int
    runs: list[deque[Batch]] = field(default_factory=list)


class Lanes:
    """``count`` lanes of at first ``window`` calls in flight, each of micro-batches of at most ``batch_rows`` rows."""

    def __init__(
        self, count: int, window: int, batch_rows: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lanes = [_Lane(window) for _ in range(count)]
        self._most = MOST_WINDOWS * window
        self._batch_rows = batch_rows
        self._queues: dict[int, _Queue] = {}
        self._waiting = 0
        self._clock = clock

    def __len__(self) -> int:
        return len(self._lanes)

    def add(self, unit: int, groups: Sequence[Sequence[Batch]]) -> None:
        """Deal a unit's groups, the largest first, each to the lane that has the fewest rows of the unit.

        A group of more than a lane's share is cut between micro-batches.
        """
        total = sum(len(batch) for group in groups for batch in group)
        share = max(1, math.ceil(total / len(self._lanes)))
        runs: list[deque[Batch]] = [deque() for _ in self._lanes]
        rows = [0] * len(runs)
        pieces = [piece for group in groups for piece in _pieces(group, share)]
        for piece in sorted(pieces, key=lambda piece: -sum(map(len, piece))):
            lane = rows.index(min(rows))
            runs[lane].extend(piece)
            rows[lane] += sum(map(len, piece))
        self._queues[unit] = _Queue(unit, runs)
        self._waiting += total

    def take(self, lane: int) -> Ticket | None:
        """The lane's next micro-batch; None when its window is full, nothing waits, or others will be sooner done."""
        state = self._lanes[lane]
        if state.calls >= state.window or not self._waiting:
            return None
        room = self._room(state)
        found = self._own(lane) or self._other()
        if room <= 0 or found is None:
            return None
        queue, run, last = found
        batch = run.pop() if last else run.popleft()
        while run and len(batch) + len(run[-1 if last else 0]) <= room:
            batch = run.pop() + batch if last else batch + run.popleft()
        if room < len(batch):
            (run.append if last else run.appendleft)(batch[room:])
            batch = batch[:room]
        self._waiting -= len(batch)
        if not state.calls:
            state.since = self._clock()
        state.calls, state.rows = state.calls + 1, state.rows + len(batch)
        return Ticket(lane, queue.unit, batch)

    def _own(self, lane: int) -> tuple[_Queue, deque[Batch], bool] | None:
        return next(((q, q.runs[lane], False) for q in self._queues.values() if q.runs[lane]), None)

    def _other(self) -> tuple[_Queue, deque[Batch], bool] | None:
        """The end of the longest run of the oldest unit that has any left."""
        for queue in self._queues.values():
            run = max(queue.runs, key=len)
            if run:
                return queue, run, True
        return None

    def _room(self, state: _Lane) -> int:
        """Rows that the lane may take: a call's, until so few are left that a slow one would be late with them."""
        now, speeds = self._clock(), [lane.speed for lane in self._lanes]
        call = max(self._batch_rows, min(LARGEST, int(state.speed * CALL_SECONDS)))
        flying = sum(lane.left(now) for lane in self._lanes)
        if not all(speeds) or self._waiting > 2 * flying + call:
            return call
        seconds = (self._waiting + flying) / sum(speeds)
        fair = int(seconds * state.speed - state.left(now))
        if fair >= SMALLEST:
            return min(fair, call)
        return 0 if state.rows else SMALLEST

    def settle(self, ticket: Ticket, *, answered: bool, waiting: int | None = None) -> None:
        """Give a micro-batch's place in the window back, once.

        ``waiting`` rows in the engine's queue say whether it has enough to do: the window grows while fewer than a
        micro-batch wait, and shrinks while more than three do.
        """
        if not ticket.open:
            return
        ticket.open = False
        state = self._lanes[ticket.lane]
        state.measure(self._clock(), len(ticket.rows) if answered else 0)
        state.calls, state.rows = state.calls - 1, state.rows - len(ticket.rows)
        if waiting is None:
            return
        if waiting < self._batch_rows:
            state.window = min(state.window + 1, self._most)
        elif waiting > 3 * self._batch_rows:
            state.window = max(state.window - 1, 2)

    def drop(self, unit: int) -> int:
        """Forget what waits of a unit; returns how many rows."""
        queue = self._queues.pop(unit, None)
        rows = sum(len(batch) for run in queue.runs for batch in run) if queue else 0
        self._waiting -= rows
        return rows


def _pieces(group: Sequence[Batch], most: int) -> list[list[Batch]]:
    """A group cut into pieces of at most ``most`` rows, or of one micro-batch."""
    pieces: list[list[Batch]] = []
    room = 0
    for batch in group:
        if len(batch) > room:
            pieces.append([])
            room = most
        pieces[-1].append(batch)
        room -= len(batch)
    return pieces
