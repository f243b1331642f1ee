"""Databases for the tests of tenants: an SQLite file and a PostgreSQL server, both real."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.tenants.database import database_address, open_engine
from serving.tenants.schema import VERSION_TABLE
from serving.tenants.store import TenantStore
from tests.serving.tenants.postgres import Postgres, own_server


@dataclass
class Clock:
    """Seconds since 1970, as the test says: at first noon of 2027-01-15 in UTC."""

    now: float = 1_800_014_400.0

    def __call__(self) -> float:
        return self.now


def until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Wait until it holds; fails when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


@contextmanager
def of_a_later_spanfill(url: str) -> Iterator[None]:
    """A database whose schema no process of this version knows that has not opened it yet."""
    engine = open_engine(database_address(url))

    def write(version: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")

    with engine.begin() as connection:
        version = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar_one()
    write("9999")
    yield
    write(version)
    engine.dispose()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests."""
    with own_server() as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path / 'spanfill.db'}"


@pytest.fixture(params=["sqlite_url", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite_url":
        return str(request.getfixturevalue("sqlite_url"))
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def clock() -> Clock:
    """The time of ``store``."""
    return Clock()


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[TenantStore]:
    """An empty store on either database."""
    opened = TenantStore(database_address(url), clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(sqlite_url: str, clock: Clock) -> Iterator[TenantStore]:
    """An empty store for what does not ask which database it is."""
    opened = TenantStore(database_address(sqlite_url), clock=clock)
    yield opened
    opened.close()
