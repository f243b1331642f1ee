"""How databases are opened, brought up to date, refused and missed."""

import asyncio
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from ray.serve.handle import DeploymentHandle

from serving.api.ask import ServedModel
from serving.api.gateway import Gateway, GatewayConfig
from serving.app import assemble
from serving.app_config import AppConfig
from serving.errors import ConfigError, DatabaseAwayError, DatabaseUnfitError
from serving.tenants.database import database_address, fingerprint, open_engine, refuse_embedded
from serving.tenants.schema import VERSION_TABLE, prepare
from serving.tenants.store import TenantStore, open_store
from serving.tenants.tables import Table
from serving.tenants.usage import UsageRecord
from tests.serving.tenants.conftest import Clock, of_a_later_spanfill
from tests.serving.tenants.postgres import Postgres

ROOT = Path(__file__).parents[3]
CREATE = "import sys; from serving.tenants.store import open_store; open_store(sys.argv[1]).create_tenant(sys.argv[2])"
POSTGRESQL = "postgresql://ana:secret@db.example/spanfill"


def test_the_default_is_a_file_in_the_home_and_the_environment_overrules_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPANFILL_HOME", str(tmp_path / "50% of ?"))
    monkeypatch.delenv("SPANFILL_DATABASE_URL", raising=False)
    assert database_address().database == str(tmp_path / "50% of ?" / "spanfill.db")
    store = open_store()
    store.create_tenant("acme")
    store.close()
    assert (tmp_path / "50% of ?" / "spanfill.db").exists()
    monkeypatch.setenv("SPANFILL_DATABASE_URL", POSTGRESQL)
    assert database_address().host == "db.example"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_postgresql_is_always_asked_through_one_driver(scheme: str) -> None:
    assert database_address(f"{scheme}://ana@db/x").drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    "url", ["mysql://ana:secret@db/x", "sqlite://", "sqlite:///:memory:", "secret", "postgres://a:secret@b:c/d"]
)
def test_what_is_no_database_of_ours_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="SPANFILL_DATABASE_URL") as error:
        database_address(url)
    assert "secret" not in str(error.value)


