"""The tables of the database of tenants; times are seconds since 1970, days are UTC's."""

import datetime
from typing import Annotated, Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from serving.tenants.caller import Caller, Limits, Role
from serving.tenants.terms import Terms

Real = Annotated[float, mapped_column(Double)]
Count = Annotated[int, mapped_column(BigInteger)]


class Table(DeclarativeBase):
    """Base of the tables; they are named ``spanfill_...`` since a PostgreSQL database may be shared."""


class Limited:
    """The columns of ``Limits``."""

    tokens_per_minute: Mapped[Count | None]
    requests_per_minute: Mapped[Count | None]
    max_concurrency: Mapped[Count | None]

    @property
    def limits(self) -> Limits:
        """What the tenant or key may use by itself."""
        return Limits(self.tokens_per_minute, self.requests_per_minute, self.max_concurrency)

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self.tokens_per_minute = limits.tokens_per_minute
        self.requests_per_minute = limits.requests_per_minute
        self.max_concurrency = limits.concurrency

    def _limits_as_dict(self) -> dict[str, Any]:
        names = ("tokens_per_minute", "requests_per_minute", "max_concurrency")
        return {name: getattr(self, name) for name in names}


class TenantRow(Limited, Table):
    """A tenant; a revoked one keeps its name and its usage."""

    __tablename__ = "spanfill_tenants"

    name: Mapped[str] = mapped_column(primary_key=True)
    weight: Mapped[Real]
    models: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    created: Mapped[Real]
    revoked: Mapped[Real | None]

    @property
    def terms(self) -> Terms:
        """What the tenant may use."""
        return Terms(self.weight, self.limits, None if self.models is None else tuple(self.models))

    @terms.setter
    def terms(self, terms: Terms) -> None:
        self.weight, self.limits = terms.weight, terms.limits
        self.models = None if terms.models is None else list(terms.models)

    def as_dict(self) -> dict[str, Any]:
        """What people are shown."""
        own = {"name": self.name, "weight": self.weight, "models": self.models}
        return own | self._limits_as_dict() | {"created": self.created, "revoked": self.revoked}


class KeyRow(Limited, Table):
    """A key of a tenant, by its public id; after a rotation the former secret is good until ``previous_until``."""

    __tablename__ = "spanfill_keys"

    public_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("spanfill_tenants.name"))
    name: Mapped[str]
    role: Mapped[Role] = mapped_column(String)
    secret_hash: Mapped[str]
    previous_hash: Mapped[str | None]
    previous_until: Mapped[Real | None]
    created: Mapped[Real]
    expires: Mapped[Real | None]
    revoked: Mapped[Real | None]
    last_used: Mapped[Real | None]
    owner: Mapped[TenantRow] = relationship(lazy="joined", innerjoin=True)

    @property
    def caller(self) -> Caller:
        """Who calls with this key."""
        terms = self.owner.terms
        return Caller(self.tenant, self.public_id, self.role, terms.weight, terms.limits, self.limits, terms.models)

    def as_dict(self) -> dict[str, Any]:
        """What people are shown: no hash."""
        times = {name: getattr(self, name) for name in ("created", "expires", "revoked", "last_used")}
        own = {"id": self.public_id, "tenant": self.tenant, "name": self.name, "role": self.role}
        return own | self._limits_as_dict() | times


class UsageRow(Table):
    """What was used on a day; ``key`` is a public id, ``job`` empty for what people asked for themselves.

    No row of the other tables is needed for it: what was used counts whatever became of them.
    """

    __tablename__ = "spanfill_usage"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[datetime.date] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(primary_key=True)
    prompt_tokens: Mapped[Count]
    cached_tokens: Mapped[Count]
    completion_tokens: Mapped[Count]
    requests: Mapped[Count]


class SourceRow(Table):
    """How far a source of usage records was counted: each has its number there, and they come in order."""

    __tablename__ = "spanfill_usage_sources"

    source: Mapped[str] = mapped_column(primary_key=True)
    latest: Mapped[Count]


class FileRow(Table):
    """A file that a tenant stored or that was made for it; its bytes lie on a disk under its id, ``name`` is no path.

    ``purpose`` is ``batch`` or ``job`` for what is read, ``batch_output`` for what was made. ``key`` is a public id.
    """

    __tablename__ = "spanfill_files"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    key: Mapped[str]
    purpose: Mapped[str]
    name: Mapped[str]
    bytes: Mapped[Count]
    created: Mapped[Real]
    expires: Mapped[Real]


class WorkRow(Table):
    """A batch or job that runs in the background, and who holds it until when: ``holder``, ``held_until``.

    ``details`` is what was asked for, ``told`` what has come of it. ``turn`` orders those that wait; none begins before
    ``ready``. ``tries`` counts failures, ``bytes`` what its input takes and, once it has ended, its results instead.
    ``source`` is a file's id or a URI.
    """

    __tablename__ = "spanfill_works"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    tenant: Mapped[str] = mapped_column(index=True)
    key: Mapped[str]
    model: Mapped[str]
    status: Mapped[str]
    source: Mapped[str]
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    told: Mapped[dict[str, Any]] = mapped_column(JSON)
    bytes: Mapped[Count]
    created: Mapped[Real]
    expires: Mapped[Real | None]
    ended: Mapped[Real | None]
    turn: Mapped[Real]
    ready: Mapped[Real]
    tries: Mapped[Count]
    holder: Mapped[str | None]
    held_until: Mapped[Real | None]


def cancel_work(work: WorkRow, now: float) -> None:
    """Ask for the end of a work that has not ended, now rather than when it is ready."""
    if work.status != "cancelling":
        work.status, work.ready = "cancelling", now
        work.told = {**work.told, "cancelling_at": now}
