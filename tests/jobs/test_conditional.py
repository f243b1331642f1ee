"""Files that are created once: on a disk, on an fsspec store and on S3, of which a server runs here."""

import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from moto.server import ThreadedMotoServer

from jobs.store import Location, create, list_files, locate, publish, publish_bytes, read_bytes
from serving.errors import StorageError

STORES = ("disk", "memory", "s3")


def one_at_a_time(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """moto looks and puts in two steps that two threads can mix, which no S3 does."""
    lock = threading.Lock()

    def locked(environ: Any, start_response: Any) -> Iterable[bytes]:
        with lock:
            return list(app(environ, start_response))

    return locked


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server with a bucket called ``bucket``."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    assert moto._server is not None
    moto._server.app = one_at_a_time(moto._server.app)
    host, port = moto.get_host_and_port()
    address = f"http://{host}:{port}"
    with urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")) as answer:
        assert answer.status == 200
    yield address
    moto.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return locate(f"s3://bucket/{uuid4().hex}?endpoint_override={server}&region=us-east-1")


@pytest.fixture(params=STORES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A folder that nobody has used yet, on each kind of store."""
    if request.param == "disk":
        return locate(str(tmp_path / "folder"))
    if request.param == "memory":
        return locate(f"memory://{uuid4().hex}/folder")
    found: Location = request.getfixturevalue("s3")
    return found


def names(folder: Location) -> list[str]:
    return [info.base_name for info in list_files(folder)]


def write_once(location: Location, data: bytes) -> None:
    with publish(location, once=True) as stream:
        stream.write(data)


def test_a_file_is_created_once(folder: Location) -> None:
    location = folder.join("deep", "down", "file")
    assert create(location, b"first")
    assert not create(location, b"second")
    assert read_bytes(location) == b"first"
    assert names(folder.join("deep", "down")) == ["file"]


def test_a_published_file_is_not_created_again(folder: Location) -> None:
    publish_bytes(folder.join("file"), b"published")
    assert not create(folder.join("file"), b"created")
    assert read_bytes(folder.join("file")) == b"published"


def test_a_created_file_may_be_published_anew(folder: Location) -> None:
    assert create(folder.join("file"), b"created")
    publish_bytes(folder.join("file"), b"published")
    assert read_bytes(folder.join("file")) == b"published"


def test_an_empty_file_is_a_file(folder: Location) -> None:
    assert create(folder.join("file"), b"")
    assert not create(folder.join("file"), b"content")
    assert read_bytes(folder.join("file")) == b""


@pytest.mark.parametrize("folder", ["disk", "s3"], indirect=True)
def test_of_many_threads_one_creates_the_file_and_its_content_stays(folder: Location) -> None:
    count = 12
    for round_ in range(3):
        location = folder.join(f"file-{round_}")
        barrier = threading.Barrier(count)

        def contend(number: int, location: Location = location, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return create(location, f"content of {number}".encode())

        with ThreadPoolExecutor(count) as pool:
            won = [number for number, created in enumerate(pool.map(contend, range(count))) if created]
        assert len(won) == 1
        assert read_bytes(location) == f"content of {won[0]}".encode()
    assert names(folder) == [f"file-{round_}" for round_ in range(3)]


def test_a_put_whose_answer_was_lost_and_is_repeated_counts_as_ours(s3: Location) -> None:
    assert create(s3.join("file"), b"with a token of its own")
    assert create(s3.join("file"), b"with a token of its own")
    assert not create(s3.join("file"), b"with another token")


def test_a_store_that_fails_when_it_is_asked_whose_put_it_was_is_a_storage_error(
    s3: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore
    from obstore.exceptions import GenericError

    def fail(*_: object) -> None:
        raise GenericError("503 Slow Down")

    assert create(s3.join("file"), b"one")
    monkeypatch.setattr(obstore, "get", fail)
    with pytest.raises(StorageError, match="cannot be created: 503 Slow Down"):
        create(replace(s3.join("file"), patience=0.5), b"one")


def test_publishing_once_leaves_what_is_there_as_it_is(folder: Location) -> None:
    write_once(folder.join("data", "file"), b"first")
    write_once(folder.join("data", "file"), b"the second is longer")
    assert read_bytes(folder.join("data", "file")) == b"first"
    assert names(folder.join("data")) == ["file"]


def test_publishing_twice_replaces_what_is_there(folder: Location) -> None:
    publish_bytes(folder.join("file"), b"the first is longer")
    publish_bytes(folder.join("file"), b"second")
    assert read_bytes(folder.join("file")) == b"second"


@pytest.mark.parametrize("once", [False, True])
def test_a_failed_block_publishes_nothing(folder: Location, once: bool) -> None:
    location = folder.join("data", "file")

    def fail() -> None:
        with publish(location, once=once) as stream:
            stream.write(b"half" * 1_000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(folder.join("data")) == []
    publish_bytes(location, b"old")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_bytes(location) == b"old"


def test_a_file_of_many_blocks_arrives_whole_on_s3(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one upload block, and more than what is spooled in memory."""
    monkeypatch.setattr("jobs.store.SPOOL_BYTES", 1 << 20)
    blocks = [bytes([number]) * (1 << 20) for number in range(19)]
    with publish(s3.join("large")) as stream:
        for block in blocks:
            stream.write(block)
        assert stream.tell() == 19 << 20
    assert read_bytes(s3.join("large")) == b"".join(blocks)


def test_a_bucket_that_is_not_there_is_a_storage_error(server: str, s3: Location) -> None:
    nowhere = locate(f"s3://nowhere/folder?endpoint_override={server}&region=us-east-1").join("file")
    for deed in (create, publish_bytes):
        with pytest.raises(StorageError, match="nowhere/folder/file cannot be"):
            deed(nowhere, b"content")


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StorageError, match="file/below cannot be created"):
        create(locate(str(tmp_path)).join("file", "below"), b"")


def test_a_disk_without_hard_links_still_creates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("jobs.store.os.link", refuse)
    location = locate(str(tmp_path)).join("file")
    assert create(location, b"first")
    assert not create(location, b"second")
    write_once(location, b"third")
    assert read_bytes(location) == b"first"
    assert names(locate(str(tmp_path))) == ["file"]
