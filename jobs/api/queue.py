"""Batches and jobs in the database: who asked for them, whose turn it is, which gateway runs them.

A gateway claims a work for ``LEASE_SECONDS`` and renews that while it runs it. One that a dead gateway left is claimed
by another and goes on where it was. Clocks of gateways may differ by less than the lease; should two run one work all
the same, the lease of its output folder lets one of them wait.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.orm import Session, aliased

from jobs.api.database import Database, Page, find_row, read_page
from jobs.api.order import Kind
from serving.errors import ForbiddenError, LeaseLostError, LimitError, UsageError
from serving.tenants.sessions import take_turns
from serving.tenants.tables import TenantRow, WorkRow, cancel_work
from serving.tenants.usage import forget_sources

LEASE_SECONDS = 30.0
WAIT_SECONDS = 60.0
"""When a tenant with too many unfinished works is told to come again."""

WAITED_SECONDS = 5.0
"""For how long a work waits before another makes way for it: a free place takes it within a second."""

GONE_SECONDS = 600.0
"""When a work that is cut short is ended by any gateway, although none that serves its model has come."""

Status = Literal[
    "queued", "validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled"
]
"""A batch is ``validating`` while its lines are read; a job is ``in_progress`` at once."""

UNFINISHED: tuple[Status, ...] = ("queued", "validating", "in_progress", "finalizing", "cancelling")

HELD = aliased(WorkRow)

BEFORE: dict[Status, tuple[Status, ...]] = {
    "finalizing": ("in_progress",),
    "completed": ("in_progress", "finalizing"),
}


def next_turn(begun: float, latest: float, weight: float) -> float:
    """The turn of a tenant's new work: the smallest is next, so that tenants take turns in proportion to their weights.

    ``begun`` is the largest turn of a work that has begun, ``latest`` that of the tenant's own. Self-clocked fair
    queueing (Golestani, INFOCOM 1994) with works of one size: who has been idle gains nothing by it.
    """
    return max(begun, latest) + 1.0 / weight


def kind_of(work: WorkRow) -> Kind:
    """Whether a work is a batch or a job."""
    return "batch" if work.kind == "batch" else "job"


class Queue:
    """Works by their tenants; every method raises ``DatabaseAwayError``."""

    def __init__(self, database: Database, *, unfinished: int) -> None:
        self._database = database
        self._unfinished = unfinished

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds since 1970."""
        return self._database.clock

    def submit(self, work: WorkRow, *, weight: float) -> WorkRow:
        """Put a new work in its tenant's place.

        Raises ``LimitError`` when the tenant has too many unfinished ones, ``ForbiddenError`` when it was revoked.
        """
        own = WorkRow.tenant == work.tenant
        with self._database.session(writes=True) as session:
            take_turns(session, work.tenant)
            if session.scalar(select(TenantRow.revoked).where(TenantRow.name == work.tenant)) is not None:
                raise ForbiddenError(f"The tenant {work.tenant} was revoked.", remedy="Ask an admin.")
            waiting = session.scalar(select(func.count()).where(own, WorkRow.status.in_(UNFINISHED))) or 0
            if waiting >= self._unfinished:
                raise LimitError(
                    f"{waiting} batches and jobs of this tenant are not finished.",
                    remedy="Wait for one, or cancel it.",
                    retry_after=WAIT_SECONDS,
                )
            begun, latest = _largest(session, WorkRow.status != "queued"), _largest(session, own)
            work.turn = next_turn(begun, latest, weight)
            session.add(work)
        return work

    def find(self, tenant: str, kind: Kind, work_id: str) -> WorkRow:
        """A tenant's work; raises ``NotFoundError``, for another's too."""
        with self._database.session() as session:
            return find_row(session, WorkRow, work_id, *_own(tenant, kind))

    def page(self, tenant: str | None, kind: Kind, page: Page) -> tuple[list[WorkRow], bool]:
        """A part of a tenant's works, or of everybody's, and whether more follow; raises ``NotFoundError``."""
        with self._database.session() as session:
            return read_page(session, WorkRow, page, *_own(tenant, kind))

    def cancel(self, tenant: str | None, kind: Kind, work_id: str) -> WorkRow:
        """Ask for the end of a tenant's work, or of anybody's.

        Raises ``NotFoundError``, and ``UsageError`` for one that has ended by itself.
        """
        now = self.clock()
        with self._database.session(writes=True) as session:
            work = find_row(session, WorkRow, work_id, *_own(tenant, kind), lock=True)
            if work.status in UNFINISHED:
                cancel_work(work, now)
            elif work.status != "cancelled":
                raise UsageError(f"The {kind} has ended: it is {work.status}.", remedy="There is nothing to cancel.")
        return work

    def delete(self, tenant: str, kind: Kind, work_id: str) -> WorkRow:
        """Forget a work that has ended; raises ``NotFoundError``, and ``UsageError`` for one that has not."""
        with self._database.session(writes=True) as session:
            work = find_row(session, WorkRow, work_id, *_own(tenant, kind), lock=True)
            if work.status in UNFINISHED:
                raise UsageError(f"The {kind} has not ended: it is {work.status}.", remedy="Cancel it before.")
            _forget(session, work)
        return work

    def forget(self, before: float) -> list[WorkRow]:
        """Forget the works that ended before a time; returns them."""
        with self._database.session(writes=True) as session:
            works = list(session.scalars(select(WorkRow).where(WorkRow.ended < before)))
            for work in works:
                _forget(session, work)
        return works

    def claim(
        self, holder: str, models: Sequence[str], *, closing: bool = False, idle_only: bool = False
    ) -> WorkRow | None:
        """Take a work of one of the models that nobody holds: one that a dead gateway had begun, else whose turn it is.

        Turns are first of tenants of whom no work is held, with ``idle_only`` of them alone. With ``closing``, one that
        was cancelled or whose time is over; of any model, once it has waited for long.
        """
        now = self.clock()
        left = case((WorkRow.holder.is_not(None), 0), else_=1)
        busy = case((_of_idle_tenants(now), 0), else_=1)
        query = (
            select(WorkRow)
            .where(WorkRow.status.in_(UNFINISHED), WorkRow.ready <= now)
            .where(_of(models, now, closing=closing), _free(now), _due(now, closing=closing))
            .order_by(left, busy, WorkRow.turn, WorkRow.created)
            .limit(1)
        )
        if idle_only:
            query = query.where(_of_idle_tenants(now))
        with self._database.session() as session:
            if session.scalars(query).first() is None:  # Looking alone keeps no writer waiting.
                return None
        with self._database.session(writes=True) as session:
            work = session.scalars(query.with_for_update(skip_locked=True)).first()
            if work is not None:
                work.holder, work.held_until = holder, now + LEASE_SECONDS
                if work.status == "queued" and not closing:
                    _move(work, "validating" if work.kind == "batch" else "in_progress", now)
        return work

    def makes_way(self, work_id: str, models: Sequence[str]) -> bool:
        """Whether a work that is held shall make way: one for each tenant that waits and of whom none is held."""
        now = self.clock()
        waits = (WorkRow.status.in_(UNFINISHED), WorkRow.ready <= now - WAITED_SECONDS, WorkRow.model.in_(models))
        tenants = select(func.count(WorkRow.tenant.distinct())).where(
            *waits, _free(now), _due(now, closing=False), _of_idle_tenants(now)
        )
        held = select(WorkRow.id).where(WorkRow.held_until >= now, WorkRow.model.in_(models))
        with self._database.session() as session:
            waiting = session.scalar(tenants) or 0
            return work_id in session.scalars(held.order_by(WorkRow.turn, WorkRow.created).limit(waiting)).all()

    def renew(
        self, work_id: str, holder: str, status: Status | None = None, *, size: int | None = None, **told: Any
    ) -> WorkRow:
        """Hold a work for another while, and say how far it is; raises ``LeaseLostError``.

        ``size`` is the bytes of what it reads and has made, where that may have changed. A work that is to be cancelled
        stays so, whatever its ``status`` would be.
        """
        now = self.clock()
        with self._database.session(writes=True) as session:
            work = _held(session, work_id, holder)
            work.held_until, work.told = now + LEASE_SECONDS, {**work.told, **told}
            work.bytes = work.bytes if size is None else size
            if status is not None and work.status not in (status, "cancelling"):
                _move(work, status, now)
        return work

    def release(
        self, work_id: str, holder: str, seconds: float, *, tries: int | None = None, is_last: bool = False
    ) -> None:
        """Let go of a work, which is claimed again after ``seconds``; ``tries`` is how often it has failed by now.

        One that ``is_last`` gets a turn behind all that wait. Raises ``LeaseLostError``.
        """
        with self._database.session(writes=True) as session:
            work = _held(session, work_id, holder)
            if is_last:
                latest = _largest(session, WorkRow.status.in_(UNFINISHED))
                work.turn = next_turn(latest, work.turn, work.details.get("weight", 1.0))
            work.holder = work.held_until = None
            work.ready = self.clock() + seconds
            work.tries = work.tries if tries is None else tries

    def end(self, work_id: str, holder: str, status: Status, size: int, **told: Any) -> None:
        """Say how a work has ended, and the bytes of its results; raises ``LeaseLostError``."""
        now = self.clock()
        with self._database.session(writes=True) as session:
            work = _held(session, work_id, holder)
            work.told = {**work.told, **told}
            _move(work, status, now)
            work.holder = work.held_until = None
            work.ended, work.bytes = now, size


