from pathlib import Path

import pytest

from jobs.store import list_files, locate, publish, publish_bytes, read_bytes
from serving.errors import StorageError, UsageError


def test_published_bytes_come_back_and_nothing_else_lies_there(tmp_path: Path) -> None:
    location = locate(str(tmp_path)).join("data", "part.parquet")
    publish_bytes(location, b"content")
    assert read_bytes(location) == b"content"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["part.parquet"]


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    location = locate(str(tmp_path)).join("data", "part.parquet")
    publish_bytes(location, b"old")

    def write_half() -> None:
        with publish(location) as stream:
            stream.write(b"half")
            assert [p.name for p in (tmp_path / "data").iterdir()] == ["part.parquet"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert read_bytes(location) == b"old"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["part.parquet"]


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(StorageError, match="data"):
        publish_bytes(locate(str(tmp_path)).join("data", "part.parquet"), b"")


def test_listing_is_sorted_and_empty_without_a_folder(tmp_path: Path) -> None:
    root = locate(str(tmp_path))
    assert list_files(root.join("nowhere")) == []
    for name in ("b", "a"):
        (tmp_path / name).touch()
    assert [info.base_name for info in list_files(root)] == ["a", "b"]


@pytest.mark.parametrize(
    "uri", ["carrier-pigeon://roof/loft", "ftp://127.0.0.1:1/x", "github://x/y", "dir://x", "zip://a::/no/such.zip"]
)
def test_what_nothing_here_opens_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError, match=f"{uri} cannot be opened: .+"):
        locate(uri)


def test_a_path_that_is_not_utf8_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        locate("bad\udcff")


def test_an_fsspec_store_works_like_a_disk() -> None:
    root = locate("memory://bucket")
    publish_bytes(root.join("data", "part.parquet"), b"content")
    assert read_bytes(root.join("data", "part.parquet")) == b"content"
    assert [info.base_name for info in list_files(root.join("data"))] == ["part.parquet"]
