"""Stores, disks and inputs that fail while a job runs: nothing that was done is lost, and the reason is said."""

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.runner import Progress, Watcher
from jobs.status import read_status
from jobs.verify import verify
from serving.errors import InputChangedError, StorageError
from tests.faulty_store import BUCKET, FaultyStore, faulty_store
from tests.runs import contents, write_pairs

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]
COUNT = 2_000


class Meddler(Watcher):
    """Does something once, as soon as a number of rows is done."""

    def __init__(self, after: int, deed: Callable[[], Any]) -> None:
        self._after = after
        self._deed: Callable[[], Any] | None = deed

    def update(self, progress: Progress) -> None:
        """Look whether it is time."""
        if self._deed is not None and progress.tally.rows >= self._after:
            self._deed()
            self._deed = None


def job(source: Path | str, output: Path | str, *, rows_per_second: int = 0, **options: Any) -> JobSpec:
    """A job whose simulated engine does so many rows a second, roughly (0: as fast as it can)."""
    engine = {"engine": "simulated", "engine_args": {"max_num_seqs": 32, "time_scale": rows_per_second / 300 or 1_000}}
    values = {"input": str(source), "output": str(output), "max_tokens": 32, "rows_per_part": 500, "batch_rows": 16}
    return JobSpec.parse(values | engine | options)


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyStore]:
    """An S3 store that can be told to fail."""
    with faulty_store() as found:
        yield found


@pytest.fixture
def healthy(store: FaultyStore) -> Iterator[FaultyStore]:
    """The store, well again after the test."""
    store.injected.clear()
    yield store
    store.share, store.down = 0.0, False


def upload(store: FaultyStore, path: Path, name: str) -> None:
    """Copy a file into the bucket."""
    fs, _ = pafs.FileSystem.from_uri(store.uri(name))
    with fs.open_output_stream(f"{BUCKET}/{name}") as stream:
        stream.write(path.read_bytes())


def download(store: FaultyStore, folder: str) -> dict[str, bytes]:
    """The files of a folder of the bucket."""
    fs, path = pafs.FileSystem.from_uri(store.uri(folder))
    return {i.base_name: fs.open_input_file(i.path).read() for i in fs.get_file_info(pafs.FileSelector(path))}


def test_a_store_that_fails_now_and_then_changes_nothing(healthy: FaultyStore, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "rows.parquet", COUNT)
    run_job(job(source, tmp_path / "disk"))
    upload(healthy, source, "in/rows.parquet")
    healthy.share = 0.15
    manifest = run_job(job(healthy.uri("in/rows.parquet"), healthy.uri("out"), rows_per_second=300))
    healthy.share = 0.0
    assert (manifest["rows"], manifest["errors"]) == (COUNT, 0)
    assert sum(healthy.injected.values()) > 10
    assert set(healthy.injected) == {"500", "503", "reset", "stall", "truncated"}
    assert download(healthy, "out/data") == contents(tmp_path / "disk")
    assert read_status(healthy.uri("out")).state == "finished"


def test_a_store_that_fails_for_good_stops_the_job_which_resumes_when_it_is_back(
    healthy: FaultyStore, tmp_path: Path
) -> None:
    source = write_pairs(tmp_path / "rows.parquet", COUNT)
    run_job(job(source, tmp_path / "disk"))

    def break_down() -> None:
        healthy.down = True

    spec = job(source, healthy.uri("gone"), rows_per_second=200, store_patience=3)
    with pytest.raises(StorageError, match=rf"s3://{BUCKET}/gone/.* cannot be .*run again to resume") as told:
        run_job(spec, watcher=Meddler(600, break_down))
    assert "ray::" not in str(told.value)
    healthy.down = False
    status = read_status(healthy.uri("gone"))
    assert status.state == "interrupted"
    assert 0 < status.rows < COUNT
    assert run_job(spec)["rows"] == COUNT
    assert download(healthy, "gone/data") == contents(tmp_path / "disk")
    assert verify(healthy.uri("gone")).problems == []


def change_in_place(path: Path) -> None:
    """Other content of the same size under the same footer: nothing but the rows tells."""
    path.write_bytes(path.read_bytes().replace(b"alpha", b"omega"))


