"""A job on a clock of its own: lanes feed the engines' own schedulers in one process, where engines cost no cores."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jobs.lanes import Batch, Lanes, Ticket
from jobs.runner import route_of
from jobs.spec import JobSpec
from serving.batching import Scheduler, Sequence
from serving.config import RooflineConfig
from serving.protocol import BATCH_PRIORITY, EngineInfo
from serving.replica import ANSWER_SECONDS

H100 = RooflineConfig()
"""CodeGen2.5-7B in bfloat16 at its roofline."""

DEFAULTS = JobSpec(input="", output="", engine="simulated")
"""What a job does by itself."""


def _described(roofline: RooflineConfig) -> EngineInfo:
    return EngineInfo(
        kind="simulated",
        model="",
        max_model_len=0,
        max_num_seqs=roofline.max_num_seqs,
        block_size=roofline.block_size,
        kv_cache_tokens=roofline.kv_cache_tokens,
    )


@dataclass(frozen=True)
class Dealt:
    """A unit as its feeder deals it: groups of micro-batches, what each row weighs, and each row's prompt."""

    groups: list[list[Batch]]
    weights: list[float]
    prompt: Callable[[int], Ids[int]]


@dataclass
class _Call:
    """A micro-batch at a replica, and whose it is; the share ``left`` of it is not ``told`` of, the last time then."""

    ticket: Ticket
    lanes: Lanes
    rows: list[Sequence]
    told: float
    left: float = 1.0

    def news(self, now: float) -> bool:
        """Whether there is something to tell: the end at once, answers before it as often as a replica does."""
        left = sum(not row.done.done() for row in self.rows) / len(self.rows)
        if left == self.left or (left and now - self.told < ANSWER_SECONDS):
            return False
        self.left, self.told = left, now
        return True


@dataclass
class _Replica:
    """A scheduler on the study's clock, and the micro-batches that it has not finished."""

    speed: float
    scheduler: Scheduler
    calls: list[_Call] = field(default_factory=list)
    stepping: bool = False
    row_seconds: float = 0.0
    busy_seconds: float = 0.0
    end: float = 0.0

    def step(self) -> float:
        """Plan a step; its seconds."""
        seconds = self.scheduler.step() / self.speed
        self.row_seconds += len(self.scheduler.running) * seconds
        self.busy_seconds += seconds
        return seconds

    def finish_step(self, now: float) -> list[_Call]:
        """The micro-batches of which there is something to tell."""
        self.end = now
        self.scheduler.finish_step()
        news = [call for call in self.calls if call.news(now)]
        self.calls = [call for call in self.calls if call.left]
        return news


class Study:
    """Engines of ``speeds`` times a roofline's, and units that come to the lanes at ``feed`` rows a second.

    ``deal`` makes a unit's work from its number; its answers have 1 to ``max_tokens`` tokens, but for the share
    ``runaway`` of them, which have ``longest``. A call is ``call`` seconds under way. Windows begin at ``window`` times
    the job's.
    """

    def __init__(
        self,
        speeds: list[float],
        deal: Callable[[int], Dealt],
        *,
        feed: float,
        call: float,
        max_tokens: int,
        runaway: float = 0.0,
        longest: int = 0,
        roofline: RooflineConfig = H100,
        feeders: int = 1,
        window: float = 1.0,
        seed: int = 0,
    ) -> None:
        spec = DEFAULTS.model_copy(update={"feeders": feeders})
        route, _ = route_of(len(speeds), _described(roofline), spec)
        calls, room = max(1, round(route.window * window)), route.room * window
        self.now = 0.0
        self._lanes = [
            Lanes(route.replicas, calls, route.batch_rows, room=room, clock=lambda: self.now) for _ in range(feeders)
        ]
        self._replicas = [_Replica(speed, Scheduler(roofline)) for speed in speeds]
        self._deal, self._feed, self._call, self._max_tokens = deal, feed, call, max_tokens
        self._runaway, self._longest = runaway, longest
        self._dealt: dict[int, Dealt] = {}
        self._draw = random.Random(seed)
        self._futures = asyncio.new_event_loop()
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()

    def run(self, units: Ids[int]) -> dict[str, float]:
        """Work off units of so many rows; the figures since the first of them had come.

        ``running`` is how many rows ran at once, idle times counted; ``cached`` the share of the prompt tokens that
        the engines' prefix caches held; ``ends within`` the share of the time between the first and the last end.
        """
        first, rows = units[0] / self._feed, 0
        for unit, count in enumerate(units):
            rows += count
            self._at(rows / self._feed, lambda unit=unit: self._add(unit))
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self._futures.close()
        replicas, seconds = self._replicas, self.now - first
        ends = [replica.end for replica in replicas]
        schedulers = [replica.scheduler for replica in replicas]
        return {
            "rows": rows,
            "seconds": seconds,
            "rows/s": rows / seconds,
            "busy_share": sum(replica.busy_seconds for replica in replicas) / seconds / len(replicas),
            "mean_running": sum(r.row_seconds for r in replicas) / sum(r.busy_seconds for r in replicas),
            "running": sum(replica.row_seconds for replica in replicas) / seconds / len(replicas),
            "ends within": (max(ends) - min(ends)) / seconds,
            "cached": sum(s.hits for s in schedulers) / sum(s.queries for s in schedulers),
        }

    def _at(self, seconds: float, event: Any) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), event))

    def _add(self, unit: int) -> None:
        self._dealt[unit] = dealt = self._deal(unit)
        self._lanes[unit % len(self._lanes)].add(unit, dealt.groups, dealt.weights)
        self._pump()

    def _pump(self) -> None:
        more = True
        while more:
            more = False
            for lanes in self._lanes:
                for lane in range(len(lanes)):
                    if ticket := lanes.take(lane):
                        more = True
                        self._at(self.now + self._call / 2, lambda t=ticket, of=lanes: self._arrive(t, of))

    def _arrive(self, ticket: Ticket, lanes: Lanes) -> None:
        replica, dealt = self._replicas[ticket.lane], self._dealt[ticket.unit]
        rows = [self._sequence(dealt.prompt(row)) for row in ticket.rows]
        for row in rows:
            replica.scheduler.add(row, BATCH_PRIORITY)
        replica.calls.append(_Call(ticket, lanes, rows, self.now))
        if not replica.stepping:
            replica.stepping = True
            self._at(self.now + replica.step(), lambda: self._stepped(replica))

    def _sequence(self, prompt: Ids[int]) -> Sequence:
        runs_away = self._runaway > 0 and self._draw.random() < self._runaway
        length = self._longest if runs_away else self._draw.randint(1, self._max_tokens)
        return Sequence(prompt, length, None, self._futures.create_future())

    def _stepped(self, replica: _Replica) -> None:
        for call in replica.finish_step(self.now):
            waiting = len(replica.scheduler.waiting)
            self._at(self.now + self._call / 2, partial(self._answered, call, call.left, waiting))
        replica.stepping = replica.scheduler.busy
        if replica.stepping:
            self._at(self.now + replica.step(), lambda: self._stepped(replica))

    def _answered(self, call: _Call, left: float, waiting: int) -> None:
        if left:
            call.lanes.lighten(call.ticket, left)
        else:
            call.lanes.settle(call.ticket, answered=True, waiting=waiting)
        self._pump()