def test_an_sqlite_file_is_its_owners_alone_and_has_a_write_ahead_log(
    sqlite_store: TenantStore, tmp_path: Path
) -> None:
    sqlite_store.create_tenant("acme")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("spanfill.db*")}
    assert set(modes) == {"spanfill.db", "spanfill.db-wal", "spanfill.db-shm", "spanfill.db.lock"}
    assert set(modes.values()) == {0o600}
    with closing(sqlite3.connect(tmp_path / "spanfill.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/spanfill\.db cannot be made"):
        open_store(f"sqlite:///{tmp_path / 'file' / 'spanfill.db'}")


def test_gateways_on_several_nodes_need_postgresql(sqlite_url: str) -> None:
    refuse_embedded(sqlite_url, ["a", "a"])
    refuse_embedded(POSTGRESQL, ["a", "b"])
    with pytest.raises(ConfigError, match=r"2 nodes \(a, b\).*PostgreSQL"):
        refuse_embedded(sqlite_url, ["b", "a", "b"])


def have_nodes(monkeypatch: pytest.MonkeyPatch, **alive: bool) -> None:
    """Let the cluster have nodes, by their addresses; all have the same name."""
    node = {"NodeManagerHostname": "vm", "Resources": {"CPU": 2.0}}
    nodes = [node | {"Alive": up, "NodeManagerAddress": address} for address, up in alive.items()]
    monkeypatch.setattr("ray.nodes", lambda: nodes)


@pytest.mark.parametrize("gateways", [1, 2])
def test_an_application_with_gateways_on_several_nodes_is_not_built_on_sqlite(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, gateways: int
) -> None:
    """Be there one gateway: it may be started again on another node, where the file is not."""
    have_nodes(monkeypatch, a=True, b=True)
    monkeypatch.setenv("SPANFILL_DATABASE_URL", sqlite_url)
    config = AppConfig(model="demo-codegen25", engine="instant", gateways=gateways)
    with pytest.raises(ConfigError, match=r"2 nodes \(vm a, vm b\).*PostgreSQL"):
        assemble(config, app="test")
    assemble(config.model_copy(update={"gateways": 0}), app="test")
    monkeypatch.setenv("SPANFILL_DATABASE_URL", POSTGRESQL)
    assemble(config, app="test")
    have_nodes(monkeypatch, a=True, b=False)
    monkeypatch.setenv("SPANFILL_DATABASE_URL", sqlite_url)
    assemble(config, app="test")


def test_a_gateway_does_not_start_on_sqlite_where_a_node_has_joined(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANFILL_DATABASE_URL", sqlite_url)
    config = AppConfig(model="demo-codegen25", engine="instant", gateways=1)
    told = GatewayConfig(app="test", model="demo", tokenizer="demo-codegen25", format="codegen25", replicas=1)
    model = ServedModel("demo", "codegen25", 256, can_infill=True)
    have_nodes(monkeypatch, a=True)
    assemble(config, app="test")
    have_nodes(monkeypatch, a=True, b=True)
    with pytest.raises(ConfigError, match=r"2 nodes \(vm a, vm b\).*PostgreSQL"):
        asyncio.run(Gateway.__init__(object.__new__(Gateway), cast(DeploymentHandle, None), told, model, config))


def test_a_database_is_told_from_others_whoever_opens_it() -> None:
    same = {
        fingerprint(database_address(url))
        for url in (
            POSTGRESQL,
            "postgres://bob@db.example/spanfill?sslmode=require",
            "postgresql://db.example:5432/spanfill",
        )
    }
    other = fingerprint(database_address("postgresql://ana@db.example/other"))
    socket = fingerprint(database_address("postgresql://ana@/spanfill?host=/run/postgresql"))
    assert len(same) == 1
    assert len(same | {other, socket}) == 3


def test_the_migrations_make_the_tables_that_the_code_expects(url: str) -> None:
    engine = open_engine(database_address(url))
    prepare(engine)
    prepare(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_processes_that_open_a_new_database_at_once_do_not_collide(url: str) -> None:
    names = [f"tenant-{number}" for number in range(4)]
    begun = [subprocess.Popen([sys.executable, "-c", CREATE, url, name], cwd=ROOT) for name in names]
    assert [process.wait(120) for process in begun] == [0] * len(names)
    store = open_store(url)
    assert [row.name for row in store.tenants()] == names
    store.close()


def test_a_database_of_a_later_spanfill_is_refused(store: TenantStore, url: str) -> None:
    store.create_tenant("acme")
    with of_a_later_spanfill(url):
        later = open_store(url)
        with pytest.raises(DatabaseUnfitError, match="later spanfill") as error:
            later.tenants()
        assert error.value.exit_code == 2
    assert [row.name for row in later.tenants()] == ["acme"]
    later.close()


def test_postgresql_that_goes_away_is_missed_and_found_again(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    store.create_tenant("acme")
    _, text = store.create_key("acme")
    with postgres.away(), pytest.raises(DatabaseAwayError, match="does not answer as it should") as error:
        store.caller(text)
    assert (error.value.retryable, error.value.http_status) == (True, 503)
    assert store.caller(text).tenant == "acme"
    store.close()


def test_an_empty_database_that_takes_the_place_of_a_lost_one_is_set_up(postgres: Postgres) -> None:
    url = postgres.new_database()
    store = open_store(url)
    store.create_tenant("acme")
    engine = open_engine(database_address(url))
    with engine.begin() as connection:
        Table.metadata.drop_all(connection)
        connection.exec_driver_sql(f"DROP TABLE {VERSION_TABLE}")
    engine.dispose()
    with pytest.raises(DatabaseAwayError, match="spanfill_tenants"):
        store.tenants()
    assert store.tenants() == []
    store.close()


def test_a_database_that_only_reads_is_missed_by_writers(postgres: Postgres) -> None:
    """As a standby is, before it takes over."""
    url = postgres.new_database()
    store = open_store(url)
    store.create_tenant("acme")
    _, text = store.create_key("acme")
    store.close()
    standby = open_store(f"{url}&options=-c%20default_transaction_read_only=on")
    assert standby.caller(text).tenant == standby.tenant("acme").name == "acme"
    with pytest.raises(DatabaseAwayError, match="read-only"):
        standby.create_tenant("zeta")
    standby.close()


def test_a_file_that_is_no_database_is_missed(tmp_path: Path) -> None:
    (tmp_path / "spanfill.db").write_bytes(b"this is no database " * 100)
    store = open_store(f"sqlite:///{tmp_path / 'spanfill.db'}")
    with pytest.raises(DatabaseAwayError, match="not a database"):
        store.tenants()
    store.close()


def test_a_store_can_be_opened_while_the_database_is_away(postgres: Postgres) -> None:
    url = postgres.new_database()
    store = open_store(url)
    with postgres.away(), pytest.raises(DatabaseAwayError):
        store.tenants()
    assert store.tenants() == []
    store.close()


def test_a_writer_that_holds_sqlite_is_waited_for_and_then_missed(tmp_path: Path, clock: Clock) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'spanfill.db'}?timeout=0.1")
    store.create_tenant("acme")
    used = [(1, UsageRecord("acme", "k", "m", 1, 0, 1, clock.now))]
    other = sqlite3.connect(tmp_path / "spanfill.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseAwayError, match="locked"):
        store.add_usage("a", used)
    assert [row.name for row in store.tenants()] == ["acme"], "readers go on beside a writer"
    other.execute("COMMIT")
    other.close()
    assert store.add_usage("a", used) == 1
    store.close()