def replace_by_another(path: Path) -> None:
    """Another file under the same name."""
    write_pairs(path.with_name("other"), COUNT, seed=1).replace(path)


@pytest.mark.parametrize("deed", [change_in_place, replace_by_another, Path.unlink])
def test_an_input_that_changes_or_vanishes_stops_the_job_and_what_is_done_stays(
    deed: Callable[[Path], None], tmp_path: Path
) -> None:
    source = write_pairs(tmp_path / "made.parquet", COUNT)
    plain = tmp_path / "in" / "rows.parquet"
    plain.parent.mkdir()
    pq.write_table(
        pq.read_table(source),
        plain,
        use_dictionary=False,
        compression="none",
        write_statistics=False,
        row_group_size=500,
    )
    original = plain.read_bytes()
    run_job(job(plain, tmp_path / "undisturbed"))
    spec = job(plain, tmp_path / "out", rows_per_second=300)
    with pytest.raises(InputChangedError, match=r"rows\.parquet") as told:
        run_job(spec, watcher=Meddler(700, lambda: deed(plain)))
    assert told.value.exit_code == 1
    done = contents(tmp_path / "out")
    assert done.items() <= contents(tmp_path / "undisturbed").items()
    if deed is change_in_place:
        with pytest.raises(InputChangedError, match=r"rows\.parquet"):
            run_job(spec)
    plain.write_bytes(original)
    assert run_job(spec)["rows"] == COUNT
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


DISK = """
mount -t tmpfs -o size=3m disk {disk}
({until} && dd if=/dev/zero of={disk}/filler bs=4k; truncate -c -s -12k {disk}/filler) >/dev/null 2>&1 &
{run}; echo first $?
find {disk}/out/data {disk}/out/_spanfill/journal -type f
wait; rm -f {disk}/filler; mount -o remount,size=30m {disk}
{run}; echo second $?
find {disk}/out/data -type f | wc -l
"""
"""Room for a lease's renewal is left, and none for a part or a segment."""


@pytest.mark.parametrize(
    ("options", "until", "text", "written", "kept"),
    [
        ("--engine instant --rows-per-part 500", "false", 2_000, r"data/part-\d{5}-\w{12}\.parquet", "data"),
        (
            f"--engine simulated --engine-arg max_num_seqs=16 --rows-per-part {COUNT}",
            "while [ -z \"$(find {disk}/out/_spanfill/journal -name '*.arrow')\" ]; do sleep 0.1; done",
            50,
            r"_spanfill/journal/00000/\w{64}\.arrow",
            "_spanfill/journal",
        ),
    ],
    ids=["while a part is written", "while journaling"],
)
def test_a_full_disk_stops_the_job_and_room_lets_it_resume(
    options: str, until: str, text: int, written: str, kept: str, tmp_path: Path
) -> None:
    """A file system of 3 MB in a mount namespace of the command's own; the second run finds a larger one."""
    texts = [random.Random(i).randbytes(text).hex() for i in range(COUNT)]
    pq.write_table(pa.table({"prefix": texts}), tmp_path / "rows.parquet")
    disk = tmp_path / "disk"
    disk.mkdir()
    run = f"{sys.executable} -m jobs.cli run --input {tmp_path}/rows.parquet --output {disk}/out {options}"
    script = DISK.format(disk=disk, run=f"{run} --max-tokens 32", until=until.format(disk=disk))
    done = subprocess.run(
        ["unshare", "--map-root-user", "--user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    told, lines = done.stderr, done.stdout.splitlines()
    if "unshare" in done.stderr or "permission denied" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr}")
    unwrapped = "".join(told.split())
    assert re.search(rf"{re.escape(str(disk))}/out/{written}cannotbewritten:Nospaceleftondevice", unwrapped), told
    assert "resume" in told
    assert "Traceback" not in told
    assert "ray::" not in told
    assert lines[0] == "first 1", done.stdout
    found, last = lines[1:-2], lines[-2:]
    assert found, done.stdout
    assert any(f"{disk}/out/{kept}/" in line for line in found), done.stdout
    assert "resuming" in told
    assert last == ["second 0", "4" if kept == "data" else "1"], told
