"""Files and works in the database of tenants: sessions, ids that nobody guesses, rows that only their tenant finds."""

import re
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import URL, ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from serving.errors import NotFoundError
from serving.tenants.sessions import Sessions
from serving.tenants.tables import FileRow, WorkRow

ID = re.compile(r"(file-|batch_|job_)[0-9a-f]{32}")
MOST_TOLD_CHARS = 64

Row = TypeVar("Row", FileRow, WorkRow)


def new_id(prefix: str) -> str:
    """An id of 128 random bits behind what tells its kind."""
    return prefix + secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list by time: ``limit`` rows behind the one whose id is ``after``; the newest come first, or last."""

    limit: int
    after: str | None = None
    ascending: bool = False


class Database:
    """Transactions on the database at ``address``; every one raises ``DatabaseAwayError`` when it does not answer."""

    def __init__(self, address: URL, *, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._sessions = Sessions(address)

    def close(self) -> None:
        """Close the connections; a later use opens new ones."""
        self._sessions.close()

    def session(self, *, writes: bool = False) -> AbstractContextManager[Session]:
        """A transaction, committed at the end; its rows can be read afterwards."""
        return self._sessions.begin(writes=writes)


def find_row(session: Session, table: type[Row], row_id: str, *mine: ColumnElement[bool], lock: bool = False) -> Row:
    """The row of an id among those that are ``mine``; raises ``NotFoundError``, whatever others have."""
    found = None
    if ID.fullmatch(row_id):
        query = select(table).where(table.id == row_id, *mine)
        found = session.scalars(query.with_for_update() if lock else query).first()
    if found is None:
        raise NotFoundError(f"There is no {row_id[:MOST_TOLD_CHARS]!r}.", remedy="List what there is for this key.")
    return found


def read_page(session: Session, table: type[Row], page: Page, *mine: ColumnElement[bool]) -> tuple[list[Row], bool]:
    """The rows of a page among those that are ``mine``, and whether more follow; raises ``NotFoundError``."""
    query = select(table).where(*mine)
    if page.after is not None:
        query = query.where(_behind(table, find_row(session, table, page.after, *mine), ascending=page.ascending))
    if page.ascending:
        query = query.order_by(table.created, table.id)
    else:
        query = query.order_by(table.created.desc(), table.id.desc())
    rows = list(session.scalars(query.limit(page.limit + 1)))
    return rows[: page.limit], len(rows) > page.limit


def _behind(table: type[Row], last: Row, *, ascending: bool) -> ColumnElement[bool]:
    if ascending:
        return or_(table.created > last.created, and_(table.created == last.created, table.id > last.id))
    return or_(table.created < last.created, and_(table.created == last.created, table.id < last.id))
