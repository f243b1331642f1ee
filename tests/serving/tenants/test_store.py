"""Tenants and keys, on both databases."""

import hmac

import pytest
from sqlalchemy import create_engine

from serving.errors import AuthenticationError, NotFoundError, UsageError
from serving.tenants.caller import Caller, Limits
from serving.tenants.database import database_address
from serving.tenants.key_text import new_key, parse_key
from serving.tenants.store import GRACE_SECONDS, TenantStore
from serving.tenants.tables import Table
from serving.tenants.terms import Terms
from tests.serving.tenants.conftest import Clock

TERMS = Terms(2.0, Limits(100_000, None, 32), ("demo-codegen25", "codegen25-7b-multi"))


def refused(store: TenantStore, text: str) -> str:
    """What is said of a key that is not valid."""
    with pytest.raises(AuthenticationError) as error:
        store.caller(text)
    return str(error.value)


def test_a_key_stands_for_its_tenant_and_both_their_limits(store: TenantStore) -> None:
    store.create_tenant("acme", TERMS)
    row, text = store.create_key("acme", "ana", role="admin", limits=Limits(requests_per_minute=60))
    assert store.caller(text) == Caller(
        "acme", row.public_id, "admin", 2.0, TERMS.limits, Limits(requests_per_minute=60), TERMS.models
    )


def test_a_tenant_has_many_keys(store: TenantStore) -> None:
    for tenant in ("acme", "zeta"):
        store.create_tenant(tenant)
    made = {store.create_key(tenant, name)[1] for tenant in ("acme", "zeta") for name in ("ana", "bob")}
    assert len({store.caller(text).key for text in made}) == 4
    rows = store.keys()
    assert [f"{row.tenant} {row.name}" for row in rows] == ["acme ana", "acme bob", "zeta ana", "zeta bob"]
    assert [row.name for row in store.keys("acme")] == ["ana", "bob"]


def test_no_secret_is_stored(store: TenantStore, url: str) -> None:
    store.create_tenant("acme")
    row, first = store.create_key("acme")
    _, second = store.rotate_key(row.public_id)
    engine = create_engine(database_address(url))
    with engine.connect() as connection:
        stored = repr([connection.execute(table.select()).all() for table in Table.metadata.sorted_tables])
    engine.dispose()
    assert row.public_id in stored
    for text in (first, second):
        key = parse_key(text)
        assert key is not None
        assert key.secret not in stored
        assert key.secret_hash in stored
        assert key.secret_hash not in repr(row.as_dict())


