"""People and a job on one engine, on a clock of its own: CodeGen2.5-7B on a simulated H100, no process and no HTTP.

    spanfill bench two_loads --rates 1 2 4 --seeds 3 [--seconds 600] [--beside 4]
                             [--job-tokens 64] [--json FILE]

People ask for 64 tokens behind prompts of 600, at moments drawn beforehand (a Poisson process): alone, and beside a job
that always has rows that wait, of as long prompts and ``--job-tokens`` of output. The engine's own scheduler decides
(``serving.batching``), and the roofline says what a step takes. ``spanfill bench loads`` measures the same through HTTP
and Ray Serve.
"""

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

from serving.app import GPU_ROWS_BESIDE
from serving.batching import Scheduler, Sequence
from serving.config import RooflineConfig
from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY
from tests.benchmarks.output import above_zero, check_files, console, origin, parser_of, positive, publish_json

PROMPT, OUTPUT = 600, 64
JOB_WAITS = 64
FEWEST = 50


@dataclass
class _Pass:
    """One run of the clock; moments in seconds."""

    beside: int
    job_tokens: int
    loop: asyncio.AbstractEventLoop
    now: float = 0.0
    busy: float = 0.0
    rows: list[Sequence] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    until_first_token: list[float] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.plan = Scheduler(RooflineConfig(), beside=self.beside)

    def run(self, moments: list[float], seconds: float, *, job: bool) -> "_Pass":
        """People come at ``moments`` whatever becomes of them; a ``job`` always has rows that wait."""
        due, served = list(moments), list[tuple[float, Sequence]]()
        while self.now < seconds or due or served:
            while job and len(self.plan.waiting) < JOB_WAITS:
                self.rows.append(self._add(BATCH_PRIORITY))
            while due and due[0] <= self.now:
                served.append((due.pop(0), self._add(INTERACTIVE_PRIORITY)))
            if not self.plan.busy:
                self.now = due[0] if due else seconds
                continue
            begun = [person.made > 0 for _, person in served]
            self._step()
            for (came, person), had_begun in zip(served, begun, strict=True):
                if person.made and not had_begun:
                    self.until_first_token.append(self.now - came)
            self.took += [self.now - came for came, person in served if person.done.done()]
            served = [(came, person) for came, person in served if not person.done.done()]
        return self

    def _add(self, priority: int) -> Sequence:
        output = self.job_tokens if priority == BATCH_PRIORITY else OUTPUT
        sequence = Sequence([next(self.numbers)] * PROMPT, output, None, self.loop.create_future())
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


@dataclass(frozen=True)
class Figures:
    """People alone and beside the job, in seconds; ``idle`` and the job's ``share`` of its speed alone are shares."""

    rate: float
    seed: int
    people: int
    first_token_p99: tuple[float, float]
    end_to_end_p99: tuple[float, float]
    idle: float
    share: float

    @property
    def first_token(self) -> float:
        """p99 beside the job over p99 alone."""
        return self.first_token_p99[1] / self.first_token_p99[0]

    @property
    def end_to_end(self) -> float:
        """The same of whole answers."""
        return self.end_to_end_p99[1] / self.end_to_end_p99[0]


def study(
    rate: float, *, seconds: float = 600.0, beside: int = GPU_ROWS_BESIDE, job_tokens: int = OUTPUT, seed: int = 0
) -> Figures:
    """``rate`` people a second for ``seconds``; ``beside`` rows, of ``job_tokens`` of output, go on beside them."""
    draw = random.Random(seed)
    coming = itertools.accumulate(draw.expovariate(rate) for _ in itertools.count())
    moments = list(itertools.takewhile(lambda moment: moment < seconds, coming))
    loop = asyncio.new_event_loop()
    people = _Pass(beside, job_tokens, loop).run(moments, seconds, job=False)
    job = _Pass(beside, job_tokens, loop).run([], seconds, job=True)
    both = _Pass(beside, job_tokens, loop).run(moments, seconds, job=True)
    loop.close()
    return Figures(
        rate,
        seed,
        len(both.took),
        (_p99(people.until_first_token), _p99(both.until_first_token)),
        (_p99(people.took), _p99(both.took)),
        1 - people.busy / people.now,
        both.rows_per_second / job.rows_per_second,
    )


def _p99(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99))


def main() -> None:
    """Measure and print."""
    parser = parser_of("two_loads", __doc__)
    parser.add_argument("--rates", type=above_zero, nargs="+", default=[1.0, 2.0, 4.0], help="people a second")
    parser.add_argument("--seeds", type=positive, default=1)
    parser.add_argument("--seconds", type=above_zero, default=600.0)
    parser.add_argument("--beside", type=positive, default=GPU_ROWS_BESIDE, help="rows that go on beside people")
    parser.add_argument("--job-tokens", type=positive, default=OUTPUT, help="output of each of the job's rows")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    check_files(parser, asked.json, None)
    if min(asked.rates) * asked.seconds < FEWEST:
        parser.error(f"--seconds {asked.seconds:g}: fewer than {FEWEST} people have no p99")
    cases = itertools.product(asked.rates, range(asked.seeds))
    told = {"seconds": asked.seconds, "beside": asked.beside, "job_tokens": asked.job_tokens}
    found = [study(rate, seed=seed, **told) for rate, seed in cases]
    table = Table(
        "people/s", "seed", "people", "first token p99, ms", "ratio", "end-to-end p99, ms", "ratio", "idle", "job"
    )
    for each in found:
        first, whole = (
            "{:.1f}, {:.1f}".format(*(1_000 * p for p in pair)) for pair in (each.first_token_p99, each.end_to_end_p99)
        )
        ratios = f"{each.first_token:.2f}", f"{each.end_to_end:.2f}"
        shares = f"{each.idle:.2f}", f"{each.share:.2f}"
        table.add_row(f"{each.rate:g}", f"{each.seed}", f"{each.people:,}", first, ratios[0], whole, ratios[1], *shares)
    console().print(table)
    if asked.json:
        publish_json(asked.json, origin("two_loads") | {"cases": [asdict(each) for each in found]})


if __name__ == "__main__":
    main()
