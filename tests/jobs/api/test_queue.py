"""Whose turn it is, who holds what, and what becomes of a work that somebody lost."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from jobs.api.database import Database, Page
from jobs.api.queue import GONE_SECONDS, LEASE_SECONDS, WAITED_SECONDS, Queue, next_turn
from jobs.api.submission import new_work
from serving.errors import ForbiddenError, LeaseLostError, LimitError, NotFoundError, UsageError
from serving.tenants.caller import Caller
from serving.tenants.database import database_address
from serving.tenants.store import TenantStore
from serving.tenants.tables import SourceRow, WorkRow
from serving.tenants.usage import UsageRecord
from tests.serving.tenants.conftest import Clock, postgres, sqlite_url, url

__all__ = ["postgres", "sqlite_url", "url"]

MODELS = ["demo"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(url: str, clock: Clock) -> Iterator[Database]:
    """Either database."""
    found = Database(database_address(url), clock=clock)
    yield found
    found.close()


@pytest.fixture
def queue(database: Database) -> Queue:
    """Of tenants that may have 50 unfinished works each."""
    return Queue(database, unfinished=50)


def submit(queue: Queue, tenant: str, kind: Any = "batch", *, weight: float = 1.0, seconds: float = 60.0) -> WorkRow:
    work = new_work(kind, Caller(tenant, "k"), "demo", "file-x", {}, queue.clock(), seconds)
    return queue.submit(work, weight=weight)


def claim(queue: Queue, holder: str = "here", *, closing: bool = False, idle_only: bool = False) -> WorkRow | None:
    return queue.claim(holder, MODELS, closing=closing, idle_only=idle_only)


def claimed(queue: Queue) -> list[str]:
    """The tenants of all that waits, in the order in which it is claimed."""
    found = []
    while (work := claim(queue)) is not None:
        found.append(work.tenant)
    return found


def test_tenants_take_turns(queue: Queue, clock: Clock) -> None:
    for tenant in ["acme"] * 4 + ["zeta"] * 2:
        submit(queue, tenant)
        clock.now += 1
    assert claimed(queue) == ["acme", "zeta", "acme", "zeta", "acme", "acme"]


def test_a_heavier_tenant_has_more_turns(queue: Queue, clock: Clock) -> None:
    for _ in range(12):
        submit(queue, "acme", weight=2.0)
        submit(queue, "zeta")
        clock.now += 1
    assert Counter(claimed(queue)[:9]) == {"acme": 6, "zeta": 3}


def test_who_was_idle_gains_nothing_by_it(queue: Queue, clock: Clock) -> None:
    for _ in range(10):
        submit(queue, "acme")
        claim(queue)
        clock.now += 1
    for tenant in ["zeta"] * 3 + ["acme"] * 3:
        submit(queue, tenant)
        clock.now += 1
    assert claimed(queue) == ["zeta", "acme", "zeta", "acme", "zeta", "acme"]


def test_a_long_job_of_one_tenant_does_not_keep_another_waiting(queue: Queue, clock: Clock) -> None:
    """In a place for tenants of whom nothing runs, whatever waits of others."""
    for _ in range(3):
        submit(queue, "acme", "job", seconds=1_000)
    first = claim(queue)
    assert first is not None
    assert claim(queue, idle_only=True) is None
    small = submit(queue, "zeta", weight=0.01)
    taken = claim(queue, idle_only=True)
    assert taken is not None
    assert taken.id == small.id
    queue.end(first.id, "here", "completed", 0)
    after = claim(queue, idle_only=True)
    assert after is not None
    assert after.tenant == "acme"
    assert claim(queue, idle_only=True) is None
    clock.now += LEASE_SECONDS + 1
    again = claim(queue, "there", idle_only=True)  # The gateway that held it is dead.
    assert again is not None
    assert again.id == after.id


def test_one_makes_way_for_each_tenant_that_waits_and_of_whom_none_is_held(queue: Queue, clock: Clock) -> None:
    first, second = submit(queue, "acme", seconds=1_000), submit(queue, "acme", seconds=1_000)
    assert claim(queue) is not None
    assert claim(queue) is not None
    submit(queue, "acme", seconds=1_000)
    submit(queue, "zeta", seconds=1_000)
    assert not queue.makes_way(first.id, MODELS)  # A free place may take it yet.
    clock.now += WAITED_SECONDS
    assert [queue.makes_way(work.id, MODELS) for work in (first, second)] == [True, False]
    assert not queue.makes_way(first.id, ["other"])
    submit(queue, "third", seconds=1_000)
    clock.now += WAITED_SECONDS
    assert [queue.makes_way(work.id, MODELS) for work in (first, second)] == [True, True]
    for _ in range(2):
        assert claim(queue, idle_only=True) is not None
    assert not queue.makes_way(first.id, MODELS)


def test_whoever_made_way_waits_behind_all_others_and_is_waited_for_too(queue: Queue, clock: Clock) -> None:
    """Three tenants' endless works in one place: each has its turn, one after the other."""
    for tenant in ("acme", "zeta", "third"):
        submit(queue, tenant, "job", seconds=10_000)
        clock.now += 1
    turns = []
    for _ in range(7):
        work = claim(queue)
        assert work is not None
        turns.append(work.tenant)
        clock.now += WAITED_SECONDS
        assert queue.makes_way(work.id, MODELS)
        queue.release(work.id, "here", 0, is_last=True)
    assert turns == ["acme", "zeta", "third"] * 2 + ["acme"]


