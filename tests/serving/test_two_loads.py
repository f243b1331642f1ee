"""People and a job on one engine, in simulated seconds: no machine's speed decides. CodeGen2.5-7B on an H100."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from serving.app import GPU_ROWS_BESIDE
from serving.batching import Scheduler, Sequence
from serving.config import RooflineConfig
from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY

PROMPT, OUTPUT = 600, 64
RATE, SECONDS = 2.0, 600.0
JOB_WAITS = 64


@dataclass
class Load:
    """One run of the clock; moments in seconds."""

    loop: asyncio.AbstractEventLoop
    plan: Scheduler = field(default_factory=lambda: Scheduler(RooflineConfig(), beside=GPU_ROWS_BESIDE))
    now: float = 0.0
    busy: float = 0.0
    rows: list[Sequence] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    until_first_token: list[float] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self, *, people: bool, job: bool) -> None:
        """People come at the same moments whatever becomes of them; the job always has rows that wait."""
        draw = random.Random(0)
        moments = itertools.accumulate(draw.expovariate(RATE) for _ in range(10_000))
        due = [moment for moment in itertools.takewhile(lambda m: m < SECONDS, moments) if people]
        served: list[tuple[float, Sequence]] = []
        while self.now < SECONDS or due or served:
            while job and len(self.plan.waiting) < JOB_WAITS:
                self.rows.append(self._add(BATCH_PRIORITY))
            while due and due[0] <= self.now:
                served.append((due.pop(0), self._add(INTERACTIVE_PRIORITY)))
            if not self.plan.busy:
                self.now = due[0] if due else SECONDS
                continue
            begun = [person.made > 0 for _, person in served]
            self._step()
            for (came, person), had_begun in zip(served, begun, strict=True):
                if person.made and not had_begun:
                    self.until_first_token.append(self.now - came)
            self.took += [self.now - came for came, person in served if person.done.done()]
            served = [(came, person) for came, person in served if not person.done.done()]

    def _add(self, priority: int) -> Sequence:
        sequence = Sequence([next(self.numbers)] * PROMPT, OUTPUT, None, self.loop.create_future())
        self.plan.add(sequence, priority)
        return sequence

    def _step(self) -> None:
        seconds = self.plan.step()
        self.now, self.busy = self.now + seconds, self.busy + seconds
        self.plan.finish_step()

    @property
    def rows_per_second(self) -> float:
        """The job's."""
        return sum(row.done.done() for row in self.rows) / self.now


def p99(seconds: list[float]) -> float:
    """What one of a hundred people waits longer than."""
    return float(np.percentile(seconds, 99))


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """For the sequences' futures."""
    made = asyncio.new_event_loop()
    yield made
    made.close()


def test_people_hardly_notice_a_job_that_takes_what_is_idle(loop: asyncio.AbstractEventLoop) -> None:
    people, job, both = Load(loop), Load(loop), Load(loop)
    people.run(people=True, job=False)
    job.run(people=False, job=True)
    both.run(people=True, job=True)
    idle = 1 - people.busy / people.now
    assert len(people.took) == len(both.took) == len(both.until_first_token) > 1_000
    assert 0.3 < idle < 0.8
    assert p99(both.took) <= 1.15 * p99(people.took)
    assert p99(both.until_first_token) <= 1.3 * p99(people.until_first_token)
    assert both.rows_per_second >= 0.8 * idle * job.rows_per_second