def _own(tenant: str | None, kind: Kind) -> tuple[ColumnElement[bool], ...]:
    ours = WorkRow.kind == kind
    return (ours,) if tenant is None else (WorkRow.tenant == tenant, ours)


def _free(now: float) -> ColumnElement[bool]:
    return or_(WorkRow.held_until.is_(None), WorkRow.held_until < now)


def _of_idle_tenants(now: float) -> ColumnElement[bool]:
    return WorkRow.tenant.not_in(select(HELD.tenant).where(HELD.held_until >= now))


def _of(models: Sequence[str], now: float, *, closing: bool) -> ColumnElement[bool]:
    ours = WorkRow.model.in_(models)
    if not closing:
        return ours
    long_ago = now - GONE_SECONDS
    cancelled = and_(WorkRow.status == "cancelling", WorkRow.ready <= long_ago)
    return or_(ours, cancelled, WorkRow.expires <= long_ago)


def _due(now: float, *, closing: bool) -> ColumnElement[bool]:
    if closing:
        return or_(WorkRow.status == "cancelling", WorkRow.expires <= now)
    return and_(WorkRow.status != "cancelling", or_(WorkRow.expires.is_(None), WorkRow.expires > now))


def _largest(session: Session, of: ColumnElement[bool]) -> float:
    return session.scalar(select(func.max(WorkRow.turn)).where(of)) or 0.0


def _held(session: Session, work_id: str, holder: str) -> WorkRow:
    work = session.get(WorkRow, work_id, with_for_update=True)
    if work is None or work.holder != holder:
        raise LeaseLostError(f"{work_id} was claimed by another gateway.", remedy="Leave it to that one.")
    return work


def _forget(session: Session, work: WorkRow) -> None:
    """Delete a work, and that its units were counted."""
    session.delete(work)
    forget_sources(session, f"{work.id}/")


def _move(work: WorkRow, status: Status, now: float) -> None:
    """Give a work another status and the time; it has been in those before, too, however short."""
    before = {f"{name}_at": now for name in BEFORE.get(status, ())}
    work.status, work.told = status, {**before, **work.told, f"{status}_at": now}
