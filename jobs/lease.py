"""Whose job it is: one runner at a time holds a folder's lease, and a dead one's is taken over.

The lease is a row of numbered files. Taking it is the atomic creation of the next number, so of two who try one wins;
the holder rewrites its own file every few seconds, and one that finds a higher number has lost the lease. A holder
counts as dead when it lived on this machine and its process is gone, or when its file has not changed for
``SILENT_SECONDS`` by the clock of whoever wants it: clocks of two machines are never compared.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.process import birth
from jobs.store import Location, create, delete, list_files, publish_bytes, read_bytes
from serving.errors import JobHeldError, LeaseLostError, StorageError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: a process of a machine, when it last wrote (seconds since 1970), and what it said then."""

    host: str
    machine: str
    pid: int
    born: int
    token: str
    since: float
    beat: float
    beats: int = 0
    released: bool = False
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gone(self) -> bool:
        """Whether it released the lease, or was a process of this machine that is no more or no longer holds it."""
        if self.released:
            return True
        if self.machine != machine():
            return False
        return self.token not in _held_here if self.pid == os.getpid() else birth(self.pid) != self.born


_held_here: set[str] = set()
"""Tokens of the leases that this process holds."""


def machine() -> str:
    """What tells this machine, since its last boot and with its process numbers, from any other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip() if boot.exists() else uuid.getnode()} {namespace.resolve().name}"


def read_holder(output: Location) -> Holder | None:
    """The latest holder of a folder's lease, dead or alive; None where nobody ever held it."""
    found = _latest(output)
    return found[1] if found else None


class Lease:
    """A lease that is held; a thread renews it until ``release``."""

    def __init__(self, output: Location, number: int, holder: Holder) -> None:
        self._output = output
        self._number = number
        self._holder = holder
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost: LeaseLostError | None = None
        self._thread = threading.Thread(target=self._beat, name="spanfill-lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, output: Location, *, say: Callable[[str], None], check: Callable[[], None] = lambda: None) -> "Lease":
        """Take the lease of ``output``, waiting for up to ``SILENT_SECONDS`` to see whether its holder is alive.

        ``check`` is called meanwhile and may raise to give up. Raises ``JobHeldError`` naming the holder when it is
        alive, ``StorageError`` when nothing can be written there.
        """
        me, now = os.getpid(), time.time()
        holder = Holder(platform.node(), machine(), me, birth(me) or 0, uuid.uuid4().hex, now, now)
        found = _latest(output)
        if found is not None:
            number, before = found
            if not before.is_gone:
                say(f"{output} is held by {_words(before)}; waiting to see whether it is alive")
                _wait_until_silent(output, number, before, check)
            if not before.released:
                say(f"taking over from {_words(before)}, which is gone")
        number = found[0] + 1 if found else 1
        _held_here.add(holder.token)
        try:
            _create(output, number, holder)
        except BaseException:
            _held_here.discard(holder.token)
            raise
        return cls(output, number, holder)

    @property
    def number(self) -> int:
        """Which of the folder's leases this is; a later one has a higher number."""
        return self._number

    def tell(self, **told: Any) -> None:
        """What the next renewal is to say of the job."""
        with self._lock:
            self._holder = replace(self._holder, told=told)

    def check(self) -> None:
        """Raise ``LeaseLostError`` if another runner has taken over.

        A holder that cannot renew its lease, because its store fails, goes on: until it learns that it was succeeded it
        can do no harm, since parts are created once and journal segments are named by their content.
        """
        if self._lost is not None:
            raise self._lost

    def renew(self) -> None:
        """Renew now; raises ``LeaseLostError`` when another runner has taken over, ``StorageError`` when that fails."""
        self.check()
        self._write()

    def release(self) -> None:
        """Let go, saying so; a lease that is lost or cannot be written falls silent instead."""
        self._ended.set()
        self._thread.join()
        _held_here.discard(self._holder.token)
        if self._lost is None:
            with suppress(LeaseLostError, StorageError):
                self._write(released=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._write()
            except LeaseLostError as error:
                self._lost = error
                return
            except StorageError:
                continue  # Whatever else is written there says so.

    def _write(self, *, released: bool = False) -> None:
        check_lease(self._output, self._number)
        with self._lock:
            self._holder = replace(self._holder, beat=time.time(), beats=self._holder.beats + 1, released=released)
            data = _dump(self._holder)
        publish_bytes(_file(self._output, self._number), data)


def _create(output: Location, number: int, holder: Holder) -> None:
    """Create a lease file and remove those before it; raises ``JobHeldError`` when somebody else was faster."""
    if not create(_file(output, number), _dump(holder)):
        raise _held(output, read_holder(output))
    numbers = _numbers(output)
    if max(numbers) > number:  # The number was chosen by a listing older than somebody's takeover.
        delete(_file(output, number))
        raise _held(output, read_holder(output))
    for old in numbers:
        if old < number:
            delete(_file(output, old))


def check_lease(output: Location, number: int) -> None:
    """Raise ``LeaseLostError`` when a later lease than ``number`` was taken."""
    if max(_numbers(output), default=0) > number:
        raise LeaseLostError(
            f"{output} was taken over by {_words(read_holder(output))} while this runner was silent.",
            remedy="Leave it to that one, or end it first and run again to resume.",
        )


def _file(output: Location, number: int) -> Location:
    return output.join("_spanfill", "lease", f"{number:08d}.json")


def _numbers(output: Location) -> list[int]:
    names = (info.base_name.removesuffix(".json") for info in list_files(output.join("_spanfill", "lease")))
    return [int(name) for name in names if name.isdigit()]


def _latest(output: Location) -> tuple[int, Holder] | None:
    while numbers := _numbers(output):
        try:
            return max(numbers), Holder(**json.loads(read_bytes(_file(output, max(numbers)))))
        except FileNotFoundError:
            continue  # Its successor removed it between the listing and the reading.
        except (ValueError, TypeError):
            return max(numbers), Holder("unknown", "", 0, 0, "", 0.0, 0.0, released=True)  # Damaged by somebody.
    return None


def _dump(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _wait_until_silent(output: Location, number: int, before: Holder, check: Callable[[], None]) -> None:
    patience = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < patience:
        time.sleep(0.5)
        check()
        found = _latest(output)
        if found is None or found[1].is_gone:
            return
        if found[0] != number or found[1].beats != before.beats:
            raise _held(output, found[1])


def _held(output: Location, holder: Holder | None) -> JobHeldError:
    return JobHeldError(
        f"{output} is being written by {_words(holder)}.",
        remedy="Wait for it or end it; spanfill status tells how far it is. Or choose another --output.",
    )


def _words(holder: Holder | None) -> str:
    return f"process {holder.pid} on {holder.host}" if holder else "another runner"
