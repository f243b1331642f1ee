"""The Virtual Token Counter on a model of an engine: it holds what fits, and each job makes a token a step."""

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tenants.fair import W_IN, W_OUT, FairQueue

Size = tuple[int, int]
SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)
WEIGHTS = st.sampled_from([0.5, 1.0, 2.0, 3.0])


@dataclass(eq=False)
class Job:
    """A request of so many tokens, and how many it has made."""

    client: str
    prompt: int
    output: int
    made: int = 0


@dataclass
class Engine:
    """Serves the heads of a queue while their tokens fit its memory; ``service`` is what each client had."""

    memory: int
    queue: FairQueue[Job] = field(default_factory=FairQueue)
    running: list[Job] = field(default_factory=list)
    service: Counter[str] = field(default_factory=Counter)

    def push(self, client: str, size: Size, weight: float = 1.0) -> None:
        self.queue.push(client, Job(client, *size), weight=weight)

    def step(self) -> None:
        while (job := self.queue.head()) is not None and self._fits(job):
            self.queue.remove(job.client, job)
            self.running.append(job)
            self._serve(job, W_IN * job.prompt)
        for job in self.running:
            job.made += 1
            self._serve(job, W_OUT)
        self.running = [job for job in self.running if job.made < job.output]

    def _fits(self, job: Job) -> bool:
        return sum(other.prompt + other.output for other in (*self.running, job)) <= self.memory

    def _serve(self, job: Job, service: float) -> None:
        self.queue.charge(job.client, service)
        self.service[job.client] += int(service)


def keep_backlogged(engine: Engine, client: str, sizes: "itertools.cycle[Size]", weight: float) -> None:
    """Let more wait than one step can take in: a job has two tokens at least."""
    while engine.queue.waiting(client) <= engine.memory // 2:
        engine.push(client, next(sizes), weight)


@given(SIZES, SIZES, SIZES, WEIGHTS, WEIGHTS, st.integers(0, 2**32))
def test_two_backlogged_clients_differ_by_no_more_than_the_papers_bound_whatever_a_third_does(
    first: list[Size], second: list[Size], third: list[Size], weight: float, other_weight: float, seed: int
) -> None:
    engine, chance, third_sizes = Engine(memory=100), random.Random(seed), itertools.cycle(third)
    backlogs = {"a": (itertools.cycle(first), weight), "b": (itertools.cycle(second), other_weight)}
    apart = [0.0]
    for _ in range(120):
        for client, (sizes, share) in backlogs.items():
            keep_backlogged(engine, client, sizes, share)
        for _ in range(chance.choice([0, 0, 0, 1, 5])):
            engine.push("c", next(third_sizes))
        engine.step()
        apart.append(engine.service["a"] / weight - engine.service["b"] / other_weight)
    longest = max(prompt for prompt, _ in first + second)
    bound = 2 * max(W_IN * longest, W_OUT * engine.memory) / min(weight, other_weight)
    assert max(apart) - min(apart) <= bound + 1e-6


@given(SIZES, SIZES, st.tuples(st.integers(1, 40), st.integers(1, 40)), WEIGHTS, WEIGHTS, st.integers(0, 60))
def test_nobody_starves(
    first: list[Size], second: list[Size], wanted: Size, weight: float, own_weight: float, steps: int
) -> None:
    """Who comes to two that always have more is served before either has had more than the bound."""
    engine = Engine(memory=100)
    backlogs = {"a": (itertools.cycle(first), weight), "b": (itertools.cycle(second), 1.0)}

    def go_on() -> None:
        for client, (sizes, share) in backlogs.items():
            keep_backlogged(engine, client, sizes, share)
        engine.step()

    for _ in range(steps):
        go_on()
    before = engine.service.copy()
    engine.push("c", wanted, own_weight)
    while not engine.service["c"]:
        go_on()
        bound = 2 * max(W_IN * 40, W_OUT * engine.memory) / min(weight, own_weight, 1.0)
        for client, (_, share) in backlogs.items():
            assert (engine.service[client] - before[client]) / share <= bound + 1e-6


@pytest.mark.parametrize(
    ("share", "size", "other_size"), [(2.0, (20, 30), (20, 30)), (2.0, (1, 50), (60, 5)), (1.0, (5, 5), (80, 80))]
)
def test_service_is_in_proportion_to_weight_whatever_the_requests_are_like(
    share: float, size: Size, other_size: Size
) -> None:
    engine = Engine(memory=400)
    for _ in range(4_000):
        keep_backlogged(engine, "a", itertools.cycle([size]), share)
        keep_backlogged(engine, "b", itertools.cycle([other_size]), 1.0)
        engine.step()
    assert engine.service["a"] / engine.service["b"] == pytest.approx(share, rel=0.06)


def filled(**counts: int) -> FairQueue[Size]:
    queue: FairQueue[Size] = FairQueue()
    for client, count in counts.items():
        push(queue, client, count)
    return queue


def push(queue: FairQueue[Size], client: str, count: int) -> None:
    """Queue so many; an item is its client's letter and its number."""
    for number in range(count):
        queue.push(client, (ord(client), number))


def served(queue: FairQueue[Size], count: int) -> str:
    """The letters of the next ones, each of which costs the same."""
    letters = ""
    for _ in range(count):
        head = queue.head()
        assert head is not None
        client = chr(head[0])
        queue.remove(client, head)
        queue.charge(client, 10.0)
        letters += client
    return letters


def test_a_client_that_was_idle_is_owed_nothing() -> None:
    queue = filled(a=100)
    assert served(queue, 50) == "a" * 50
    push(queue, "b", 50)
    assert Counter(served(queue, 20)) == {"a": 10, "b": 10}


def test_nor_is_one_that_comes_when_nobody_waits() -> None:
    queue = filled(a=50)
    served(queue, 50)
    push(queue, "b", 20)
    push(queue, "a", 20)
    assert Counter(served(queue, 20)) == {"a": 10, "b": 10}


def test_a_client_that_had_much_pays_for_it_when_it_comes_back() -> None:
    queue = filled(a=2, b=100)
    served(queue, 4)
    queue.charge("a", 100.0)
    push(queue, "a", 100)
    assert served(queue, 10) == "b" * 10
    assert Counter(served(queue, 20)) == {"a": 10, "b": 10}


def test_a_clients_own_requests_keep_their_order() -> None:
    queue = filled(a=5)
    order = []
    while (head := queue.head()) is not None:
        order.append(head[1])
        queue.remove("a", head)
    assert order == [0, 1, 2, 3, 4]


def test_what_nobody_wants_any_more_leaves_the_queue() -> None:
    queue = filled(a=3, b=1)
    queue.remove("a", (ord("a"), 0))
    assert queue.head() == (ord("a"), 1)
    assert (len(queue), queue.waiting("a"), queue.waiting("b"), queue.waiting("c")) == (3, 2, 1, 0)