def test_nothing_is_taken_from_a_tenant_that_was_revoked(queue: Queue, clock: Clock, url: str) -> None:
    """By a gateway that has not heard of it yet."""
    store = TenantStore(database_address(url), clock=clock)
    store.create_tenant("acme")
    submit(queue, "acme")
    store.revoke_tenant("acme")
    store.close()
    with pytest.raises(ForbiddenError, match="revoked"):
        submit(queue, "acme")


def test_a_revoked_tenants_works_are_cancelled(queue: Queue, clock: Clock, url: str) -> None:
    store = TenantStore(database_address(url), clock=clock)
    store.create_tenant("acme")
    running, waiting, ended = (submit(queue, "acme", seconds=1_000) for _ in range(3))
    others = submit(queue, "zeta", seconds=1_000)
    assert claim(queue) is not None
    queue.cancel("acme", "batch", ended.id)
    assert claim(queue, closing=True) is not None
    queue.end(ended.id, "here", "cancelled", 0)
    store.revoke_tenant("acme")
    store.close()
    assert queue.renew(running.id, "here", "in_progress").status == "cancelling"
    found = claim(queue, closing=True)
    assert found is not None
    assert (found.id, found.told["cancelling_at"]) == (waiting.id, clock.now)
    assert queue.find("acme", "batch", ended.id).status == "cancelled"
    assert queue.find("zeta", "batch", others.id).status == "queued"


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0.01, 100)), max_size=20))
def test_a_turn_is_behind_what_has_begun_and_what_waits(cases: list[tuple[float, float, float]]) -> None:
    for begun, latest, weight in cases:
        assert next_turn(begun, latest, weight) > max(begun, latest)


def test_a_work_is_claimed_once_until_its_lease_lapses(queue: Queue, clock: Clock) -> None:
    work = submit(queue, "acme", seconds=1_000)
    first = claim(queue)
    assert first is not None
    assert (first.id, first.status) == (work.id, "validating")
    assert claim(queue, "there") is None
    clock.now += LEASE_SECONDS - 1
    assert queue.renew(work.id, "here", "in_progress", counts={"total": 3}).told["counts"] == {"total": 3}
    clock.now += LEASE_SECONDS - 1
    assert claim(queue, "there") is None
    clock.now += 2
    second = claim(queue, "there")
    assert second is not None
    assert (second.id, second.status) == (work.id, "in_progress")
    for lost in (
        lambda: queue.renew(work.id, "here"),
        lambda: queue.release(work.id, "here", 0),
        lambda: queue.end(work.id, "here", "completed", 0),
    ):
        with pytest.raises(LeaseLostError):
            lost()


def test_what_was_begun_goes_before_what_waits(queue: Queue, clock: Clock) -> None:
    begun = submit(queue, "acme", weight=0.1)
    assert claim(queue) is not None
    submit(queue, "zeta", weight=100)
    clock.now += LEASE_SECONDS + 1
    again = claim(queue, "there")
    assert again is not None
    assert again.id == begun.id


def test_a_released_work_waits_and_a_failure_is_counted(queue: Queue, clock: Clock) -> None:
    work = submit(queue, "acme")
    assert claim(queue) is not None
    queue.release(work.id, "here", 5, tries=3)
    assert claim(queue) is None
    clock.now += 6
    again = claim(queue)
    assert again is not None
    assert again.tries == 3
    queue.release(work.id, "here", 0)
    assert queue.find("acme", "batch", work.id).tries == 3


def test_a_cancelled_work_is_for_those_who_close(queue: Queue) -> None:
    work = submit(queue, "acme")
    assert queue.cancel("acme", "batch", work.id).status == "cancelling"
    assert queue.cancel("acme", "batch", work.id).status == "cancelling"
    assert claim(queue) is None
    closing = claim(queue, closing=True)
    assert closing is not None
    assert queue.renew(work.id, "here", "in_progress").status == "cancelling"
    queue.end(work.id, "here", "cancelled", 0)
    assert queue.cancel("acme", "batch", work.id).status == "cancelled"
    assert claim(queue, closing=True) is None


def test_an_expired_work_is_for_those_who_close(queue: Queue, clock: Clock) -> None:
    submit(queue, "acme", seconds=10)
    assert claim(queue, closing=True) is None
    clock.now += 10
    assert claim(queue) is None
    assert claim(queue, closing=True) is not None


