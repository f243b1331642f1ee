"""Keys as a gateway looks them up: seldom, never stale for long, and through any outage."""

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.errors import AuthenticationError, DatabaseAwayError
from serving.tenants.caller import Caller
from serving.tenants.directory import AWAY_SECONDS, FRESH_SECONDS, RETRY_SECONDS, Directory
from serving.tenants.key_text import new_key
from serving.tenants.store import KnownKey, open_store
from tests.serving.tenants.conftest import Clock, of_a_later_spanfill
from tests.serving.tenants.postgres import Postgres

ANA, BOB = new_key().text, new_key().text


class Database:
    """Keys in a dictionary, and how the database behaves; ``asked`` counts lookups."""

    def __init__(self) -> None:
        self.keys = {ANA: KnownKey(Caller("acme", "ana")), BOB: KnownKey(Caller("acme", "bob"))}
        self.asked = 0
        self.is_away = False
        self.answers = threading.Event()
        self.answers.set()

    def find(self, text: str) -> KnownKey:
        self.asked += 1
        assert self.answers.wait(30)
        if self.is_away:
            raise DatabaseAwayError("away")
        if text not in self.keys:
            raise AuthenticationError("not valid")
        return self.keys[text]


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def directory(database: Database, clock: Clock) -> Iterator[Directory]:
    opened = Directory(database.find, clock=clock, patience=0.2)
    yield opened
    database.answers.set()
    opened.close()


async def background() -> None:
    """Let a lookup in the background end."""
    await asyncio.sleep(0.1)


def test_a_key_is_looked_up_once_in_a_while(directory: Directory, database: Database, clock: Clock) -> None:
    async def scenario() -> None:
        for _ in range(5):
            assert (await directory.caller(ANA)).key == "ana"
        assert database.asked == 1
        clock.now += FRESH_SECONDS
        assert (await directory.caller(ANA)).key == "ana"
        assert database.asked == 2

    asyncio.run(scenario())


def test_requests_with_one_key_share_a_lookup(directory: Directory, database: Database) -> None:
    async def scenario() -> None:
        callers = await asyncio.gather(*(directory.caller(ANA) for _ in range(50)))
        assert {caller.key for caller in callers} == {"ana"}
        assert database.asked == 1

    asyncio.run(scenario())


def test_a_revocation_is_seen_soon(directory: Directory, database: Database, clock: Clock) -> None:
    async def scenario() -> None:
        await directory.caller(ANA)
        del database.keys[ANA]
        clock.now += FRESH_SECONDS
        for _ in range(2):
            with pytest.raises(AuthenticationError):
                await directory.caller(ANA)

    asyncio.run(scenario())


def test_a_refusal_is_not_remembered(directory: Directory, database: Database) -> None:
    async def scenario() -> None:
        found = database.keys.pop(ANA)
        with pytest.raises(AuthenticationError):
            await directory.caller(ANA)
        database.keys[ANA] = found
        assert (await directory.caller(ANA)).key == "ana"

    asyncio.run(scenario())


def test_what_is_no_key_is_refused_without_the_database(directory: Directory, database: Database) -> None:
    database.is_away = True
    with pytest.raises(AuthenticationError, match="is not valid"):
        asyncio.run(directory.caller("sk-1234"))
    assert database.asked == 0


def test_known_keys_stay_valid_through_an_outage_of_any_length(
    directory: Directory, database: Database, clock: Clock
) -> None:
    async def scenario() -> None:
        await directory.caller(ANA)
        database.is_away = True
        for seconds in (FRESH_SECONDS, RETRY_SECONDS, 60, 86_400, 0.1, 0.1):
            clock.now += seconds
            assert (await directory.caller(ANA)).key == "ana"
            await background()
        with pytest.raises(DatabaseAwayError) as error:
            await directory.caller(BOB)
        assert (error.value.retryable, error.value.http_status) == (True, 503)

    asyncio.run(scenario())


def test_the_first_lookup_after_an_outage_works(directory: Directory, database: Database, clock: Clock) -> None:
    async def scenario() -> None:
        database.is_away = True
        for _ in range(5):
            with pytest.raises(DatabaseAwayError):
                await directory.caller(BOB)
        database.is_away = False
        assert (await directory.caller(BOB)).key == "bob"

    asyncio.run(scenario())


def test_a_key_expires_in_an_outage_too(directory: Directory, database: Database, clock: Clock) -> None:
    async def scenario() -> None:
        database.keys[ANA] = KnownKey(Caller("acme", "ana"), expires=clock.now + 60)
        await directory.caller(ANA)
        database.is_away = True
        clock.now += 59
        assert (await directory.caller(ANA)).key == "ana"
        clock.now += 1
        with pytest.raises(DatabaseAwayError):
            await directory.caller(ANA)

    asyncio.run(scenario())


def test_a_fresh_key_expires_on_time(directory: Directory, database: Database, clock: Clock) -> None:
    async def scenario() -> None:
        database.keys[ANA] = KnownKey(Caller("acme", "ana"), expires=clock.now + 1)
        await directory.caller(ANA)
        del database.keys[ANA]
        clock.now += 1
        with pytest.raises(AuthenticationError):
            await directory.caller(ANA)

    asyncio.run(scenario())


