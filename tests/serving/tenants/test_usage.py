"""What was used is counted once and summed as asked, on both databases."""

import datetime
from concurrent.futures import ThreadPoolExecutor

from serving.tenants.store import TenantStore
from serving.tenants.usage import DIMENSIONS, UsageFilter, UsageLine, UsageRecord
from tests.serving.tenants.conftest import Clock

DAY = 86_400.0
FIRST, SECOND = datetime.date(2027, 1, 15), datetime.date(2027, 1, 16)


def record(at: float, tenant: str = "acme", key: str = "k1", model: str = "m", job: str = "") -> UsageRecord:
    return UsageRecord(tenant, key, model, 10, 4, 3, at, job)


def test_records_are_summed_by_tenant_day_model_key_and_job(store: TenantStore, clock: Clock) -> None:
    now = clock.now
    records = [
        record(now),
        record(now + 1),
        record(now, key="k2"),
        record(now, model="n"),
        record(now, job="batch_1"),
        record(now + DAY),
        record(now, tenant="zeta", key="k3"),
    ]
    assert store.add_usage("a", list(enumerate(records, 1))) == 7
    lines = store.usage()
    assert lines[0] == UsageLine("acme", "2027-01-15", "m", "k1", "", 20, 8, 6, 2)
    assert [(line.tenant, line.day, line.model, line.key, line.job) for line in lines] == [
        ("acme", "2027-01-15", "m", "k1", ""),
        ("acme", "2027-01-15", "m", "k1", "batch_1"),
        ("acme", "2027-01-15", "m", "k2", ""),
        ("acme", "2027-01-15", "n", "k1", ""),
        ("acme", "2027-01-16", "m", "k1", ""),
        ("zeta", "2027-01-15", "m", "k3", ""),
    ]


def test_a_report_is_parted_and_filtered_as_asked(store: TenantStore, clock: Clock) -> None:
    now = clock.now
    records = [record(now), record(now + DAY, job="j"), record(now, tenant="zeta", key="k3")]
    store.add_usage("a", list(enumerate(records, 1)))
    assert store.usage(["tenant"]) == [
        UsageLine("acme", prompt_tokens=20, cached_tokens=8, completion_tokens=6, requests=2),
        UsageLine("zeta", prompt_tokens=10, cached_tokens=4, completion_tokens=3, requests=1),
    ]
    assert store.usage([]) == [UsageLine(prompt_tokens=30, cached_tokens=12, completion_tokens=9, requests=3)]

    def requests(wanted: UsageFilter) -> int:
        return sum(line.requests for line in store.usage(DIMENSIONS, wanted))

    assert requests(UsageFilter(tenant="acme")) == 2
    assert requests(UsageFilter(key="k3")) == 1
    assert requests(UsageFilter(job="j")) == 1
    assert requests(UsageFilter(job="")) == 2
    assert requests(UsageFilter(since=SECOND)) == 1
    assert requests(UsageFilter(until=FIRST)) == 2
    assert requests(UsageFilter("acme", since=FIRST, until=FIRST)) == 1
    assert requests(UsageFilter("nobody")) == 0


def test_nothing_used_is_nothing_or_zero(store: TenantStore) -> None:
    assert store.usage() == []
    assert store.usage([]) == [UsageLine()]


def test_records_that_are_offered_again_count_once(store: TenantStore, clock: Clock) -> None:
    numbered = list(enumerate([record(clock.now)] * 5, 1))
    assert store.add_usage("a", numbered[:3]) == 3
    assert store.add_usage("a", numbered) == 2
    assert store.add_usage("a", numbered) == 0
    assert store.add_usage("b", numbered[:1]) == 1
    assert store.usage([])[0].requests == 6


def test_gateways_that_count_at_once_lose_nothing(store: TenantStore, clock: Clock) -> None:
    keys = [f"k{number}" for number in range(8)]

    def gateway(number: int) -> int:
        order = keys if number % 2 else keys[::-1]  # Rows locked in opposite orders would wait for each other.
        return sum(
            store.add_usage(f"gateway {number}", [(10 * turn + i, record(clock.now, key=key))])
            for turn in range(5)
            for i, key in enumerate(order, 1)
        ) + store.add_usage(f"batch {number}", list(enumerate([record(clock.now, key=key) for key in order], 1)))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(gateway, range(4))) == [48] * 4
    assert [line.requests for line in store.usage(["key"])] == [24] * 8


def test_a_source_offered_by_two_at_once_counts_once(store: TenantStore, clock: Clock) -> None:
    numbered = list(enumerate([record(clock.now)] * 100, 1))
    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(lambda _: store.add_usage("a", numbered), range(8))) == 100
    assert store.usage([])[0].requests == 100


def test_a_key_was_last_used_when_its_latest_request_ended(store: TenantStore, clock: Clock) -> None:
    store.create_tenant("acme")
    row, _ = store.create_key("acme")
    other, _ = store.create_key("acme", "other")
    store.add_usage("a", [(1, record(clock.now + 5, key=row.public_id)), (2, record(clock.now, key=row.public_id))])
    store.add_usage("b", [(1, record(clock.now + 1, key=row.public_id))])
    used = {found.public_id: found.last_used for found in store.keys("acme")}
    assert used == {row.public_id: clock.now + 5, other.public_id: None}


def test_a_day_ends_at_midnight_in_utc() -> None:
    midnight = datetime.datetime(2027, 1, 16, tzinfo=datetime.UTC).timestamp()
    assert record(midnight - 0.001).day == FIRST
    assert record(midnight).day == SECOND
