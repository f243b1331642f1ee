"""Files on a disk or in an object store: found, read, and published whole."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from serving.errors import StorageError, UsageError


@dataclass(frozen=True)
class Location:
    """A path on a pyarrow file system; ``uri`` is what the user wrote, picklable where a file system is not."""

    uri: str
    path: str

    @property
    def fs(self) -> Any:
        """The file system, opened once in each process."""
        return _open(self.uri)[0]

    @property
    def is_local(self) -> bool:
        """Whether it is a plain disk, where publishing means rename."""
        return "://" not in self.uri or self.uri.startswith("file://")

    def join(self, *names: str) -> "Location":
        """The location below this one."""
        return Location(self.uri, "/".join([self.path.rstrip("/"), *names]))

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.uri.split('://', 1)[0]}://{self.path}"


def locate(uri: str) -> Location:
    """The location of a path or URI; raises ``UsageError`` for a scheme that nothing here opens."""
    if "://" not in uri:
        return Location(str(Path(uri).expanduser().absolute()), str(Path(uri).expanduser().absolute()))
    return Location(uri, _open(uri)[1])


@lru_cache(maxsize=16)
def _open(uri: str) -> tuple[Any, str]:
    """The file system and path of a URI; kept, since opening one may ask the store where its bucket is."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        try:
            other, path = fsspec.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{uri}: {error}", remedy="Use a local path or s3://, gs://, hf:// ...") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(other)), path
    except OSError as error:
        raise UsageError(
            f"{uri} cannot be reached: {str(error).rstrip('.')}.", remedy="Check the address and your credentials."
        ) from error
    return fs, path


def exists(location: Location) -> bool:
    """Whether a file or folder is there."""
    return bool(location.fs.get_file_info(location.path).type != pafs.FileType.NotFound)


def list_files(folder: Location, *, recursive: bool = False) -> list[pafs.FileInfo]:
    """The files of a folder in the order of their paths; none if there is no folder."""
    selector = pafs.FileSelector(folder.path, recursive=recursive, allow_not_found=True)
    infos = [info for info in folder.fs.get_file_info(selector) if info.type == pafs.FileType.File]
    return sorted(infos, key=lambda info: info.path)


def read_bytes(location: Location) -> bytes:
    """The whole file; raises ``FileNotFoundError``."""
    with location.fs.open_input_stream(location.path) as stream:
        return bytes(stream.read())


def publish_bytes(location: Location, data: bytes) -> None:
    """Write a file so that readers see all of it or none; raises ``StorageError``."""
    with publish(location) as stream:
        stream.write(data)


@contextmanager
def publish(location: Location) -> Iterator[Any]:
    """A binary stream whose content appears under the name only when the block ends well.

    On a disk: a temporary file, fsync, rename. On an object store the put itself is atomic. Raises ``StorageError``
    naming the file and the reason; the temporary file is removed.
    """
    target = _temporary(location) if location.is_local else location
    fs = location.fs
    try:
        if location.is_local:
            for path in (location.path, target.path):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
        with fs.open_output_stream(target.path) as stream:
            yield stream
        if location.is_local:
            _sync(target.path)
            Path(target.path).replace(location.path)
    except (OSError, pa.ArrowException) as error:
        _discard(target)
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else str(error)
        raise StorageError(
            f"{location} cannot be written: {reason}.", remedy="What is done is kept; run again to resume."
        ) from error
    except BaseException:
        _discard(target)
        raise


def _temporary(location: Location) -> Location:
    path = Path(location.path)
    # Beside, not in, data/: a reader of data/ must never meet a file that is not a finished part.
    folder = path.parent.parent / "_spanfill" if path.parent.name in ("data", "errors") else path.parent
    return Location(location.uri, str(folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(location: Location) -> None:
    if location.is_local:
        with suppress(NotADirectoryError):
            Path(location.path).unlink(missing_ok=True)


def delete(location: Location) -> None:
    """Remove a file if it is there."""
    if exists(location):
        location.fs.delete_file(location.path)


def delete_folder(location: Location) -> None:
    """Remove a folder with all that it holds, if it is there."""
    if exists(location):
        location.fs.delete_dir(location.path)
