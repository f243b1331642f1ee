"""Tenants, their keys and their usage in a database, which is asked for nothing before it is first used."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import URL, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from serving.errors import AuthenticationError, NotFoundError, UsageError
from serving.tenants import usage
from serving.tenants.caller import Caller, Limits, Role
from serving.tenants.database import database_address, fingerprint
from serving.tenants.key_text import DECOY_HASH, KeyText, matches, new_key, parse_key
from serving.tenants.sessions import Sessions, take_turns
from serving.tenants.tables import KeyRow, TenantRow, WorkRow, cancel_work
from serving.tenants.terms import DEFAULT_TERMS, NO_LIMITS, NOBODY, Terms, check_limits, check_name, check_terms
from serving.tenants.usage import DIMENSIONS, EVERYTHING, Dimension, Numbered, UsageFilter, UsageLine

GRACE_SECONDS = 86_400.0
"""For how long after a rotation the former secret is still good, unless said otherwise: a day."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that was found valid, and until when it is (seconds since 1970) if nobody revokes it; None: for ever."""

    caller: Caller
    expires: float | None = None


def open_store(url: str | None = None) -> "TenantStore":
    """The store at ``url``, else at ``SPANFILL_DATABASE_URL``, else in an SQLite file in spanfill's home.

    Raises ``ConfigError`` for a wrong URL or a home that cannot be written. The schema is brought up to date at the
    first use, so that a gateway can start while the database is away.
    """
    return TenantStore(database_address(url))


class TenantStore:
    """The database of tenants; usable from several threads.

    Every method raises ``DatabaseAwayError`` when the database does not answer (what was to be written may have been,
    if only the answer was lost), and ``DatabaseUnfitError`` when it is of a later spanfill.
    """

    def __init__(self, address: URL, *, clock: Callable[[], float] = time.time) -> None:
        self._sessions = Sessions(address)
        self._clock = clock

    @property
    def fingerprint(self) -> str:
        """What tells this database from others."""
        return fingerprint(self._sessions.address)

    def close(self) -> None:
        """Close the connections; a later use opens new ones."""
        self._sessions.close()

    def create_tenant(self, name: str, terms: Terms = DEFAULT_TERMS) -> TenantRow:
        """A new tenant without keys; raises ``UsageError`` for a name that is taken or wrong, or for wrong terms."""
        check_name(name, "tenant")
        if name == NOBODY:
            raise UsageError(
                f"{name!r} is who calls before there is a tenant, whose files it would get.",
                remedy="Choose another name.",
            )
        check_terms(terms)
        row = TenantRow(name=name, terms=terms, created=self._clock(), revoked=None)
        try:
            with self._sessions.begin(writes=True) as session:
                session.add(row)
        except IntegrityError:
            raise UsageError(
                f"There is a tenant {name} already.", remedy="Choose another name, or use spanfill tenants update."
            ) from None
        return row

    def tenants(self) -> list[TenantRow]:
        """All tenants by name, revoked ones too."""
        with self._sessions.begin() as session:
            return list(session.scalars(select(TenantRow).order_by(TenantRow.name)))

    def tenant(self, name: str) -> TenantRow:
        """One tenant; raises ``NotFoundError``."""
        with self._sessions.begin() as session:
            return _tenant(session, name, lock=False)

    def update_tenant(self, name: str, terms: Terms) -> TenantRow:
        """Give a tenant other terms; raises ``UsageError`` for wrong ones, ``NotFoundError``."""
        check_terms(terms)
        with self._sessions.begin(writes=True) as session:
            row = _tenant(session, name)
            row.terms = terms
        return row

    def revoke_tenant(self, name: str) -> TenantRow:
        """Let none of a tenant's keys be valid any more, and cancel its batches and jobs; raises ``NotFoundError``."""
        now = self._clock()
        with self._sessions.begin(writes=True) as session:
            row = _tenant(session, name)
            take_turns(session, name)
            row.revoked = now if row.revoked is None else row.revoked
            unfinished = select(WorkRow).where(WorkRow.tenant == name, WorkRow.ended.is_(None))
            for work in session.scalars(unfinished.with_for_update()):
                cancel_work(work, now)
        return row

    def create_key(
        self,
        tenant: str,
        name: str = "default",
        *,
        role: Role = "user",
        limits: Limits = NO_LIMITS,
        expires: float | None = None,
    ) -> tuple[KeyRow, str]:
        """A new key and its text, which is told here alone; ``expires`` in seconds since 1970.

        Raises ``NotFoundError`` for an unknown tenant, ``UsageError`` for a revoked one, a wrong name or limit, or
        when a valid key of the tenant has that name.
        """
        check_name(name, "key")
        check_limits(limits)
        key, now = new_key(), self._clock()
        row = KeyRow(
            public_id=key.public_id, tenant=tenant, name=name, role=role, limits=limits, created=now, expires=expires,
            secret_hash=key.secret_hash, previous_hash=None, previous_until=None, revoked=None, last_used=None,
        )  # fmt: skip
        with self._sessions.begin(writes=True) as session:
            if _tenant(session, tenant).revoked is not None:
                raise UsageError(f"The tenant {tenant} was revoked.", remedy="Create another tenant.")
            _check_free(session, tenant, name, now)
            session.add(row)
        return row, key.text

    def keys(self, tenant: str | None = None) -> list[KeyRow]:
        """The keys of a tenant, or all, by tenant and name; revoked and expired ones too."""
        query = select(KeyRow).order_by(KeyRow.tenant, KeyRow.name, KeyRow.created)
        with self._sessions.begin() as session:
            return list(session.scalars(query if tenant is None else query.where(KeyRow.tenant == tenant)))

    def revoke_key(self, public_id: str) -> KeyRow:
        """Let a key be valid no more; raises ``NotFoundError``."""
        with self._sessions.begin(writes=True) as session:
            row = _key(session, public_id)
            row.revoked = self._clock() if row.revoked is None else row.revoked
        return row

    def rotate_key(self, public_id: str, *, grace: float = GRACE_SECONDS) -> tuple[KeyRow, str]:
        """Give a key another secret and return its new text; the former one stays good for ``grace`` seconds.

        Name, limits, expiry and usage stay the key's. Of two rotations within the grace the first secret ends with the
        second. Raises ``NotFoundError``, and ``UsageError`` for a key that is valid no more.
        """
        key, now = new_key(public_id), self._clock()
        with self._sessions.begin(writes=True) as session:
            row = _key(session, public_id)
            if end := _end_of(row, now):
                raise UsageError(f"The key {public_id} {end}.", remedy="Create another with spanfill keys create.")
            row.previous_hash, row.previous_until = row.secret_hash, now + grace
            row.secret_hash = key.secret_hash
        return row, key.text

    def caller(self, key_text: str) -> Caller:
        """Who calls with this key; raises ``AuthenticationError`` as ``known``."""
        return self.known(key_text).caller

    def known(self, key_text: str) -> KnownKey:
        """A key that is valid now; raises ``AuthenticationError``.

        An unknown key and a wrong secret give one message after the same work; only who holds the secret learns that a
        key was revoked or has expired.
        """
        key = parse_key(key_text)
        if key is None:
            raise invalid_key()
        with self._sessions.begin() as session:
            row = session.get(KeyRow, key.public_id)
        return _check(row, key, self._clock())

    def add_usage(self, source: str, numbered: Sequence[Numbered]) -> int:
        """Count records of a source, none of them twice however often it is offered; returns how many were new.

        A source gives its records ascending numbers from 1 and offers them in that order. Something that is counted as
        a whole can be a source of one record.
        """
        with self._sessions.begin(writes=True) as session:
            return usage.count(session, source, numbered)

    def usage(self, by: Sequence[Dimension] = DIMENSIONS, wanted: UsageFilter = EVERYTHING) -> list[UsageLine]:
        """Sums of what was used, parted and ordered by the dimensions."""
        with self._sessions.begin() as session:
            return usage.report(session, by, wanted)


