import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs.sorting
from jobs.sorting import in_order
from serving.errors import InterruptedJobError, StorageError

SCHEMA = pa.schema([("text", pa.large_binary()), ("number", pa.int64()), ("more", pa.list_(pa.string()))])
rows_of_text = st.lists(st.tuples(st.none() | st.binary(max_size=3), st.none() | st.integers(0, 3)), max_size=40)


def batches_of(rows: list[tuple[bytes | None, int | None]], size: int) -> list[pa.RecordBatch]:
    texts, numbers, more = zip(*[(*row, ["é", None]) for row in rows], strict=True)
    batches: list[pa.RecordBatch] = pa.table([texts, numbers, more], SCHEMA).to_batches(max_chunksize=size)
    return batches


@given(rows=rows_of_text, size=st.integers(1, 9), memory=st.integers(0, 4_000), fan_in=st.integers(2, 4))
def test_any_rows_come_in_order_with_any_memory(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[bytes | None, int | None]],
    size: int,
    memory: int,
    fan_in: int,
) -> None:
    folder = tmp_path_factory.mktemp("sort") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.sorting, "FAN_IN", fan_in)
        batches = batches_of(rows, size) if rows else []
        tables = list(in_order(batches, SCHEMA, ["text", "number"], memory=memory, folder=folder))
    found = [tuple(row.values()) for table in tables for row in table.to_pylist()]
    wanted = sorted(rows, key=lambda row: tuple((value is None, value) for value in row))
    assert found == [(*row, ["é", None]) for row in wanted]
    assert not folder.exists()


@pytest.mark.parametrize("texts", ["even", "long together"])
def test_rows_of_many_times_the_memory_take_only_that_memory(texts: str) -> None:
    def peak(mebibytes: int) -> int:
        script = Path(__file__).with_name("sort_in_memory.py")
        asked = [sys.executable, str(script), texts, str(mebibytes)]
        return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)

    assert peak(600) - peak(1) < 200 << 20


def test_a_folder_without_room_is_told_and_left_empty(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    rows: list[Any] = [(random.Random(number).randbytes(4_000), number) for number in range(100)]
    try:
        with pytest.raises(StorageError, match=r"cannot be sorted in .*runs: .*Give it room"):
            list(in_order(batches_of(rows, 10), SCHEMA, ["text", "number"], memory=1 << 20, folder=tmp_path / "runs"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_whoever_checks_can_stop_it_between_any_two_steps(tmp_path: Path) -> None:
    rows: list[Any] = [(b"%d" % number, number) for number in range(100)]

    def sort_until(checks: int) -> None:
        left = iter(range(checks))

        def check() -> None:
            if next(left, None) is None:
                raise InterruptedJobError

        sort = in_order(batches_of(rows, 10), SCHEMA, ["text"], memory=2_000, folder=tmp_path / "runs", check=check)
        for _ in sort:
            pass

    for checks in (0, 5, 12, 30):
        with pytest.raises(InterruptedJobError):
            sort_until(checks)
        assert list(tmp_path.iterdir()) == []
    sort_until(1_000)
