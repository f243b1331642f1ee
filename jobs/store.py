"""Files on a disk or in an object store: found, read, published whole, created once.

What is assumed of a store: a put is atomic (readers see all of an object or none of it), and whoever reads or lists
after a put has ended sees it, as S3, Google Cloud Storage, Azure and POSIX file systems promise. A remote store that
fails is tried again for its location's ``patience``; a disk that fails is not.
"""

import errno
import ftplib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from serving.errors import StorageError, UsageError

T = TypeVar("T")
PATIENCE_SECONDS = 60.0
"""How long a failing remote store is tried again, unless the location says otherwise."""

SPOOL_BYTES = 64 << 20
"""A file for an object store waits here, in memory up to this size, until it is whole."""

UPLOAD_BYTES = 8 << 20

ONE_PUT_BYTES = 16 << 20
"""A file that is to be put once goes as one conditional put up to this size: no multipart upload has a condition."""

PERMANENT = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_BUCKET")
"""Answers of a store that asking again does not change, as pyarrow spells them."""

FSSPEC_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    *ftplib.all_errors,
)
"""What fsspec's back ends raise for an address that lacks something, a package that does, or a host that is silent."""


@dataclass(frozen=True)
class Location:
    """A path on a pyarrow file system; ``uri`` is what the user wrote, picklable where a file system is not.

    ``patience`` is for how many seconds its store, if remote, is tried again when it fails.
    """

    uri: str
    path: str
    patience: float = PATIENCE_SECONDS

    @property
    def fs(self) -> Any:
        """The file system, opened once in each process."""
        return open_uri(self.uri)[0]

    @property
    def is_local(self) -> bool:
        """Whether it is a plain disk, where publishing means rename."""
        return "://" not in self.uri or self.uri.startswith("file://")

    def join(self, *names: str) -> "Location":
        """The location below this one."""
        return replace(self, path="/".join([self.path.rstrip("/"), *names]))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.uri.split('://', 1)[0]}://{self.path}"


def locate(uri: str, *, patience: float = PATIENCE_SECONDS) -> Location:
    """The location of a path or URI; raises ``UsageError`` for one that nothing here opens."""
    _check_utf8(uri)
    if "://" not in uri:
        path = str(Path(uri).expanduser().absolute())
        return Location(path, path, patience)
    return Location(uri, open_uri(uri)[1], patience)


def _check_utf8(uri: str) -> None:
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the path {uri!r} is not UTF-8.", remedy="Rename it.") from None


@lru_cache(maxsize=16)
def open_uri(uri: str) -> tuple[Any, str]:
    """The file system and path of a URI; kept, since opening one may ask the store where its bucket is."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        try:
            other, path = fsspec.url_to_fs(uri)
        except FSSPEC_ERRORS as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise UsageError(
                f"{uri} cannot be opened: {reason}.", remedy="Use a local path or s3://, gs://, hf:// ..."
            ) from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(other)), path
    except OSError as error:
        raise UsageError(
            f"{uri} cannot be reached: {str(error).rstrip('.')}.", remedy="Check the address and your credentials."
        ) from error
    return fs, path


def may_pass(error: BaseException) -> bool:
    """Whether a remote store's failure may be gone at the next try."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(error, OSError | pa.ArrowException) and not any(code in str(error) for code in PERMANENT)


def patient(location: Location, work: Callable[[], T]) -> T:
    """Do ``work``; on a remote store again and again while its failures may pass."""
    if location.is_local:
        return work()
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(location.patience),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=8),
        retry=tenacity.retry_if_exception(may_pass),
        reraise=True,
    )
    return retrying(work)


def exists(location: Location) -> bool:
    """Whether a file or folder is there; raises ``StorageError``."""
    return bool(_type(location) != pafs.FileType.NotFound)


def is_file(location: Location) -> bool:
    """Whether a file is there; raises ``StorageError``."""
    return bool(_type(location) == pafs.FileType.File)


def is_folder(location: Location) -> bool:
    """Whether a folder is there; raises ``StorageError``."""
    return bool(_type(location) == pafs.FileType.Directory)


def _type(location: Location) -> pafs.FileType:
    return _told(location, lambda: location.fs.get_file_info(location.path)).type


def list_files(folder: Location, *, recursive: bool = False) -> list[pafs.FileInfo]:
    """The files of a folder in the order of their paths; none if there is no folder. Raises ``StorageError``."""
    selector = pafs.FileSelector(folder.path, recursive=recursive, allow_not_found=True)
    found = _told(folder, lambda: folder.fs.get_file_info(selector))
    return sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: info.path)


def _told(location: Location, work: Callable[[], Any]) -> Any:
    try:
        return patient(location, work)
    except (OSError, pa.ArrowException) as error:
        raise _failed(location, "reached", error) from error