def test_unknown_keys_and_wrong_secrets_are_told_alike_after_the_same_work(
    store: TenantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create_tenant("acme")
    row, text = store.create_key("acme")
    compare, compared = hmac.compare_digest, [0]

    def counting(a: str, b: str) -> bool:
        compared[0] += 1
        return compare(a, b)

    monkeypatch.setattr("serving.tenants.key_text.hmac.compare_digest", counting)
    told = set()
    for wrong in (new_key().text, new_key(row.public_id).text):
        compared[0] = 0
        told.add(refused(store, wrong))
        assert compared == [2]
    assert told == {refused(store, "nonsense")}
    compared[0] = 0
    store.caller(text)
    assert compared == [2]


def test_a_revoked_key_is_told_to_who_holds_it_alone(store: TenantStore) -> None:
    store.create_tenant("acme")
    row, text = store.create_key("acme")
    store.revoke_key(row.public_id)
    assert f"{row.public_id} was revoked" in refused(store, text)
    assert "is not valid" in refused(store, new_key(row.public_id).text)


def test_revoking_twice_keeps_the_first_time(store: TenantStore, clock: Clock) -> None:
    store.create_tenant("acme")
    row, _ = store.create_key("acme")
    began = clock.now
    for _ in range(2):
        assert store.revoke_key(row.public_id).revoked == began
        assert store.revoke_tenant("acme").revoked == began
        clock.now += 60


def test_a_revoked_tenant_has_no_valid_keys_and_gets_none(store: TenantStore) -> None:
    store.create_tenant("acme")
    store.create_tenant("zeta")
    _, text = store.create_key("acme")
    _, other = store.create_key("zeta")
    store.revoke_tenant("acme")
    assert "was revoked" in refused(store, text)
    assert store.caller(other).tenant == "zeta"
    with pytest.raises(UsageError, match="was revoked"):
        store.create_key("acme", "more")


def test_a_key_expires(store: TenantStore, clock: Clock) -> None:
    store.create_tenant("acme")
    _, text = store.create_key("acme", expires=clock.now + 60)
    assert store.known(text).expires == clock.now + 60
    clock.now += 59
    assert store.caller(text)
    clock.now += 1
    assert "has expired" in refused(store, text)


def test_a_name_is_free_again_when_its_key_is_no_longer_valid(store: TenantStore, clock: Clock) -> None:
    store.create_tenant("acme")
    row, _ = store.create_key("acme", "ana")
    with pytest.raises(UsageError, match="has a key ana already"):
        store.create_key("acme", "ana")
    store.revoke_key(row.public_id)
    store.create_key("acme", "ana", expires=clock.now + 60)
    clock.now += 60
    store.create_key("acme", "ana")
    assert len(store.keys("acme")) == 3


def test_after_a_rotation_both_secrets_are_good_for_the_grace(store: TenantStore, clock: Clock) -> None:
    store.create_tenant("acme")
    row, old = store.create_key("acme")
    rotated, new = store.rotate_key(row.public_id)
    assert rotated.public_id == row.public_id
    assert store.known(new).expires is None
    assert store.known(old).expires == clock.now + GRACE_SECONDS
    assert store.caller(old) == store.caller(new)
    clock.now += GRACE_SECONDS
    assert store.caller(new)
    assert refused(store, old) == refused(store, new_key().text)


def test_a_rotation_without_grace_ends_the_old_secret_at_once(store: TenantStore) -> None:
    store.create_tenant("acme")
    row, old = store.create_key("acme")
    _, new = store.rotate_key(row.public_id, grace=0)
    assert refused(store, old) == refused(store, new_key().text)
    assert store.caller(new)


def test_a_rotation_does_not_prolong_a_key(store: TenantStore, clock: Clock) -> None:
    store.create_tenant("acme")
    row, old = store.create_key("acme", expires=clock.now + 60)
    _, new = store.rotate_key(row.public_id)
    assert store.known(old).expires == store.known(new).expires == clock.now + 60
    clock.now += 60
    with pytest.raises(UsageError, match="has expired"):
        store.rotate_key(row.public_id)


def test_what_was_revoked_is_not_rotated(store: TenantStore) -> None:
    for tenant in ("acme", "zeta"):
        store.create_tenant(tenant)
    row, _ = store.create_key("acme")
    other, _ = store.create_key("zeta")
    store.revoke_key(row.public_id)
    store.revoke_tenant("zeta")
    for gone in (row, other):
        with pytest.raises(UsageError, match="was revoked"):
            store.rotate_key(gone.public_id)


def test_terms_change_and_what_callers_get_with_them(store: TenantStore) -> None:
    store.create_tenant("acme", TERMS)
    _, text = store.create_key("acme")
    changed = Terms(0.5, Limits(requests_per_minute=10), None)
    assert store.update_tenant("acme", changed).terms == changed
    assert store.tenant("acme").terms == changed
    caller = store.caller(text)
    assert (caller.weight, caller.limits, caller.models) == (0.5, changed.limits, None)


def test_a_tenants_name_is_taken_for_good(store: TenantStore) -> None:
    store.create_tenant("acme")
    store.revoke_tenant("acme")
    with pytest.raises(UsageError, match="There is a tenant acme already"):
        store.create_tenant("acme")
    assert [row.name for row in store.tenants()] == ["acme"]


def test_what_is_not_there_is_named(store: TenantStore) -> None:
    with pytest.raises(NotFoundError, match="no tenant acme"):
        store.update_tenant("acme", TERMS)
    with pytest.raises(NotFoundError, match="no tenant acme"):
        store.create_key("acme")
    with pytest.raises(NotFoundError, match="no key 0123"):
        store.revoke_key("0123")
    with pytest.raises(NotFoundError, match="no key 0123"):
        store.rotate_key("0123")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a@b", "a\0b", ".a", "ä", "a" * 64, "a\n"])
def test_names_that_a_cache_salt_cannot_hold_are_refused(sqlite_store: TenantStore, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a tenant"):
        sqlite_store.create_tenant(name)


def test_no_tenant_gets_what_was_stored_before_there_was_one(sqlite_store: TenantStore) -> None:
    with pytest.raises(UsageError, match="before there is a tenant"):
        sqlite_store.create_tenant("local")


@pytest.mark.parametrize(
    "terms",
    [
        Terms(weight=0.0),
        Terms(weight=-1.0),
        Terms(weight=float("nan")),
        Terms(weight=float("inf")),
        Terms(weight=1e-9),
        Terms(limits=Limits(tokens_per_minute=0)),
        Terms(limits=Limits(concurrency=-1)),
        Terms(limits=Limits(requests_per_minute=2**63)),
        Terms(models=()),
        Terms(models=("a", "")),
    ],
)
def test_terms_that_mean_nothing_are_refused(sqlite_store: TenantStore, terms: Terms) -> None:
    with pytest.raises(UsageError):
        sqlite_store.create_tenant("acme", terms)
    assert sqlite_store.tenants() == []