@pytest.mark.parametrize("has_traffic", [True, False])
def test_what_was_revoked_in_an_outage_is_refused_soon_after_it(
    directory: Directory, database: Database, clock: Clock, has_traffic: bool
) -> None:
    async def scenario() -> None:
        await directory.caller(ANA)
        database.is_away = True
        clock.now += FRESH_SECONDS
        await directory.caller(ANA)
        database.is_away = False
        del database.keys[ANA]
        clock.now += RETRY_SECONDS if has_traffic else AWAY_SECONDS
        if has_traffic:
            await directory.caller(ANA)
            await background()
        with pytest.raises(AuthenticationError):
            await directory.caller(ANA)

    asyncio.run(scenario())


def test_during_an_outage_the_database_is_tried_seldom(directory: Directory, database: Database, clock: Clock) -> None:
    async def scenario() -> None:
        await asyncio.gather(directory.caller(ANA), directory.caller(BOB))
        database.is_away = True
        clock.now += FRESH_SECONDS
        await directory.caller(ANA)
        asked = database.asked
        for _ in range(20):
            await directory.caller(ANA)
            await directory.caller(BOB)
        assert database.asked == asked
        clock.now += RETRY_SECONDS
        for _ in range(20):
            await directory.caller(ANA)
            await directory.caller(BOB)
        await background()
        assert database.asked == asked + 1

    asyncio.run(scenario())


def test_a_database_that_hangs_holds_known_keys_up_once(directory: Directory, database: Database, clock: Clock) -> None:
    async def scenario() -> None:
        await directory.caller(ANA)
        await directory.caller(BOB)
        database.answers.clear()
        clock.now += FRESH_SECONDS
        assert (await asyncio.wait_for(directory.caller(ANA), 10)).key == "ana"
        asked = database.asked
        assert (await asyncio.wait_for(directory.caller(BOB), 10)).key == "bob"
        assert database.asked == asked
        database.answers.set()
        await background()

    asyncio.run(scenario())


def test_a_clock_that_is_set_back_does_not_prolong_a_key(
    directory: Directory, database: Database, clock: Clock
) -> None:
    async def scenario() -> None:
        await directory.caller(ANA)
        del database.keys[ANA]
        clock.now -= 3_600
        with pytest.raises(AuthenticationError):
            await directory.caller(ANA)

    asyncio.run(scenario())


def test_an_outage_of_postgresql_locks_no_known_key_out(postgres: Postgres, clock: Clock) -> None:
    store = open_store(postgres.new_database())
    store.create_tenant("acme")
    known, unknown = store.create_key("acme", "known")[1], store.create_key("acme", "unknown")[1]
    directory = Directory(store.known, clock=clock)

    async def scenario() -> None:
        await directory.caller(known)
        with postgres.away():
            for _ in range(3):
                clock.now += 3_600
                assert (await directory.caller(known)).tenant == "acme"
            with pytest.raises(DatabaseAwayError):
                await directory.caller(unknown)
        assert (await directory.caller(unknown)).tenant == "acme"
        clock.now += 3_600
        assert (await directory.caller(known)).tenant == "acme"

    asyncio.run(scenario())
    directory.close()
    store.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """An SQLite file that another process keeps for itself, from readers too."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.close()


def test_an_sqlite_file_that_is_locked_locks_no_known_key_out(tmp_path: Path, clock: Clock) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'spanfill.db'}?timeout=0.1")
    store.create_tenant("acme")
    known, unknown = store.create_key("acme", "known")[1], store.create_key("acme", "unknown")[1]
    directory = Directory(store.known, clock=clock)

    async def scenario() -> None:
        await directory.caller(known)
        store.close()
        with locked(tmp_path / "spanfill.db"):
            for _ in range(3):
                clock.now += 3_600
                assert (await directory.caller(known)).tenant == "acme"
            with pytest.raises(DatabaseAwayError):
                await directory.caller(unknown)
        assert (await directory.caller(unknown)).tenant == "acme"

    asyncio.run(scenario())
    directory.close()
    store.close()


def test_a_database_of_a_later_spanfill_locks_no_known_key_out_and_the_log_says_so_once(
    sqlite_url: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(sqlite_url)
    store.create_tenant("acme")
    known, unknown = store.create_key("acme", "known")[1], store.create_key("acme", "unknown")[1]
    stores = [store]
    directory = Directory(lambda text: stores[-1].known(text), clock=clock)

    async def scenario() -> None:
        await directory.caller(known)
        with of_a_later_spanfill(sqlite_url):
            stores.append(open_store(sqlite_url))
            for _ in range(3):
                clock.now += 3_600
                assert (await directory.caller(known)).tenant == "acme"
                with pytest.raises(DatabaseAwayError) as error:
                    await directory.caller(unknown)
                assert str(error.value) == "Keys cannot be looked up at the moment. Try again in a few seconds."
        assert (await directory.caller(unknown)).tenant == "acme"

    asyncio.run(scenario())
    directory.close()
    for opened in stores:
        opened.close()
    (said,) = [record.getMessage() for record in caplog.records if "looked up" in record.getMessage()]
    assert "later spanfill" in said