def read_bytes(location: Location) -> bytes:
    """The whole file; raises ``FileNotFoundError``, ``StorageError`` when a store goes on failing."""

    def read() -> bytes:
        with location.fs.open_input_file(location.path) as file:
            data = bytes(file.read())
            if len(data) != file.size():
                raise OSError(f"{len(data)} of {file.size()} bytes came")
            return data

    try:
        return patient(location, read)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise _failed(location, "read", error) from error


def publish_bytes(location: Location, data: bytes) -> None:
    """Write a file so that readers see all of it or none; raises ``StorageError``."""
    with publish(location) as stream:
        stream.write(data)


@contextmanager
def publish(location: Location, *, once: bool = False) -> Iterator[Any]:
    """A binary stream whose content appears under the name only when the block ends well.

    On a disk: a temporary file, fsync, rename. On an object store: spooled here, then put (in multiple parts where it
    is large), and its size checked. ``once``: a file that is there already stays as it is; on an object store one of
    more than ``ONE_PUT_BYTES`` is looked for first. Raises ``StorageError`` naming the file and the reason; the
    temporary file is removed.
    """
    try:
        with _published_on_disk(location, once) if location.is_local else _published_remotely(location, once) as stream:
            yield stream
    except (OSError, pa.ArrowException) as error:
        raise _failed(location, "written", error) from error


def create(location: Location, data: bytes) -> bool:
    """Write a file unless it is there: of many who try with different data, one gets True. Raises ``StorageError``.

    On a disk a hard link of the finished file, on S3, Google Cloud Storage and Azure a conditional put, elsewhere what
    fsspec's mode ``create`` does there.
    """
    try:
        if location.is_local:
            return _create_on_disk(location, data)
        return patient(location, lambda: _create_remotely(location, data))
    except (OSError, pa.ArrowException) as error:
        raise _failed(location, "created", error) from error


def _failed(location: Location, deed: str, error: BaseException) -> StorageError:
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error).strip().rstrip(".").splitlines()[0]
    return StorageError(
        f"{location} cannot be {deed}: {reason}.",
        remedy="Mend that and run again to resume; what a job has done is kept.",
    )


@contextmanager
def _published_on_disk(location: Location, once: bool) -> Iterator[Any]:
    target = _temporary(location)
    try:
        for path in (location.path, target):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(target).open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if once:
            _link(target, location.path)
        else:
            Path(target).replace(location.path)
        _sync_folder(location.path)
    finally:
        with suppress(NotADirectoryError):
            Path(target).unlink(missing_ok=True)


def _temporary(location: Location) -> str:
    path = Path(location.path)
    # Beside, not in, data/: a reader of data/ must never meet a file that is not a finished part.
    folder = path.parent.parent / "_spanfill" if path.parent.name in ("data", "errors") else path.parent
    return str(folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _link(source: str, target: str) -> bool:
    """Give ``source`` the name ``target`` unless that is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without hard links: two writers at the same moment would both win.
        if Path(target).exists():
            return False
        Path(source).replace(target)
    return True


def _sync_folder(path: str) -> None:
    descriptor = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_on_disk(location: Location, data: bytes) -> bool:
    target = _temporary(location)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        Path(target).write_bytes(data)
        return _link(target, location.path)
    finally:
        Path(target).unlink(missing_ok=True)


@contextmanager
def _published_remotely(location: Location, once: bool) -> Iterator[Any]:
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        yield spool
        size = spool.tell()
        if once and size <= ONE_PUT_BYTES:
            spool.seek(0)
            data = spool.read()
            patient(location, lambda: _create_remotely(location, data))
        elif not (once and exists(location)):
            patient(location, lambda: _upload(location, spool, size))


def _upload(location: Location, spool: Any, size: int) -> None:
    spool.seek(0)
    with location.fs.open_output_stream(location.path) as stream:
        while block := spool.read(UPLOAD_BYTES):
            stream.write(block)
    arrived = location.fs.get_file_info(location.path).size
    if arrived != size:
        raise OSError(f"{arrived} of {size} bytes arrived")


def _create_remotely(location: Location, data: bytes) -> bool:
    from jobs.conditional import put_new

    return put_new(location.uri, location.path, data)


def delete(location: Location) -> None:
    """Remove a file if it is there."""
    _delete(location, location.fs.delete_file)


def delete_folder(location: Location) -> None:
    """Remove a folder with all that it holds, if it is there."""
    _delete(location, location.fs.delete_dir)


def _delete(location: Location, remove: Callable[[str], None]) -> None:
    if not exists(location):
        return
    try:
        patient(location, lambda: remove(location.path))
    except FileNotFoundError:
        return
    except (OSError, pa.ArrowException) as error:
        raise _failed(location, "removed", error) from error
