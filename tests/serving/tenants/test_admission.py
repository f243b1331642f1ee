"""Admission: limits, turns and room, by a clock of the test's; then gateways that do anything in any order."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.errors import LimitError, OverloadedError, UsageError
from serving.tenants.admission import LEASE_SECONDS, Admission
from serving.tenants.caller import Caller, Limits
from serving.tenants.fair import W_IN, W_OUT
from serving.tenants.tickets import USUAL_BOUNDS, Bounds, Capacity, Demand, Place, Ticket, Used

NONE = Limits()


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


def demand(
    tenant: str = "acme",
    prompt: int = 10,
    output: int = 10,
    *,
    weight: float = 1.0,
    limits: Limits = NONE,
    samples: int = 1,
    patience: float = 30.0,
) -> Demand:
    caller = Caller(tenant, "ana", weight=weight, limits=limits)
    return Demand(caller, prompt, output, samples, patience)


class Door:
    """An ``Admission`` with a clock, whose one gateway numbers its requests from 1."""

    def __init__(self, samples: int = 2, tokens: int = 1_000, bounds: Bounds = USUAL_BOUNDS) -> None:
        self.clock = Clock()
        self.admission = Admission(bounds=bounds, clock=self.clock)
        self.resize(samples, tokens)
        self.asked = 0

    def resize(self, samples: int, tokens: int = 1_000, *, seen_by: str = "g") -> None:
        """A gateway sees what the engines hold."""
        self.admission.resize(seen_by, Capacity(samples, tokens))

    def ask(self, wanted: Demand) -> Place:
        """Ask; what is decided is left to ``granted`` or ``refused``."""
        self.asked += 1
        return self.admission.ask(wanted, Place("g", self.asked)).place

    def granted(self) -> list[int]:
        """The numbers of those that were granted since the last look; nobody was refused."""
        decided = self.admission.decide()
        assert [decision.refusal for decision in decided] == [None] * len(decided)
        return [decision.ticket.place.number for decision in decided]

    def refused(self) -> dict[int, OverloadedError]:
        """Why those were refused that were since the last look; nobody was granted."""
        decided = self.admission.decide()
        found = {d.ticket.place.number: d.refusal for d in decided if d.refusal is not None}
        assert len(found) == len(decided)
        return found


def test_what_fits_is_granted_at_once_and_the_rest_in_its_turn() -> None:
    door = Door(samples=2)
    first, *_ = [door.ask(demand()) for _ in range(4)]
    assert door.granted() == [1, 2]
    assert (door.admission.serving, door.admission.waiting) == (2, 2)
    assert door.granted() == []
    door.admission.leave(first, Used(10, 5))
    assert door.granted() == [3]
    assert door.admission.is_running(Place("g", 3))
    assert not door.admission.is_running(first)


def test_room_is_counted_in_tokens_that_may_come_and_in_samples() -> None:
    door = Door(samples=8, tokens=100)
    for wanted in (demand(prompt=20, output=40), demand(prompt=20, output=20), demand(prompt=1, output=0)):
        door.ask(wanted)
    assert door.granted() == [1, 2]
    door.admission.leave(Place("g", 2))
    assert door.granted() == [3]
    door.ask(demand(prompt=1, output=7, samples=8))
    assert door.granted() == []
    door.admission.leave(Place("g", 1))
    door.admission.leave(Place("g", 3))
    assert door.granted() == [4]


def test_what_has_become_larger_than_all_engines_runs_alone() -> None:
    door = Door(samples=20, tokens=4_000)
    small, large, _ = (door.ask(wanted) for wanted in (demand(), demand(output=500, samples=5), demand()))
    door.resize(2, 100)
    assert door.granted() == [1]
    door.admission.leave(small)
    assert door.granted() == [2]
    door.admission.leave(large)
    assert door.granted() == [3]


def whole(tenant: str = "huge", output: int = 800, *, limits: Limits = NONE) -> Demand:
    """What a large request claims; its portions are of ``portion``."""
    return replace(demand(tenant, output=output, limits=limits), runs=False)


def portion(tenant: str = "huge", output: int = 240) -> Demand:
    """A quarter of the engines of ``Door(8)``."""
    return replace(demand(tenant, output=output, samples=2, patience=600), claims=False)


def test_a_share_is_a_part_of_the_engines_and_of_one_replica() -> None:
    assert Capacity(8, 1_000).share == Capacity(2, 250)
    assert Capacity(64, 8_000, replicas=8).share == Capacity(8, 1_000)


def test_while_a_large_request_runs_in_portions_others_are_served() -> None:
    door = Door(samples=8)
    large = door.ask(whole())
    assert door.admission.is_running(large)
    assert (door.granted(), door.admission.serving, door.admission.waiting) == ([], 0, 0)
    for _ in range(5):
        part, small = door.ask(portion()), door.ask(demand("small"))
        assert door.granted() == [part.number, small.number], "nobody waits for all of the large one"
        for place, made in ((part, 240), (small, 10)):
            door.admission.charge(place, made)
            door.admission.leave(place)
    door.admission.leave(large)
    assert door.admission.serving == 0


@given(
    portions=st.lists(st.integers(1, 240), min_size=8, max_size=40),
    arrivals=st.lists(st.integers(0, 30), min_size=1, max_size=20),
)
@settings(max_examples=50)
def test_who_wants_little_is_served_at_the_next_end_of_a_portion_however_many_large_ones_there_are(
    portions: list[int], arrivals: list[int]
) -> None:
    """Six large requests of one tenant, always with their next portion in the queue; the first that runs ends first."""
    door = Door(samples=8)
    for _ in range(6):
        door.ask(whole())
    running: list[Place] = []
    left = [portion(output=output) for output in portions]
    for _ in range(6):
        door.ask(left.pop())
    running += [Place("g", number) for number in door.granted()]
    for turn in range(31):
        smalls = [door.ask(demand("small")).number for _ in range(arrivals.count(turn) and 1)]
        granted = door.granted()
        if running:
            ended = running.pop(0)
            door.admission.charge(ended, 200)
            door.admission.leave(ended)
            if left:
                door.ask(left.pop())
        granted += door.granted()
        assert set(smalls) <= set(granted)
        running += [Place("g", number) for number in granted if number not in smalls]
        for number in smalls:
            door.admission.leave(Place("g", number), Used(10, 10))


def test_a_large_request_claims_the_limits_once_and_for_all_of_it() -> None:
    door = Door(samples=8)
    limits = Limits(requests_per_minute=2, tokens_per_minute=1_000, concurrency=1)
    large = door.ask(whole(limits=limits))
    caller = whole(limits=limits).caller
    for _ in range(3):
        part = door.ask(replace(portion(), caller=caller))
        assert door.granted() == [part.number]
        with pytest.raises(LimitError, match="1 requests at once"):
            door.ask(demand("huge", limits=limits))
        door.admission.leave(part, Used(10, 100))
    door.admission.charge(large, 300)
    standing = door.admission.standing(caller)
    assert standing.tokens
    assert standing.requests
    assert (standing.tokens.remaining, standing.requests.remaining) == (190, 1)
    door.admission.leave(large, Used(10, 300))
    standing = door.admission.standing(caller)
    assert standing.tokens
    assert standing.tokens.remaining == 690
    with pytest.raises(LimitError, match="tokens a minute"):
        door.ask(whole(limits=limits))


def test_a_large_request_of_which_no_portion_ran_counts_for_nothing() -> None:
    door = Door(samples=8)
    limits = Limits(requests_per_minute=1)
    door.admission.leave(door.ask(whole(limits=limits)), Used())
    door.ask(whole(limits=limits))


def test_a_new_desk_learns_of_a_large_request_and_of_its_portion() -> None:
    door = Door(samples=8)
    limits = Limits(concurrency=1)
    large, part = whole(limits=limits), portion()
    for number, wanted in ((7, large), (8, part)):
        door.admission.adopt(Ticket(Place("g", number), wanted, door.admission.standing(wanted.caller)))
    assert (door.admission.serving, door.admission.waiting) == (1, 0)
    with pytest.raises(LimitError):
        door.admission.ask(large, Place("h", 1))
    for number in (8, 7):
        door.admission.leave(Place("g", number), Used(10, 10))
    assert door.admission.serving == 0
    door.admission.ask(large, Place("h", 2))


def test_without_engines_nobody_is_served_until_some_come() -> None:
    door = Door(samples=0, tokens=0)
    for _ in range(3):
        door.ask(demand())
    assert door.granted() == []
    door.resize(2)
    assert door.granted() == [1, 2]
    door.resize(1)
    door.admission.leave(Place("g", 1))
    assert door.granted() == []
    door.admission.leave(Place("g", 2))
    assert door.granted() == [3]


def test_the_gateway_that_sees_most_of_the_engines_is_believed_while_it_lives() -> None:
    door = Door(samples=2)
    for _ in range(4):
        door.ask(demand(patience=100))
    door.resize(0, 0, seen_by="comes")
    assert door.granted() == [1, 2]
    door.resize(3, seen_by="comes")
    assert door.granted() == [3]
    door.clock.now += LEASE_SECONDS - 1
    door.resize(2)
    door.admission.beat("g", {1, 2, 3, 4}, issued=4)
    door.clock.now += 2
    door.admission.leave(Place("g", 1))
    assert door.granted() == [], "the one that saw three is silent: two run"
    assert door.admission.capacity == Capacity(2, 1_000)


def test_tenants_take_turns_however_many_requests_one_of_them_has() -> None:
    door = Door(samples=1)
    for tenant in ["many"] * 10 + ["few"] * 3:
        door.ask(demand(tenant))
    order: list[int] = []
    for _ in range(13):
        (number,) = door.granted()
        order.append(number)
        door.admission.leave(Place("g", number), Used(10, 10))
    assert order[:6] == [1, 11, 2, 12, 3, 13]


@given(sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=2, max_size=8))
@settings(max_examples=20)
def test_served_tokens_are_in_proportion_to_weights(sizes: list[tuple[int, int]]) -> None:
    """Two tenants who always have some waiting; each request that runs makes a token a step."""
    door = Door(samples=8, tokens=200)
    weights, service, made = {"a": 2.0, "b": 1.0}, Counter[str](), Counter[Place]()
    running: dict[Place, Demand] = {}
    waiting = Counter[str]()
    for step in range(800):
        for tenant, weight in weights.items():
            while waiting[tenant] < 10:
                door.ask(demand(tenant, *sizes[(step + waiting[tenant]) % len(sizes)], weight=weight, patience=1e9))
                waiting[tenant] += 1
        for decision in door.admission.decide():
            running[decision.ticket.place] = wanted = decision.ticket.demand
            waiting[wanted.caller.tenant] -= 1
            service[wanted.caller.tenant] += int(W_IN) * wanted.prompt_tokens
        for place, wanted in list(running.items()):
            made[place] += 1
            service[wanted.caller.tenant] += int(W_OUT)
            door.admission.charge(place, made[place])
            if made[place] == wanted.output_tokens:
                door.admission.leave(place, Used(wanted.prompt_tokens, wanted.output_tokens))
                del running[place]
    assert abs(service["a"] / 2 - service["b"]) <= 2 * W_OUT * 200


def test_output_is_charged_as_it_is_made() -> None:
    door = Door(samples=2)
    long = door.ask(demand("a", 10, 500))
    door.ask(demand("b", 10, 10))
    assert door.granted() == [1, 2]
    for tenant in ("a", "a", "b", "b"):
        door.ask(demand(tenant))
    door.admission.charge(long, 100)
    door.admission.charge(long, 100)
    door.admission.leave(Place("g", 2), Used(10, 10))
    assert door.granted() == [5]
    door.admission.leave(Place("g", 5), Used(10, 10))
    assert door.granted() == [6], "the tenant of the long one has had 210, the other 60"


def test_limits_refuse_at_once_and_are_given_back() -> None:
    door = Door(samples=1)
    limits = Limits(tokens_per_minute=100, concurrency=3)
    first = door.ask(demand(prompt=10, output=50, limits=limits))
    assert door.granted() == [1]
    with pytest.raises(LimitError, match="tokens a minute"):
        door.ask(demand(prompt=10, output=50, limits=limits))
    with pytest.raises(UsageError):
        door.ask(demand(prompt=10, output=100, limits=limits))
    door.admission.leave(first, Used(10, 5))
    ticket = door.admission.ask(demand(prompt=10, output=50, limits=limits), Place("g", 9))
    assert ticket.standing.tokens
    assert ticket.standing.tokens.remaining == 25
    assert door.admission.standing(ticket.demand.caller) == ticket.standing


def test_requests_that_wait_count_as_open() -> None:
    door = Door(samples=1)
    for _ in range(3):
        door.ask(demand(limits=Limits(concurrency=3)))
    with pytest.raises(LimitError, match="3 requests at once"):
        door.ask(demand(limits=Limits(concurrency=3)))


def test_the_queue_is_bounded_for_each_tenant_and_in_all() -> None:
    door = Door(samples=1, bounds=Bounds(total=3, tenant=2))
    door.ask(demand("a"))
    assert door.granted() == [1]
    for tenant in ("a", "a"):
        door.ask(demand(tenant))
    with pytest.raises(OverloadedError, match="2 requests of tenant a wait already"):
        door.ask(demand("a"))
    door.ask(demand("b"))
    with pytest.raises(OverloadedError, match="3 requests wait already") as refused:
        door.ask(demand("c"))
    assert refused.value.http_status == 503
    assert refused.value.retry_after >= 1


def test_who_waited_beyond_his_patience_is_refused() -> None:
    door = Door(samples=1)
    door.ask(demand())
    assert door.granted() == [1]
    door.ask(demand(patience=2))
    door.ask(demand(patience=4))
    door.clock.now += 1.9
    assert door.granted() == []
    door.clock.now += 0.2
    assert str(door.refused()[2]).startswith("the request waited for 2 s")
    door.admission.leave(Place("g", 1))
    assert door.granted() == [3]
    door.clock.now += 3
    assert door.granted() == [], "who is served is not refused any more"
    assert door.admission.serving == 1


def test_who_gives_up_leaves_the_queue() -> None:
    door = Door(samples=1)
    for _ in range(3):
        door.ask(demand())
    assert door.granted() == [1]
    door.admission.leave(Place("g", 2))
    assert list(door.refused()) == [2]
    door.admission.leave(Place("g", 2))
    door.admission.leave(Place("g", 1))
    assert door.granted() == [3]


def test_asking_again_for_a_place_is_asking_once() -> None:
    door = Door(samples=1)
    wanted = demand(limits=Limits(concurrency=1))
    ticket = door.admission.ask(wanted, Place("g", 1))
    assert door.admission.ask(wanted, Place("g", 1)) == ticket
    assert door.granted() == [1]
    assert door.admission.ask(wanted, Place("g", 1)) == ticket
    assert door.granted() == []


def test_what_a_silent_gateway_held_is_given_back() -> None:
    door = Door(samples=2)
    wanted = demand(limits=Limits(tokens_per_minute=100, concurrency=3))
    for number in (1, 2, 3):
        door.admission.ask(wanted, Place("dead", number))
    assert door.granted() == [1, 2]
    door.admission.charge(Place("dead", 1), 5)
    door.clock.now += LEASE_SECONDS - 0.1
    door.admission.beat("alive", set(), 0)
    assert door.granted() == []
    door.clock.now += 0.2
    assert list(door.refused()) == [3]
    assert (door.admission.serving, door.admission.waiting) == (0, 0)
    door.admission.ask(wanted, Place("alive", 1))
    door.clock.now += 60
    standing = door.admission.standing(wanted.caller)
    assert standing.tokens
    assert standing.tokens.remaining == 80


def test_what_a_gateway_does_not_know_any_more_is_given_back() -> None:
    door = Door(samples=2)
    for _ in range(4):
        door.ask(demand())
    assert door.granted() == [1, 2]
    assert door.admission.beat("g", {2, 3, 7}, issued=3) == {7}
    assert door.granted() == [3], "1 is over; 4 was asked after the gateway had written this"
    assert (door.admission.serving, door.admission.waiting) == (2, 1)


def test_a_new_desk_learns_what_runs() -> None:
    old, new = Door(samples=1), Door(samples=1)
    wanted = demand(limits=Limits(concurrency=1))
    ticket = old.admission.ask(wanted, Place("g", 1))
    assert old.granted() == [1]
    assert new.admission.beat("g", {1}, issued=1) == {1}
    new.admission.adopt(ticket)
    new.admission.adopt(ticket)
    assert new.admission.beat("g", {1}, issued=1) == set()
    assert new.admission.serving == 1
    with pytest.raises(LimitError):
        new.admission.ask(wanted, Place("h", 1))
    new.admission.leave(ticket.place, Used(10, 10))
    new.admission.ask(wanted, Place("h", 1))
    assert new.granted() == [1]


def test_a_gateway_that_was_silent_for_too_long_comes_back_with_what_it_runs() -> None:
    door = Door(samples=1)
    wanted = demand(limits=Limits(concurrency=1))
    ticket = door.admission.ask(wanted, Place("slow", 1))
    assert door.granted() == [1]
    door.clock.now += LEASE_SECONDS + 1
    door.resize(1)
    assert door.granted() == []
    door.admission.ask(wanted, Place("other", 1))
    assert door.granted() == [1]
    assert door.admission.beat("slow", {1}, issued=1) == {1}
    door.admission.adopt(ticket)
    assert door.admission.serving == 2, "beyond the capacity: they do run"
    door.admission.leave(ticket.place)
    door.admission.leave(Place("other", 1))
    assert door.admission.serving == 0
    door.admission.ask(wanted, Place("other", 2))
    assert door.granted() == [2]


GATEWAYS = st.sampled_from(["g", "h"])
WATCHER = "w"
"""A gateway that has no requests, and never tires of telling what the engines hold."""

OPEN_AT_ONCE = 4
CALLERS = {
    "free": Caller("free", "key", weight=2.0),
    "bound": Caller("bound", "key", limits=Limits(200, 20, OPEN_AT_ONCE)),
    "key": Caller("key", "key", key_limits=Limits(150, 10, OPEN_AT_ONCE)),
}
BOUNDS = Bounds(total=6, tenant=4)
MOST_PATIENCE = 20.0


class Gateways(RuleBasedStateMachine):
    """Gateways that ask, charge, leave, forget and fall silent, engines that come and go, and a desk that is lost.

    ``waiting`` and ``running`` are what ought to wait and run, by what ``decide`` said.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.capacity = Capacity(3, 100)
        self.admission = Admission(bounds=BOUNDS, clock=self.clock)
        self.issued = Counter[str]()
        self.made = Counter[Place]()
        self.heard: dict[str, float] = {}
        self.waiting: dict[Place, Ticket] = {}
        self.running: dict[Place, Ticket] = {}

    @rule(
        gateway=GATEWAYS,
        tenant=st.sampled_from(sorted(CALLERS)),
        prompt=st.integers(0, 60),
        output=st.integers(0, 60),
        samples=st.integers(1, 2),
        patience=st.floats(0.1, MOST_PATIENCE),
    )
    def ask(self, gateway: str, tenant: str, prompt: int, output: int, samples: int, patience: float) -> None:
        self.issued[gateway] += 1
        place = Place(gateway, self.issued[gateway])
        self.heard[gateway] = self.clock.now
        with suppress(LimitError, UsageError):
            wanted = Demand(CALLERS[tenant], prompt, output, samples, patience)
            self.waiting[place] = self.admission.ask(wanted, place)
        self.decide()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.integers(0, 20))
    def charge(self, data: st.DataObject, more: int) -> None:
        place = data.draw(st.sampled_from(sorted(self.running)))
        self.made[place] = min(self.made[place] + more, self.running[place].demand.output_tokens)
        self.admission.charge(place, self.made[place])
        self.decide()

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data(), told=st.booleans())
    def leave(self, data: st.DataObject, told: bool) -> None:
        place = data.draw(st.sampled_from(sorted([*self.running, *self.waiting])))
        ticket = self.running.pop(place, None)
        used = Used(ticket.demand.prompt_tokens, self.made[place]) if ticket and told else None
        self.admission.leave(place, used)
        self.decide()

    @rule(gateway=GATEWAYS, number=st.integers(1, 100))
    def leave_late(self, gateway: str, number: int) -> None:
        place = Place(gateway, number)
        if place not in self.running and place not in self.waiting:
            self.admission.leave(place, Used(10, 10))
            self.admission.charge(place, 10)
        self.decide()

    @rule(gateway=GATEWAYS, data=st.data())
    def beat(self, gateway: str, data: st.DataObject) -> None:
        places = sorted(place for place in (*self.running, *self.waiting) if place.gateway == gateway)
        forgotten: set[Place] = data.draw(st.sets(st.sampled_from(places))) if places else set()
        kept = {place.number for place in places if place not in forgotten}
        self.heard[gateway] = self.clock.now
        assert self.admission.beat(gateway, kept, self.issued[gateway]) == set()
        for place in forgotten:
            self.running.pop(place, None)
        self.decide()

    @rule(seconds=st.floats(0, 15))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now += seconds
        self.decide()

    @rule(samples=st.integers(0, 4), tokens=st.integers(0, 150))
    def resize(self, samples: int, tokens: int) -> None:
        self.capacity = Capacity(samples, tokens)
        self.decide()

    @rule()
    def start_again(self) -> None:
        self.admission = Admission(bounds=BOUNDS, clock=self.clock)
        self.waiting.clear()
        self.heard.clear()
        for place, ticket in self.running.items():
            self.admission.adopt(ticket)
            self.heard[place.gateway] = self.clock.now
        self.decide()

    def decide(self) -> None:
        """Every wait ends once; what is granted has room; what silent gateways held is gone."""
        for gateway in [name for name, heard in self.heard.items() if self.clock.now - heard > LEASE_SECONDS]:
            del self.heard[gateway]
            for place in [place for place in self.running if place.gateway == gateway]:
                del self.running[place]
        self.admission.resize(WATCHER, self.capacity)
        decided = self.admission.decide()
        for decision in decided:
            ticket = self.waiting.pop(decision.ticket.place)
            if decision.refusal is None:
                assert ticket.place.gateway in self.heard
                self.running[ticket.place] = ticket
        if any(decision.refusal is None for decision in decided) and len(self.running) > 1:
            running = [ticket.demand for ticket in self.running.values()]
            assert sum(wanted.samples for wanted in running) <= self.capacity.samples
            assert sum(wanted.tokens for wanted in running) <= self.capacity.tokens

    @invariant()
    def nobody_is_lost(self) -> None:
        assert (self.admission.serving, self.admission.waiting) == (len(self.running), len(self.waiting))
        assert all(self.admission.is_running(place) for place in self.running)

    @invariant()
    def nobody_waits_before_idle_engines(self) -> None:
        assert self.running or not self.waiting or not self.capacity.samples

    @invariant()
    def limits_and_bounds_hold(self) -> None:
        open_ = Counter(t.demand.caller.tenant for t in (*self.running.values(), *self.waiting.values()))
        assert open_["bound"] <= OPEN_AT_ONCE
        assert open_["key"] <= OPEN_AT_ONCE
        waiting = Counter(ticket.demand.caller.tenant for ticket in self.waiting.values())
        assert len(self.waiting) <= BOUNDS.total
        assert max(waiting.values(), default=0) <= BOUNDS.tenant

    def teardown(self) -> None:
        """When all gateways are silent, nothing is held, and after some minutes nothing is remembered as used."""
        self.clock.now += LEASE_SECONDS + MOST_PATIENCE
        self.decide()
        assert (self.admission.serving, self.admission.waiting) == (0, 0)
        self.clock.now += 300
        for caller in CALLERS.values():
            standing = self.admission.standing(caller)
            for level in (standing.requests, standing.tokens):
                assert level is None or level.remaining == level.limit


TestGateways = Gateways.TestCase
TestGateways.settings = settings(max_examples=100, stateful_step_count=40, suppress_health_check=list(HealthCheck))
