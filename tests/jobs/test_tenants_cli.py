"""``spanfill tenants`` and ``spanfill keys`` as people and scripts use them."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.errors import AuthenticationError
from serving.tenants.caller import Caller, Limits
from serving.tenants.key_text import parse_key
from serving.tenants.store import TenantStore, open_store
from serving.tenants.usage import UsageRecord
from tests.conftest import Command

ROOT = Path(__file__).parents[2]
USAGE = 2
NOON = 1_800_014_400.0
"""Of 2027-01-15, in UTC."""


@pytest.fixture
def store(home: Path) -> Iterator[TenantStore]:
    """The store that the commands find: an SQLite file in a home of the test's."""
    opened = open_store()
    yield opened
    opened.close()


def made(spanfill: Command, *arguments: object) -> dict[str, Any]:
    """What a command that makes a key prints with ``--json``."""
    done = spanfill(*arguments, "--json")
    assert done.code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_tenant_is_made_and_its_key_printed_once(spanfill: Command, store: TenantStore) -> None:
    options = ["--weight", 2, "--tokens-per-minute", 100_000, "--max-concurrency", 32, "--models", "a, b"]
    done = spanfill("tenants", "create", "acme", *options)
    assert done.code == 0
    key = parse_key(done.stdout.strip())
    assert key is not None
    assert "shown only once" in done.stderr
    assert key.secret not in done.stderr
    assert store.caller(key.text) == Caller(
        "acme", key.public_id, "user", 2.0, Limits(100_000, None, 32), Limits(), ("a", "b")
    )
    listed = spanfill("keys", "list", "--json").stdout + spanfill("tenants", "list", "--json").stdout
    assert key.public_id in listed
    assert key.secret not in listed
    assert key.secret_hash not in listed


def test_json_has_the_key_and_what_is_known_of_it(spanfill: Command, store: TenantStore) -> None:
    told = made(spanfill, "tenants", "create", "acme", "--role", "admin")
    assert store.caller(told["key"]).role == "admin"
    assert (told["tenant"], told["name"], told["role"], told["expires"]) == ("acme", "default", "admin", None)
    ana = made(spanfill, "keys", "create", "--tenant", "acme", "--name", "ana", "--requests-per-minute", 60)
    assert store.caller(ana["key"]).key_limits == Limits(requests_per_minute=60)
    assert (ana["name"], ana["role"], ana["requests_per_minute"]) == ("ana", "user", 60)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2_700), ("12h", 43_200), ("30d", 2_592_000), ("8w", 4_838_400)]
)
def test_a_key_expires_as_told(spanfill: Command, store: TenantStore, text: str, seconds: int) -> None:
    told = made(spanfill, "tenants", "create", "acme", "--expires", text)
    assert told["expires"] == pytest.approx(time.time() + seconds, abs=60)


def test_keys_are_revoked_and_rotated_by_id_or_by_themselves(spanfill: Command, store: TenantStore) -> None:
    first = made(spanfill, "tenants", "create", "acme")
    second = made(spanfill, "keys", "rotate", first["id"], "--grace", "1h")
    assert second["id"] == first["id"]
    assert store.caller(first["key"]) == store.caller(second["key"])
    third = made(spanfill, "keys", "rotate", second["key"], "--grace", "0s")
    for gone in (first, second):
        with pytest.raises(AuthenticationError, match="is not valid"):
            store.caller(gone["key"])
    assert spanfill("keys", "revoke", third["key"]).code == 0
    with pytest.raises(AuthenticationError, match="was revoked"):
        store.caller(third["key"])


def test_what_is_not_named_stays_as_it_was(spanfill: Command, store: TenantStore) -> None:
    made(spanfill, "tenants", "create", "acme", "--weight", 2, "--tokens-per-minute", 5, "--models", "a")
    assert spanfill("tenants", "update", "acme", "--max-concurrency", 3).code == 0
    terms = store.tenant("acme").terms
    assert (terms.weight, terms.limits, terms.models) == (2.0, Limits(5, None, 3), ("a",))
    assert spanfill("tenants", "update", "acme", "--tokens-per-minute", 0, "--models", " all", "--weight", 1).code == 0
    terms = store.tenant("acme").terms
    assert (terms.weight, terms.limits, terms.models) == (1.0, Limits(None, None, 3), None)


def test_a_revoked_tenant_is_still_listed(spanfill: Command, store: TenantStore) -> None:
    key = made(spanfill, "tenants", "create", "acme")["key"]
    assert spanfill("tenants", "revoke", "acme").code == 0
    with pytest.raises(AuthenticationError, match="was revoked"):
        store.caller(key)
    (listed,) = json.loads(spanfill("tenants", "list", "--json").stdout)["tenants"]
    assert listed["name"] == "acme"
    assert listed["revoked"] == pytest.approx(time.time(), abs=60)


