"""Which files an input names, and which of them are alike."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import reader
from jobs.plan import Unit
from jobs.reader import UnitReader, find_input
from jobs.store import locate, publish
from serving.errors import InputError
from tests.conftest import WriteRows

FILES = ("x.parquet", "y.parquet", ".hidden.parquet", "sub/y.parquet", "sub/deep/y.parquet", ".git/y.parquet")


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("g/*.parquet", ["x.parquet", "y.parquet"]),
        ("g/?.parquet", ["x.parquet", "y.parquet"]),
        ("g/[x]*", ["x.parquet"]),
        ("g/.h*", [".hidden.parquet"]),
        ("g/*/y.parquet", ["sub/y.parquet"]),
        ("g/**/y.parquet", ["sub/deep/y.parquet", "sub/y.parquet", "y.parquet"]),
        ("g/**", ["sub/deep/y.parquet", "sub/y.parquet", "x.parquet", "y.parquet"]),
        ("g/sub/**/deep/*", ["deep/y.parquet"]),
        ("*/x.parquet", ["g/x.parquet"]),
    ],
)
def test_a_glob_matches_folder_by_folder(write_rows: WriteRows, tmp_path: Path, glob: str, found: list[str]) -> None:
    for name in FILES:
        write_rows(f"g/{name}", prefix=["a"])
    assert [file.name for file in find_input(f"{tmp_path}/{glob}").files] == found


def test_a_glob_without_a_match_says_how_to_go_down(write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows("g/sub/y.parquet", prefix=["a"])
    with pytest.raises(InputError, match=r"no Parquet file is there.*\*\* goes down"):
        find_input(f"{tmp_path}/g/*.parquet")


@pytest.mark.parametrize("name", ["a[1].parquet", "b[1]/a.parquet", "what?/*.parquet"])
def test_a_name_that_is_there_is_no_glob(write_rows: WriteRows, tmp_path: Path, name: str) -> None:
    for decoy in ("a1.parquet", "b1/a.parquet", "whats/a.parquet"):
        write_rows(decoy, prefix=["decoy"])
    write_rows(name.replace("*", "a"), prefix=["a", "b"])
    assert find_input(f"{tmp_path}/{name}").rows == 2
    assert find_input(str((tmp_path / name).parent)).rows >= 2


def test_a_store_is_globbed_like_a_disk() -> None:
    for name in ("a.parquet", "sub/a.parquet"):
        with publish(locate("memory://globbed").join(name)) as stream:
            pq.write_table(pa.table({"prefix": ["a"]}), stream)
    assert [file.name for file in find_input("memory://globbed/*.parquet").files] == ["a.parquet"]
    assert [file.name for file in find_input("memory://globbed/**/a.parquet").files] == ["a.parquet", "sub/a.parquet"]


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    Path(f"{tmp_path}/bad\udcff.parquet").touch()
    with pytest.raises(InputError, match=r"bad\\xff\.parquet is not UTF-8"):
        find_input(str(tmp_path))


def write_schemas(folder: Path, *schemas: pa.Schema) -> str:
    for number, schema in enumerate(schemas):
        pq.write_table(schema.empty_table(), folder / f"{number}.parquet")
    return str(folder)


PREFIX = pa.field("prefix", pa.string())


def test_nullability_and_metadata_make_no_difference(tmp_path: Path) -> None:
    told = pa.schema([PREFIX.with_nullable(False).with_metadata({"unit": "text"})], metadata={"by": "somebody"})
    assert len(find_input(write_schemas(tmp_path, pa.schema([PREFIX]), told)).files) == 2


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (pa.schema([PREFIX]), "column x is missing"),
        (pa.schema([PREFIX, ("x", pa.int32())]), "column x is int32, not int64"),
        (pa.schema([PREFIX, ("x", pa.int64()), ("y", pa.int64())]), "column y is there"),
        (pa.schema([("x", pa.int64()), PREFIX]), "the columns stand in another order"),
        (pa.schema([PREFIX, ("x", pa.int64()), ("x", pa.int64())]), "column x is there twice"),
    ],
)
def test_a_difference_is_told_as_it_is(tmp_path: Path, other: pa.Schema, words: str) -> None:
    folder = write_schemas(tmp_path, pa.schema([PREFIX, ("x", pa.int64())]), other)
    with pytest.raises(InputError, match=rf"1\.parquet: {words}"):
        find_input(folder)


def test_rows_of_megabytes_are_read_a_few_at_once(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "READ_BYTES", 1 << 20)
    texts = [f"{row:06}" * 20_000 for row in range(40)]
    write_rows("long.parquet", prefix=texts)
    write_rows("short.parquet", prefix=["x"] * 1_500)
    found = find_input(str(tmp_path))
    rows = UnitReader(found.root, ["prefix"])
    long, short = (list(rows.read(file, Unit(0, 0, 0, file.rows))) for file in found.files)
    assert max(batch.num_rows for batch in long) <= 9
    assert [text for batch in long for text in batch["prefix"].to_pylist()] == texts
    assert [batch.num_rows for batch in short] == [1_024, 476]
