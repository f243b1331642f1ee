"""Transactions on the database of tenants, whose schema is brought up to date before the first one."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, BigInteger, func, literal, select
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from serving.tenants.database import answering, open_engine, writing
from serving.tenants.schema import prepare


class Sessions:
    """The database at ``address``, which is asked for nothing before it is first used; usable from several threads.

    Raises ``ConfigError`` when an embedded database cannot be made.
    """

    def __init__(self, address: URL) -> None:
        self.address = address
        self._engine = open_engine(address)
        self._preparing = threading.Lock()
        self._is_prepared = False

    def close(self) -> None:
        """Close the connections; a later use opens new ones."""
        self._engine.dispose()

    @contextmanager
    def begin(self, *, writes: bool = False) -> Iterator[Session]:
        """A transaction, committed at the end; its rows can be read afterwards.

        Raises ``DatabaseAwayError`` when the database cannot be used now, ``DatabaseUnfitError`` when it never can be
        as it is.
        """
        engine = writing(self._engine) if writes else self._engine
        with answering(self.address):
            self._prepare()
            try:
                with Session(engine, expire_on_commit=False) as session, session.begin():
                    yield session
            except ProgrammingError:
                self._is_prepared = False  # Tables are missing: an empty database has taken its place.
                raise

    def _prepare(self) -> None:
        with self._preparing:
            if not self._is_prepared:
                prepare(self._engine)
                self._is_prepared = True


def take_turns(session: Session, tenant: str) -> None:
    """Let others who count what a tenant has, before they add to it, wait for this transaction's end.

    On SQLite every transaction that writes is alone anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        number = int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8).digest(), signed=True)
        session.execute(select(func.pg_advisory_xact_lock(literal(number, BigInteger))))
