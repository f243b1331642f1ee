"""What was used: records of requests, each counted once, and reports of their sums."""

import datetime
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from serving.tenants.tables import KeyRow, SourceRow, UsageRow

Dimension = Literal["tenant", "day", "model", "key", "job"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "requests")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What a request used until ``at`` (seconds since 1970), its end but for long streams; ``key`` is a public id.

    ``cached_tokens`` of the ``prompt_tokens`` were found in the prefix cache. ``job`` is empty for what people asked
    for themselves. ``requests`` is how many the record stands for: 0 where an earlier one began the request.
    """

    tenant: str
    key: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    at: float
    job: str = ""
    requests: int = 1

    @property
    def day(self) -> datetime.date:
        """The day in UTC."""
        return datetime.datetime.fromtimestamp(self.at, datetime.UTC).date()


Numbered = tuple[int, UsageRecord]
"""A record and its number among those of its source, from 1."""


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Sums of a report; what it is not parted by is empty. ``day`` is written YYYY-MM-DD."""

    tenant: str = ""
    day: str = ""
    model: str = ""
    key: str = ""
    job: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """What a report is of: a tenant, key or job, the days from ``since`` to ``until``, both included; None: all."""

    tenant: str | None = None
    key: str | None = None
    job: str | None = None
    since: datetime.date | None = None
    until: datetime.date | None = None


EVERYTHING = UsageFilter()


def count(session: Session, source: str, numbered: Sequence[Numbered]) -> int:
    """Add a source's records that were not counted before to the sums; returns how many those were.

    The numbers of a source come in ascending order, so the latest alone says what was counted, until the source is
    forgotten: a record that is offered again, by whomever and whenever, changes nothing.
    """
    session.execute(_insert(session)(SourceRow).values(source=source, latest=0).on_conflict_do_nothing())
    row = session.get_one(SourceRow, source, with_for_update=True)
    new = [record for number, record in numbered if number > row.latest]
    if new:
        row.latest = max(number for number, _ in numbered)
        _add(session, new)
    return len(new)


def forget_sources(session: Session, beginning: str) -> None:
    """Forget sources whose names begin so, of which nothing is offered any more; what they used stays counted."""
    session.execute(delete(SourceRow).where(SourceRow.source.startswith(beginning, autoescape=True)))


def report(session: Session, by: Sequence[Dimension], wanted: UsageFilter) -> list[UsageLine]:
    """Sums of what is wanted, parted and ordered by the dimensions."""
    columns = [UsageRow.__table__.c[name] for name in by]
    sums = [func.coalesce(func.sum(UsageRow.__table__.c[name]), 0).label(name) for name in COUNTS]
    query = select(*columns, *sums).where(*_conditions(wanted)).group_by(*columns).order_by(*columns)
    return [_line(row, by) for row in session.execute(query).mappings()]


def _line(row: Mapping[Any, Any], by: Sequence[Dimension]) -> UsageLine:
    """PostgreSQL's sums are decimals, SQLite's integers."""
    values: dict[str, Any] = {name: str(row[name]) for name in by}
    return UsageLine(**values | {name: int(row[name]) for name in COUNTS})


def _conditions(wanted: UsageFilter) -> list[ColumnElement[bool]]:
    equal = {UsageRow.tenant: wanted.tenant, UsageRow.key: wanted.key, UsageRow.job: wanted.job}
    conditions = [column == value for column, value in equal.items() if value is not None]
    if wanted.since is not None:
        conditions.append(UsageRow.day >= wanted.since)
    if wanted.until is not None:
        conditions.append(UsageRow.day <= wanted.until)
    return conditions


def _add(session: Session, records: Sequence[UsageRecord]) -> None:
    insert = _insert(session)(UsageRow).values(_sums(records))
    added = {name: UsageRow.__table__.c[name] + insert.excluded[name] for name in COUNTS}
    session.execute(insert.on_conflict_do_update(index_elements=list(DIMENSIONS), set_=added))
    for key, at in sorted({record.key: record.at for record in sorted(records, key=lambda r: r.at)}.items()):
        earlier = or_(KeyRow.last_used.is_(None), KeyRow.last_used < at)
        session.execute(update(KeyRow).where(KeyRow.public_id == key, earlier).values(last_used=at))


def _sums(records: Sequence[UsageRecord]) -> list[dict[str, Any]]:
    """One row for each group, in the order in which all gateways lock them: others would wait for each other."""
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * len(COUNTS))
    for record in records:
        total = sums[tuple(getattr(record, name) for name in DIMENSIONS)]
        for index, name in enumerate(COUNTS):
            total[index] += getattr(record, name)
    return [dict(zip((*DIMENSIONS, *COUNTS), (*group, *total), strict=True)) for group, total in sorted(sums.items())]


def _insert(session: Session) -> Callable[[Any], sqlite.Insert | postgresql.Insert]:
    """The database's own INSERT, which knows ON CONFLICT."""
    return sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
