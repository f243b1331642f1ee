"""What tenants store: a row for each file in the database, its bytes in a folder of the tenant's own, under its id."""

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from jobs.api.database import Database, Page, find_row, read_page
from jobs.api.order import WorkFolder
from serving.errors import ForbiddenError, NotFoundError
from serving.tenants.sessions import take_turns
from serving.tenants.tables import FileRow, WorkRow

INCOMING = ".incoming-"
STALE_SECONDS = 86_400.0
"""A file that nobody knows and that is older was left behind by a gateway that died."""


class Shelf:
    """Files by their tenants, each of whom may store ``most_bytes`` in ``most_files``.

    Every method raises ``DatabaseAwayError``.

    Nothing that a tenant sends becomes part of a path: folders are named by a hash of the tenant, files by their ids.
    """

    def __init__(self, database: Database, root: Path, *, most_bytes: int, most_files: int) -> None:
        self._database = database
        self._root = root
        self._most_bytes = most_bytes
        self._most_files = most_files
        self._open: Counter[str] = Counter()
        self._opening = threading.Lock()

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds since 1970."""
        return self._database.clock

    def folder(self, tenant: str) -> Path:
        """Where a tenant's files lie."""
        folder = self._root / hashlib.sha256(tenant.encode()).hexdigest()[:32]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def path(self, file: FileRow) -> Path:
        """Where a file's bytes lie."""
        return self.folder(file.tenant) / file.id

    def work_folder(self, tenant: str, work_id: str) -> WorkFolder:
        """Where a batch or job of a tenant works."""
        return WorkFolder(self.folder(tenant) / "works" / work_id)

    @contextmanager
    def incoming(self, tenant: str) -> Iterator[Path]:
        """A path to write a file to that is to be stored; gone at the end."""
        path = self.folder(tenant) / f"{INCOMING}{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def uploading(self, tenant: str, size: int) -> Iterator[int]:
        """Reserve ``size`` bytes, which later uploads of the tenant to this gateway leave free until the end.

        Gives how many this one is to leave free.
        """
        with self._opening:
            earlier = self._open[tenant]
            self._open[tenant] += size
        try:
            yield earlier
        finally:
            with self._opening:
                self._open[tenant] -= size
                if not self._open[tenant]:
                    del self._open[tenant]

    def room(self, tenant: str, earlier: int = 0) -> int:
        """Bytes that the tenant may store besides what it has and what ``earlier`` uploads may bring.

        Raises ``ForbiddenError`` when there are none.
        """
        with self._database.session() as session:
            left = self._room(session, tenant) - earlier
        if left <= 0:
            raise self.full()
        return left

    def is_beyond(self, tenant: str, more: int) -> bool:
        """Whether the tenant stores more than it may, with ``more`` bytes that nobody has counted."""
        with self._database.session() as session:
            return _stored(session, tenant) + more > self._most_bytes

    def _room(self, session: Session, tenant: str) -> int:
        left = self._most_bytes - _stored(session, tenant)
        if left <= 0:
            raise self.full()
        if (session.scalar(select(func.count()).where(FileRow.tenant == tenant)) or 0) >= self._most_files:
            raise ForbiddenError(f"The tenant may store {self._most_files:,} files.", remedy="Delete some.")
        return left

    def store(self, file: FileRow, source: Path) -> FileRow:
        """Keep what a tenant sent; raises ``ForbiddenError`` when the tenant has no room for it."""
        place(source, self.path(file))
        try:
            with self._database.session(writes=True) as session:
                take_turns(session, file.tenant)
                if file.bytes > self._room(session, file.tenant):
                    raise self.full()
                session.add(file)
        except ForbiddenError:
            self.path(file).unlink(missing_ok=True)
            raise  # Of a DatabaseAwayError only the answer may be lost: the sweep removes what nobody knows.
        return file

    def keep(self, file: FileRow, source: Path) -> None:
        """Keep what was made for a tenant, room or no room; once, however often it is asked."""
        place(source, self.path(file))
        with self._database.session(writes=True) as session:
            if session.get(FileRow, file.id) is None:
                session.add(file)

    def find(self, tenant: str, file_id: str) -> FileRow:
        """A tenant's file; raises ``NotFoundError``, for another's too."""
        with self._database.session() as session:
            file = find_row(session, FileRow, file_id, *self._own(tenant))
        if not self.path(file).is_file():
            raise NotFoundError(f"The file {file_id} is not on this server.", remedy="Upload it again.")
        return file

    def page(self, tenant: str, page: Page, purpose: str | None = None) -> tuple[list[FileRow], bool]:
        """A part of a tenant's files, of one purpose or all, and whether more follow; raises ``NotFoundError``."""
        wanted = [] if purpose is None else [FileRow.purpose == purpose]
        with self._database.session() as session:
            return read_page(session, FileRow, page, *self._own(tenant), *wanted)

    def delete(self, tenant: str, file_id: str) -> FileRow:
        """Forget a file; raises ``NotFoundError``. Works that read it go on."""
        with self._database.session(writes=True) as session:
            file = find_row(session, FileRow, file_id, *self._own(tenant), lock=True)
            session.delete(file)
        self.path(file).unlink(missing_ok=True)
        return file

    def sweep(self) -> None:
        """Remove the files whose time is over, and what gateways that died left behind."""
        with self._database.session(writes=True) as session:
            files = list(session.scalars(select(FileRow).where(FileRow.expires <= self._database.clock())))
            for file in files:
                session.delete(file)
        for file in files:
            self.path(file).unlink(missing_ok=True)
        with self._database.session() as session:
            known = {*session.scalars(select(FileRow.id)), *session.scalars(select(WorkRow.id))}
        for path in [*self._root.glob(f"*/{INCOMING}*"), *self._root.glob("*/file-*"), *self._root.glob("*/works/*")]:
            if path.name in known or path.stat().st_mtime >= time.time() - STALE_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self, folder: WorkFolder) -> None:
        """Remove what a work left on the disk."""
        shutil.rmtree(folder.path, ignore_errors=True)

    def _own(self, tenant: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
        return FileRow.tenant == tenant, FileRow.expires > self._database.clock()

    def full(self) -> ForbiddenError:
        """That a tenant has no more room, in words."""
        return ForbiddenError(
            f"The tenant may store {self._most_bytes:,} bytes: uploads, what its works read, and results.",
            remedy="Delete files or finished jobs, or wait for the end of others.",
        )


def place(source: Path, target: Path) -> None:
    """Give a file another name, by which it stays whatever becomes of the first; a name that is there stays."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # A file system without hard links.
        copy = target.with_name(f"{INCOMING}{secrets.token_hex(8)}")
        shutil.copyfile(source, copy)
        copy.replace(target)


def _stored(session: Session, tenant: str) -> int:
    """Bytes of a tenant's files, of what its batches and jobs read, and of its jobs' results so far."""
    files = select(func.coalesce(func.sum(FileRow.bytes), 0)).where(FileRow.tenant == tenant)
    works = select(func.coalesce(func.sum(WorkRow.bytes), 0)).where(WorkRow.tenant == tenant)
    return int(session.scalar(files) or 0) + int(session.scalar(works) or 0)