def invalid_key() -> AuthenticationError:
    """What is said of a key that is not one of ours, or not with this secret."""
    return AuthenticationError("The API key is not valid.", remedy="Check it, or ask an admin for a new one.")


def _tenant(session: Session, name: str, *, lock: bool = True) -> TenantRow:
    row = session.get(TenantRow, name, with_for_update=lock)
    if row is None:
        raise NotFoundError(f"There is no tenant {name}.", remedy="See spanfill tenants list.")
    return row


def _key(session: Session, public_id: str) -> KeyRow:
    row = session.get(KeyRow, public_id, with_for_update=True)
    if row is None:
        raise NotFoundError(f"There is no key {public_id}.", remedy="See spanfill keys list.")
    return row


def _check_free(session: Session, tenant: str, name: str, now: float) -> None:
    valid = (KeyRow.revoked.is_(None), or_(KeyRow.expires.is_(None), KeyRow.expires > now))
    if session.scalars(select(KeyRow).where(KeyRow.tenant == tenant, KeyRow.name == name, *valid)).first() is not None:
        raise UsageError(
            f"The tenant {tenant} has a key {name} already.", remedy="Choose another --name, or rotate that key."
        )


def _check(row: KeyRow | None, key: KeyText, now: float) -> KnownKey:
    """Judge a key by the row of its public id; both comparisons are made whatever the row says."""
    is_current = matches(key, row.secret_hash if row is not None else DECOY_HASH)
    is_former = matches(key, row.previous_hash if row is not None and row.previous_hash else DECOY_HASH)
    until = row.previous_until if row is not None and is_former and not is_current else None
    if row is None or not (is_current or (until is not None and now < until)):
        raise invalid_key()
    if end := _end_of(row, now):
        raise AuthenticationError(f"The API key {key.public_id} {end}.", remedy="Ask an admin for a new one.")
    return KnownKey(row.caller, min((end for end in (row.expires, until) if end), default=None))


def _end_of(row: KeyRow, now: float) -> str:
    """Why a key is valid no more; empty while it is."""
    if row.revoked is not None or row.owner.revoked is not None:
        return "was revoked"
    return "has expired" if row.expires is not None and row.expires <= now else ""
