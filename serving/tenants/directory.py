"""Where a gateway looks keys up: in what it found lately, else in the store.

A revoked key is refused within ``FRESH_SECONDS``. While the database is away, keys that were found before stay valid
until their own expiry, others get an error that says to try again; afterwards a revocation is seen within
``AWAY_SECONDS``. Nothing that was refused is remembered. The event loop itself never waits for the database.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serving.errors import AuthenticationError, DatabaseAwayError
from serving.tenants.caller import Caller
from serving.tenants.key_text import parse_key
from serving.tenants.store import KnownKey, invalid_key

FRESH_SECONDS = 3.0
"""For how long what was found is believed without another look."""

PATIENCE_SECONDS = 1.0
"""How long a request with a key that was found before waits for a database that is slow."""

RETRY_SECONDS = 1.0
AWAY_SECONDS = 10.0
"""While it is away, the database is tried in the background, a key at a time; after this long requests wait again."""

THREADS = 4

logger = logging.getLogger(__name__)

Found = KnownKey | AuthenticationError | DatabaseAwayError


@dataclass(frozen=True, slots=True)
class _Entry:
    known: KnownKey
    checked: float

    def is_fresh(self, now: float) -> bool:
        """Whether it was found just now; a clock that was set back does not prolong it."""
        return 0 <= now - self.checked < FRESH_SECONDS

    def has_expired(self, now: float) -> bool:
        return self.known.expires is not None and self.known.expires <= now


class Directory:
    """Callers by their keys, for one event loop; ``find`` is ``TenantStore.known`` and is called in threads."""

    def __init__(
        self,
        find: Callable[[str], KnownKey],
        *,
        clock: Callable[[], float] = time.time,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._find = find
        self._clock = clock
        self._patience = patience
        self._entries: dict[bytes, _Entry] = {}
        self._lookups: dict[bytes, asyncio.Task[Found]] = {}
        self._tried = self._failed = -math.inf
        self._logged: type[DatabaseAwayError] | None = None
        self._threads = ThreadPoolExecutor(THREADS, "spanfill-keys")

    async def caller(self, key_text: str) -> Caller:
        """Who calls with this key.

        Raises ``AuthenticationError`` when it is not valid, ``DatabaseAwayError`` when that cannot be known now.
        """
        if parse_key(key_text) is None:
            raise invalid_key()
        name = hashlib.sha256(key_text.encode()).digest()
        now = self._clock()
        entry = self._entries.get(name)
        if entry is None or entry.has_expired(now):
            return self._judge(await self._look_up(name, key_text), None)
        if entry.is_fresh(now):
            return entry.known.caller
        if 0 <= now - self._failed < AWAY_SECONDS:
            self._try_in_background(name, key_text, now)
            return entry.known.caller
        return self._judge(await self._look_up(name, key_text, self._patience), entry)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _judge(self, found: Found, entry: _Entry | None) -> Caller:
        if isinstance(found, KnownKey):
            return found.caller
        if isinstance(found, AuthenticationError):
            raise found
        if entry is not None:
            return entry.known.caller
        raise DatabaseAwayError(
            "Keys cannot be looked up at the moment.", remedy="Try again in a few seconds."
        ) from found

    async def _look_up(self, name: bytes, key_text: str, patience: float | None = None) -> Found:
        """Ask the database, with those who ask for the same key already; give up waiting after ``patience`` seconds."""
        lookup = self._lookups.get(name) or self._begin(name, key_text)
        done, _ = await asyncio.wait({lookup}, timeout=patience)
        if done:
            return lookup.result()
        self._failed = self._clock()
        return DatabaseAwayError("The database of tenants is slow.")

    def _try_in_background(self, name: bytes, key_text: str, now: float) -> None:
        if not self._lookups and not 0 <= now - self._tried < RETRY_SECONDS:
            self._begin(name, key_text)

    def _begin(self, name: bytes, key_text: str) -> asyncio.Task[Found]:
        lookup = asyncio.get_running_loop().create_task(self._ask(name, key_text))
        self._lookups[name] = lookup
        lookup.add_done_callback(lambda _: self._lookups.pop(name, None))
        return lookup

    async def _ask(self, name: bytes, key_text: str) -> Found:
        """Ask the database and remember what it says; its known errors are an answer, not raised."""
        began = self._tried = self._clock()
        try:
            known = await asyncio.get_running_loop().run_in_executor(self._threads, self._find, key_text)
        except DatabaseAwayError as error:
            self._failed = self._clock()
            self._log(error)
            return error
        except AuthenticationError as error:
            self._failed, self._logged = -math.inf, None
            self._entries.pop(name, None)
            return error
        self._failed, self._logged = -math.inf, None
        self._entries[name] = _Entry(known, began)
        return known

    def _log(self, error: DatabaseAwayError) -> None:
        """Say why keys cannot be looked up, once until they can or another kind of reason comes."""
        if type(error) is not self._logged:
            logger.warning("keys cannot be looked up, those that were found before stay valid: %s", error)
        self._logged = type(error)