def test_usage_is_reported_as_asked(spanfill: Command, store: TenantStore) -> None:
    records = [UsageRecord("acme", "k", "m", 1_000, 400, 30, at) for at in (NOON, NOON, NOON + 86_400)]
    store.add_usage("a", list(enumerate(records, 1)))
    (total,) = json.loads(spanfill("tenants", "usage", "--by", "tenant", "--json").stdout)["usage"]
    assert total == {
        "tenant": "acme",
        "prompt_tokens": 3_000,
        "cached_tokens": 1_200,
        "completion_tokens": 90,
        "requests": 3,
    }
    done = spanfill("tenants", "usage", "--tenant", "acme", "--since", "2027-01-16")
    assert done.code == 0
    assert "2027-01-16" in done.stdout
    assert "1,000" in done.stdout
    assert "2027-01-15" not in done.stdout
    assert json.loads(spanfill("tenants", "usage", "--tenant", "zeta", "--json").stdout) == {"usage": []}


def test_what_a_killed_gateway_left_is_in_the_report(spanfill: Command, store: TenantStore, tmp_path: Path) -> None:
    add = (
        "from serving.tenants.metering import open_meter; from serving.tenants.store import open_store;"
        "from serving.tenants.usage import UsageRecord; import os, signal;"
        f"open_meter(open_store()).add(UsageRecord('acme', 'k', 'm', 1_000, 400, 30, {NOON}));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", add], cwd=ROOT).returncode == -signal.SIGKILL
    (total,) = json.loads(spanfill("tenants", "usage", "--by", "tenant", "--json").stdout)["usage"]
    assert (total["tenant"], total["prompt_tokens"], total["requests"]) == ("acme", 1_000, 1)
    assert not list((tmp_path / "home" / "usage").glob("*/*"))


def test_people_read_tables(spanfill: Command, store: TenantStore) -> None:
    key = made(spanfill, "tenants", "create", "acme", "--tokens-per-minute", 100_000)
    shown = spanfill("tenants", "list").stdout
    assert "acme" in shown
    assert "100,000" in shown
    assert "revoked" not in shown, "a column that says nothing is left out"
    assert key["id"] in spanfill("keys", "list", "--tenant", "acme").stdout
    assert "no keys" in spanfill("keys", "list", "--tenant", "zeta").stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("tenants create a/b", "cannot be the name of a tenant"),
        ("tenants create acme --weight 0", "no share"),
        ("tenants create acme --role owner", "'owner' is no role"),
        ("tenants create acme --expires soon", "'soon' is no length of time"),
        ("tenants create acme --expires 9999w", "'9999w' is no length of time"),
        ("tenants create acme --expires 0s", "--expires 0s is a key that is never good"),
        ("tenants create acme --models ,", "list of models is empty"),
        ("tenants usage --by colour", "colour is unknown"),
        ("tenants usage --since yesterday", "--since yesterday is no day"),
    ],
)
def test_what_makes_no_sense_is_refused(spanfill: Command, store: TenantStore, command: str, words: str) -> None:
    done = spanfill(*command.split())
    assert (done.code, words in done.stderr) == (USAGE, True), done.stderr
    assert store.tenants() == []


def test_a_tenant_that_is_not_there_is_named(spanfill: Command, store: TenantStore) -> None:
    for command in ("keys create --tenant acme --name ana", "tenants update acme --weight 2", "tenants revoke acme"):
        done = spanfill(*command.split())
        assert (done.code, "There is no tenant acme" in done.stderr) == (1, True), done.stderr


def test_a_database_that_is_away_is_named_without_its_password(
    spanfill: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPANFILL_DATABASE_URL", f"postgresql://ana:secret@/spanfill?host={tmp_path}")
    done = spanfill("tenants", "list")
    assert done.code == 1
    assert f"postgresql+psycopg://ana:***@/spanfill?host={tmp_path}" in done.stderr.replace("%2F", "/")
    assert "does not answer" in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *("tenants create", "tenants list", "tenants update", "tenants revoke", "tenants usage"),
        *("keys create", "keys list", "keys revoke", "keys rotate"),
    ],
)
def test_help_shows_an_example(spanfill: Command, command: str) -> None:
    done = spanfill(*command.split(), "--help")
    assert done.code == 0
    assert f"Example: spanfill {command}" in done.stdout


def test_the_command_starts_without_the_database_packages() -> None:
    check = "import sys, jobs.cli; sys.exit('sqlalchemy' in sys.modules or 'alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
