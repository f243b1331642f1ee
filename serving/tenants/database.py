"""The database of tenants: which one is meant, how it is opened, and what is said when it does not answer."""

import hashlib
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from serving.errors import ConfigError, DatabaseAwayError
from serving.home import DATABASE_VARIABLE, database_url, home_folder

POSTGRESQL_PORT = 5_432
POSTGRESQL_OPTIONS = {"connect_timeout": 3, "tcp_user_timeout": 5_000}
"""Seconds and milliseconds (libpq) until a server that does not answer counts as away; the URL's own options win."""

SQLITE_OPTIONS = {"timeout": 5.0}
"""Seconds to wait for a writer."""

POOL_SECONDS = 5.0
REMEDY = f"Set {DATABASE_VARIABLE} to a PostgreSQL database, for example postgresql://user@host/spanfill"


def database_address(url: str | None = None) -> URL:
    """The database at ``url``, else of ``SPANFILL_DATABASE_URL``, else the SQLite file in spanfill's home.

    Raises ``ConfigError`` for what is no URL of PostgreSQL or of an SQLite file.
    """
    text = url or database_url()
    if text is None:
        return URL.create("sqlite", database=str(home_folder() / "spanfill.db"))
    try:
        address = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError(f"{DATABASE_VARIABLE} is no database URL.", remedy=f"{REMEDY}.") from None
    backend = address.drivername.partition("+")[0]
    if backend in ("postgres", "postgresql"):
        return address.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and address.database not in (None, "", ":memory:"):
        return address.set(drivername="sqlite", database=str(Path(str(address.database)).expanduser().absolute()))
    raise ConfigError(
        f"{DATABASE_VARIABLE} = {address.render_as_string()} is neither PostgreSQL nor an SQLite file.",
        remedy=f"{REMEDY}, or leave it out for an SQLite file in {home_folder()}.",
    )


def is_embedded(address: URL) -> bool:
    """Whether it is an SQLite file."""
    return address.drivername == "sqlite"


def refuse_embedded(url: str | None, nodes: Collection[str]) -> None:
    """Raise ``ConfigError`` for an SQLite database where gateways may run on several nodes: it is one node's file."""
    names = sorted(set(nodes))
    if len(names) > 1 and is_embedded(database_address(url)):
        raise ConfigError(
            f"A gateway may start on any of {len(names)} nodes ({', '.join(names)}), and the database of tenants is an "
            "SQLite file, which one of them alone has.",
            remedy=f"{REMEDY}.",
        )


def fingerprint(address: URL) -> str:
    """Twelve hexadecimal digits that tell a database from others, whoever opens it and with what options."""
    host = address.host or address.query.get("host")
    port = None if is_embedded(address) else address.port or POSTGRESQL_PORT
    text = f"{address.drivername} {host} {port} {address.database}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_engine(address: URL) -> Engine:
    """An engine that has not connected yet; an SQLite file is made where it is missing, for its owner alone.

    Connections are tried before they are used, so that the first use after an outage finds none of before it. Raises
    ``ConfigError`` when the file cannot be made.
    """
    embedded = is_embedded(address)
    options: Mapping[str, float] = SQLITE_OPTIONS if embedded else POSTGRESQL_OPTIONS
    if embedded:
        _make_file(embedded_file(address))
    engine = create_engine(
        address,
        connect_args={name: value for name, value in options.items() if name not in address.query},
        pool_pre_ping=True,
        pool_timeout=POOL_SECONDS,
        hide_parameters=True,
    )
    if embedded:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def embedded_file(address: URL) -> Path:
    """The file of an embedded database."""
    return Path(str(address.database))


def writing(engine: Engine) -> Engine:
    """The same engine for transactions that write: on SQLite they take the write lock when they begin.

    One that begins to read and then writes fails at once where another has written in between, however long it may
    wait.
    """
    return engine.execution_options(writes=True)


@contextmanager
def answering(address: URL) -> Iterator[None]:
    """Raise ``DatabaseAwayError`` for whatever a database says, or its driver for it, but a broken constraint.

    Besides one that is gone that is one that only reads, as after a failover, lacks its tables or is damaged: whoever
    asks again and again is answered when it is mended.
    """
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeoutError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise DatabaseAwayError(
            f"The database {address.render_as_string()} does not answer as it should: {' '.join(str(cause).split())}.",
            remedy=f"Look whether it runs and {DATABASE_VARIABLE} names it, then try again.",
        ) from error


def _make_file(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"The database {path} cannot be made: {error.strerror}.",
            remedy=f"Set SPANFILL_HOME to a folder that can be written, or {DATABASE_VARIABLE}.",
        ) from None


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # Else the driver itself decides when a transaction begins.
    # What is committed here is deleted from the journals of usage, so it must be on the disk.
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
