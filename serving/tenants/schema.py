"""The database's schema is brought up to date when it is opened, by one process at a time."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, BigInteger, Connection, Engine, func, literal, select
from sqlalchemy.exc import ProgrammingError

from serving.errors import DatabaseUnfitError
from serving.tenants.database import embedded_file, is_embedded, writing

VERSION_TABLE = "spanfill_version"
MIGRATIONS = Path(__file__).with_name("migrations")

LOCK_NUMBER = 0x7370616E66696C6C
"""Which of PostgreSQL's advisory locks is ours: "spanfill" in ASCII."""

_alembic = threading.Lock()
"""Alembic keeps the migration that runs in variables of its modules."""


def prepare(engine: Engine) -> None:
    """Run the migrations that the database lacks, all in one transaction.

    Of several processes that open a new database at once, one does it and the others wait. Raises
    ``DatabaseUnfitError`` for a database of a later version, and where its user may not make tables.
    """
    with _alembic, _alone(engine.url):
        if is_embedded(engine.url):
            _write_ahead(engine)
        with writing(engine).begin() as connection:
            if not is_embedded(engine.url):
                connection.execute(select(func.pg_advisory_xact_lock(literal(LOCK_NUMBER, BigInteger))))
            _upgrade(connection)


@contextmanager
def _alone(address: URL) -> Iterator[None]:
    """Hold an embedded database's lock file: two who switch to the write-ahead log at once do not wait, but fail."""
    if not is_embedded(address):
        yield
        return
    file = embedded_file(address)
    lock = os.open(file.with_name(f"{file.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write_ahead(engine: Engine) -> None:
    """Let readers and a writer go on side by side; the file remembers it."""
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise DatabaseUnfitError(
            f"The database {connection.engine.url.render_as_string()} cannot be brought up to date: {error}.",
            remedy="It is of a later spanfill: install that one.",
        ) from None
    except ProgrammingError as error:
        raise DatabaseUnfitError(
            f"The tables of {connection.engine.url.render_as_string()} cannot be made: {error.orig}.",
            remedy="Let its user own the database, or create in its schema.",
        ) from None