def test_what_has_ended_is_not_cancelled_and_what_has_not_is_not_deleted(queue: Queue, clock: Clock) -> None:
    work = submit(queue, "acme", "job")
    with pytest.raises(UsageError, match="not ended"):
        queue.delete("acme", "job", work.id)
    assert claim(queue) is not None
    queue.end(work.id, "here", "completed", 7)
    told = queue.find("acme", "job", work.id).told
    assert told.keys() == {"in_progress_at", "finalizing_at", "completed_at"}
    with pytest.raises(UsageError, match="it is completed"):
        queue.cancel("acme", "job", work.id)
    assert queue.forget(clock.now) == []
    clock.now += 1
    assert [old.id for old in queue.forget(clock.now)] == [work.id]


@pytest.mark.parametrize("by", ["delete", "forget"])
def test_what_was_counted_of_a_work_stays_counted_and_its_sources_go_with_it(
    queue: Queue, database: Database, clock: Clock, url: str, by: str
) -> None:
    store = TenantStore(database_address(url), clock=clock)
    work, other = submit(queue, "acme", "job"), submit(queue, "acme", "job")
    likeness = work.id.replace("_", "x")  # What a LIKE would take for the same, were "_" not escaped.
    for source in (f"{work.id}/0/0", f"{work.id}/0/1", f"{other.id}/0/0", f"{likeness}/0/0", "gateway"):
        store.add_usage(source, [(1, UsageRecord("acme", "k", "demo", 10, 4, 5, clock.now, job=work.id))])
    (before,) = store.usage([])
    assert claim(queue) is not None
    queue.end(work.id, "here", "completed", 0)
    if by == "delete":
        queue.delete("acme", "job", work.id)
    else:
        assert [old.id for old in queue.forget(clock.now + 1)] == [work.id]
    with database.session() as session:
        assert set(session.scalars(select(SourceRow.source))) == {f"{other.id}/0/0", f"{likeness}/0/0", "gateway"}
    assert store.usage([]) == [before]
    store.close()


def test_another_tenants_work_and_one_of_another_kind_are_not_there(queue: Queue) -> None:
    work = submit(queue, "acme")
    for tenant, kind in (("zeta", "batch"), ("acme", "job")):
        for ask in (queue.find, queue.cancel, queue.delete):
            with pytest.raises(NotFoundError):
                ask(tenant, kind, work.id)  # type: ignore[arg-type]
        assert queue.page(tenant, kind, Page(10)) == ([], False)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        queue.page("zeta", "batch", Page(10, after=work.id))


def test_a_tenant_has_so_many_unfinished_works(database: Database) -> None:
    queue = Queue(database, unfinished=2)
    first, _ = submit(queue, "acme"), submit(queue, "acme")
    with pytest.raises(LimitError, match="2 batches and jobs"):
        submit(queue, "acme")
    assert claim(queue) is not None
    queue.end(first.id, "here", "failed", 0)
    submit(queue, "acme")
    submit(queue, "zeta")


def test_a_model_that_is_not_served_here_is_left_to_others(queue: Queue) -> None:
    submit(queue, "acme")
    assert queue.claim("here", ["other"]) is None
    assert queue.claim("here", []) is None


def test_the_bound_holds_for_who_submit_at_once(database: Database) -> None:
    queue = Queue(database, unfinished=3)

    def is_taken(_: int) -> bool:
        try:
            submit(queue, "acme")
        except LimitError:
            return False
        return True

    with ThreadPoolExecutor(5) as pool:
        assert sum(pool.map(is_taken, range(15))) == 3
    assert len(queue.page("acme", "batch", Page(10))[0]) == 3


def test_what_is_cut_short_ends_although_its_model_is_served_no_more(queue: Queue, clock: Clock) -> None:
    expiring, cancelled = submit(queue, "acme", seconds=10), submit(queue, "acme", seconds=10_000)
    queue.cancel("acme", "batch", cancelled.id)
    clock.now += GONE_SECONDS
    found = queue.claim("here", ["other"], closing=True)
    assert found is not None
    assert found.id == cancelled.id
    assert queue.claim("here", ["other"], closing=True) is None
    clock.now += 10
    found = queue.claim("here", ["other"], closing=True)
    assert found is not None
    assert found.id == expiring.id


def test_pages_go_on_behind_the_last_one(queue: Queue, clock: Clock) -> None:
    ids = []
    for number in range(5):
        ids.append(submit(queue, "acme").id)
        clock.now += number % 2
    seen, after = list[str](), None
    while True:
        works, more = queue.page("acme", "batch", Page(2, after))
        seen += [work.id for work in works]
        if not more:
            break
        after = works[-1].id
    assert sorted(seen) == sorted(ids)
    assert len(seen) == 5
