"""``spanfill run`` on real Ray Serve, with engines that cost nothing: what goes in, what comes out, what is refused."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.runner import Progress, Watcher
from serving.errors import InputChangedError, InterruptedJobError, OutputError, TooManyErrorsError
from tests.conftest import WriteRows
from tests.runs import Listener

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]
LANGUAGES = {
    "python": ("def f():\n    ", "\n    return π"),
    "javascript": ("const größe = () => {\n  ", "\n};"),
    "java": ("class Ä {\n  int f() { ", " }\n}"),
    "go": ("func F() string {\n\t", "\n}\n// 漢字"),
    "rust": ("fn main() {\n    ", "\n}"),
    "c": ("int main(void) {\n  ", "\n  return 0;\n}"),
    "ruby": ("def f\n  ", "\nend # 🙂"),
    "shell": ("for i in *; do\n  ", "\ndone"),
}


def spec(source: Path | str, output: Path, checkpoint: Path, **options: Any) -> JobSpec:
    values = {"input": str(source), "output": str(output), "model": str(checkpoint), "engine": "instant"}
    return JobSpec.parse(values | {"max_tokens": 16} | options)


def read(output: Path, folder: str = "data") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for part in sorted((output / folder).iterdir()):
        rows += pq.read_table(part).to_pylist()
    return rows


def test_rows_come_back_in_order_with_every_promised_column(
    write_rows: WriteRows, tmp_path: Path, checkpoint: Path
) -> None:
    count = 700
    write_rows("in/a.parquet", prefix=[f"a{i % 7}" for i in range(count)], id=list(range(count)), extra=["x"] * count)
    write_rows("in/b.parquet", prefix=["b"] * 5, id=list(range(count, count + 5)), extra=["y"] * 5)
    (tmp_path / "in" / "notes.txt").write_text("not Parquet")
    (tmp_path / "in" / "_SUCCESS").touch()
    job = spec(
        tmp_path / "in",
        tmp_path / "out",
        checkpoint,
        rows_per_part=250,
        feeders=2,
        extra_columns=["mean_logprob", "token_ids", "source_file", "source_row"],
    )
    manifest = run_job(job)
    rows = read(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(count + 5))
    assert [row["source_row"] for row in rows] == [*range(count), *range(5)]
    assert {row["source_file"] for row in rows} == {"a.parquet", "b.parquet"}
    assert list(rows[0]) == [
        *("prefix", "id", "extra", "infill", "finish_reason", "prompt_tokens", "completion_tokens"),
        *("prefix_chars", "suffix_chars", "truncated", "sample"),
        *("mean_logprob", "token_ids", "source_file", "source_row"),
    ]
    assert len(list((tmp_path / "out" / "data").iterdir())) == 4
    assert (manifest["rows"], manifest["errors"], manifest["engine"]) == (count + 5, 0, "instant")
    assert sum(manifest["replicas"].values()) == count + 5
    assert manifest == json.loads((tmp_path / "out" / "_spanfill" / "manifest.json").read_text())
    part = next((tmp_path / "out" / "data").iterdir())
    told = json.loads(pq.read_schema(part).metadata[b"spanfill"])
    assert (told["engine"], "simulated" in told) == ("instant", True)
    again = run_job(job)
    assert again["parts"] == manifest["parts"]


def test_samples_fan_out_with_seeds_of_their_own(write_rows: WriteRows, tmp_path: Path, checkpoint: Path) -> None:
    source = write_rows(prefix=["a", "a"], id=["one", "two"])
    run_job(spec(source, tmp_path / "out", checkpoint, n=3, temperature=0.8))
    rows = read(tmp_path / "out")
    assert [(row["id"], row["sample"]) for row in rows] == [(i, s) for i in ("one", "two") for s in range(3)]
    assert len({row["infill"] for row in rows}) == 6


def test_bad_rows_become_error_rows_and_spare_the_rest(tmp_path: Path, checkpoint: Path) -> None:
    prefixes = pa.array([b"good", None, b"bad \xff\xfe", b"", b"x" * 10_000_000], pa.binary())
    table = pa.table({"id": [1, 1, 2, 3, 4], "prefix": pa.Array.from_buffers(pa.string(), 5, prefixes.buffers())})
    pq.write_table(table, tmp_path / "rows.parquet")
    manifest = run_job(spec(tmp_path / "rows.parquet", tmp_path / "out", checkpoint, max_error_rate=1.0))
    assert [row["id"] for row in read(tmp_path / "out")] == [1, 3, 4]
    assert read(tmp_path / "out")[2]["truncated"] is True
    errors = read(tmp_path / "out", "errors")
    assert [(e["source_row"], e["error_code"]) for e in errors] == [(1, "bad_input"), (2, "bad_input")]
    assert "null" in errors[0]["error_message"]
    assert "not UTF-8 at byte 4" in errors[1]["error_message"]
    assert errors[1]["prefix"].startswith("bad \ufffd")
    assert manifest["error_codes"] == {"bad_input": 2}


def test_a_lone_surrogate_is_a_bad_row(tmp_path: Path, checkpoint: Path) -> None:
    column = pa.array([b"a", "b\ud800".encode("utf-8", "surrogatepass")], pa.binary())
    table = pa.table({"prefix": pa.Array.from_buffers(pa.string(), 2, column.buffers())})
    pq.write_table(table, tmp_path / "rows.parquet")
    run_job(spec(tmp_path / "rows.parquet", tmp_path / "out", checkpoint, max_error_rate=1.0))
    assert [row["prefix"] for row in read(tmp_path / "out")] == ["a"]
    assert "not UTF-8 at byte 1" in read(tmp_path / "out", "errors")[0]["error_message"]


def test_a_damaged_page_stops_the_job_and_names_file_and_rows(
    write_rows: WriteRows, tmp_path: Path, checkpoint: Path
) -> None:
    source = tmp_path / "rows.parquet"
    texts = [random.Random(i).randbytes(300).hex() for i in range(2_000)]
    pq.write_table(pa.table({"prefix": texts}), source, row_group_size=500, use_dictionary=False)
    place = pq.read_metadata(source).row_group(3).column(0).data_page_offset
    whole = source.read_bytes()
    source.write_bytes(whole[: place + 40] + bytes(4_000) + whole[place + 4_040 :])
    job = spec(source, tmp_path / "out", checkpoint, rows_per_part=500)
    with pytest.raises(InputChangedError, match=r"rows\.parquet, rows 1500 to 2000 \(row group 3\)") as told:
        run_job(job)
    assert "ray::" not in str(told.value)
    assert told.value.exit_code == 1
    source.write_bytes(whole)
    assert run_job(job)["rows"] == 2_000


def test_repeated_ids_and_foreign_files_are_told_once(write_rows: WriteRows, tmp_path: Path, checkpoint: Path) -> None:
    write_rows("in/a.parquet", prefix=["a", "b", "c", "d"], id=[7, 7, 7, 8])
    (tmp_path / "in" / "notes.txt").write_text("not Parquet")
    listener = Listener()
    manifest = run_job(spec(tmp_path / "in", tmp_path / "out", checkpoint), watcher=listener)
    assert (manifest["rows"], manifest["errors"]) == (4, 0)
    assert len([line for line in listener.heard if "2 rows repeat an id" in line]) == 1
    assert len([line for line in listener.heard if "notes.txt" in line]) == 1


def test_too_many_error_rows_stop_the_job(tmp_path: Path, checkpoint: Path) -> None:
    column = pa.array(["a", None] * 400, pa.string())
    pq.write_table(pa.table({"prefix": column}), tmp_path / "rows.parquet")
    with pytest.raises(TooManyErrorsError, match=r"50.0% of the rows fail \(bad_input: \d+\)"):
        run_job(spec(tmp_path / "rows.parquet", tmp_path / "out", checkpoint, rows_per_part=200))
    assert not (tmp_path / "out" / "_spanfill" / "manifest.json").exists()


def test_an_input_of_no_rows_gives_a_part_of_no_rows(tmp_path: Path, checkpoint: Path) -> None:
    pq.write_table(
        pa.table({"prefix": pa.array([], pa.string()), "id": pa.array([], pa.int64())}), tmp_path / "e.parquet"
    )
    manifest = run_job(spec(tmp_path / "e.parquet", tmp_path / "out", checkpoint))
    assert manifest["rows"] == 0
    part = next((tmp_path / "out" / "data").iterdir())
    assert pq.read_schema(part).names[:3] == ["prefix", "id", "infill"]


def test_text_in_every_arrow_dress_and_eight_languages(tmp_path: Path, checkpoint: Path) -> None:
    polars = pytest.importorskip("polars")
    prefixes = [prefix for prefix, _ in LANGUAGES.values()]
    suffixes = [suffix for _, suffix in LANGUAGES.values()]
    (tmp_path / "in").mkdir()
    dresses = {
        "dictionary": pa.table({"prefix": pa.array(prefixes).dictionary_encode(), "suffix": pa.array(suffixes)}),
        "large": pa.table({"prefix": pa.array(prefixes, pa.large_string()), "suffix": pa.array(suffixes)}),
        "view": pa.table({"prefix": pa.array(prefixes, pa.string_view()), "suffix": pa.array(suffixes)}),
    }
    answers = []
    for name, table in dresses.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    polars.DataFrame({"prefix": prefixes, "suffix": suffixes}).write_parquet(tmp_path / "polars.parquet")
    for name in [*dresses, "polars"]:
        run_job(spec(tmp_path / f"{name}.parquet", tmp_path / name, checkpoint))
        rows = read(tmp_path / name)
        assert [row["prefix"] for row in rows] == prefixes
        assert [row["prefix_chars"] for row in rows] == [len(p) for p in prefixes]
        answers.append([row["infill"] for row in rows])
    assert all(answer == answers[0] for answer in answers)


def test_every_reader_sees_the_same_rows(write_rows: WriteRows, tmp_path: Path, checkpoint: Path) -> None:
    import datasets
    import duckdb
    import polars

    run_job(spec(write_rows(prefix=["a"] * 30), tmp_path / "out", checkpoint, rows_per_part=7))
    data = tmp_path / "out" / "data"
    assert pq.read_table(data).num_rows == 30
    assert polars.read_parquet(data).height == 30
    assert duckdb.connect().execute(f"select count(*) from '{data}/*.parquet'").fetchall() == [(30,)]
    loaded = datasets.load_dataset("parquet", data_files=f"{data}/*.parquet", cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 30


def test_ctrl_c_keeps_what_is_done_and_the_same_command_resumes(
    write_rows: WriteRows, tmp_path: Path, checkpoint: Path
) -> None:
    source = write_rows(prefix=[f"row {i}" for i in range(20_000)], id=list(range(20_000)))
    output = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.cli", "run", "--input", source, "--output", output, "--model", checkpoint]
    command += ["--engine", "instant", "--max-tokens", "16", "--rows-per-part", "1000", "--json"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(output.glob("data/*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "what is done is kept" in " ".join(told.split())
    kept = {part.name: part.stat().st_mtime_ns for part in output.glob("data/*.parquet")}
    assert 0 < len(kept) < 20
    assert not (output / "_spanfill" / "manifest.json").exists()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert json.loads(done.stdout)["rows"] == 20_000
    assert [row["id"] for row in read(output)] == list(range(20_000))
    assert kept.items() <= {part.name: part.stat().st_mtime_ns for part in output.glob("data/*.parquet")}.items()


def test_error_rows_give_exit_code_3(tmp_path: Path, checkpoint: Path) -> None:
    pq.write_table(pa.table({"prefix": pa.array(["a", None])}), tmp_path / "rows.parquet")
    command = ["run", "--input", tmp_path / "rows.parquet", "--output", tmp_path / "out", "--model", checkpoint]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, command), "--engine", "simulated", "--max-tokens", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "every infill is noise" in done.stderr
    assert "bad_input: 1" in done.stderr


def test_memory_of_the_runner_is_flat(write_rows: WriteRows, tmp_path: Path, checkpoint: Path) -> None:
    """Ten times the rows must not need more memory; a tenth is allowed for what the allocator does."""
    text = "x = 1  # a line of ordinary length\n" * 40
    source = write_rows(prefix=[f"# {i}\n{text}" for i in range(20_000)])
    peaks = {}
    for rows in (2_000, 20_000):
        command = [sys.executable, "-m", "jobs.cli", "run", "--input", source, "--output", tmp_path / str(rows)]
        command += ["--model", checkpoint, "--engine", "instant", "--max-tokens", "8", "--limit", rows]
        with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE) as process:
            peak = 0
            while process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    peak = max(peak, psutil.Process(process.pid).memory_info().rss)
                time.sleep(0.05)
        assert process.returncode == 0
        peaks[rows] = peak
    assert max(peaks.values()) < 1 << 30
    assert peaks[20_000] < 1.1 * peaks[2_000], peaks


def test_a_few_bad_rows_do_not_stop_a_job_that_allows_for_them(tmp_path: Path, checkpoint: Path) -> None:
    """Rows are prepared long before an engine answers: 2 % of them must not look like all."""
    prefixes = [None if i % 50 == 0 else f"row {i}" for i in range(10_000)]
    pq.write_table(pa.table({"prefix": prefixes}), tmp_path / "rows.parquet")
    manifest = run_job(spec(tmp_path / "rows.parquet", tmp_path / "out", checkpoint))
    assert (manifest["rows"], manifest["error_codes"]) == (9_800, {"bad_input": 200})


def test_an_id_that_is_not_utf8_is_a_bad_row(tmp_path: Path, checkpoint: Path) -> None:
    ids = pa.array([b"good", b"bad \xff", None], pa.binary())
    table = pa.table({"prefix": ["a", "b", "c"], "id": pa.Array.from_buffers(pa.string(), 3, ids.buffers())})
    pq.write_table(table, tmp_path / "rows.parquet")
    run_job(spec(tmp_path / "rows.parquet", tmp_path / "out", checkpoint, max_error_rate=1.0))
    assert [row["prefix"] for row in read(tmp_path / "out")] == ["a", "c"]
    (error,) = read(tmp_path / "out", "errors")
    assert "column id is not UTF-8 at byte 4" in error["error_message"]


class Onlooker(Listener):
    """Hears what is said, and sees at every look whether there is a manifest."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self.manifest = output / "_spanfill" / "manifest.json"
        self.seen: list[bool] = []

    def update(self, progress: Progress) -> None:
        """Look."""
        self.seen.append(self.manifest.exists())


def assert_manifest_is_true(output: Path) -> None:
    told = json.loads((output / "_spanfill" / "manifest.json").read_text())["parts"]
    there = {f"{path.parent.name}/{path.name}": path for path in [*output.glob("data/*"), *output.glob("errors/*")]}
    assert told == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()}


def test_a_damaged_part_is_made_anew_before_the_manifest_says_done(
    write_rows: WriteRows, tmp_path: Path, checkpoint: Path
) -> None:
    source = write_rows(prefix=[f"row {i}" for i in range(300)])
    job, output = spec(source, tmp_path / "out", checkpoint, rows_per_part=100), tmp_path / "out"
    manifest = run_job(job)
    parts = {path: path.read_bytes() for path in sorted((output / "data").iterdir())}
    victim = list(parts)[1]
    victim.write_bytes(bytes(len(parts[victim])))
    onlooker = Onlooker(output)
    again = run_job(job, watcher=onlooker)
    assert len(onlooker.seen) > 1
    assert not any(onlooker.seen), "the manifest was there while a part was made anew"
    assert again["parts"] == manifest["parts"]
    assert {path: path.read_bytes() for path in sorted((output / "data").iterdir())} == parts
    assert (output / "_spanfill" / "damaged" / f"data-{victim.name}").exists()
    assert_manifest_is_true(output)


def test_no_manifest_is_there_while_error_rows_are_done_again(tmp_path: Path, checkpoint: Path) -> None:
    pq.write_table(pa.table({"prefix": pa.array(["a", None] * 50)}), tmp_path / "rows.parquet")
    job, output = spec(tmp_path / "rows.parquet", tmp_path / "out", checkpoint, max_error_rate=1.0), tmp_path / "out"
    assert run_job(job)["errors"] == 50
    onlooker = Onlooker(output)
    assert run_job(job.model_copy(update={"retry_errors": True}), watcher=onlooker)["errors"] == 50
    assert len(onlooker.seen) > 1
    assert not any(onlooker.seen)
    assert_manifest_is_true(output)


SLOW = {"engine": "simulated", "engine_args": {"max_num_seqs": 4}, "batch_rows": 4}


class Impatient(Watcher):
    """Stops the job once 50 rows are done in one stage of it."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def update(self, progress: Progress) -> None:
        if progress.stage == self._stage and progress.tally.rows > 50:
            raise InterruptedJobError("enough.", remedy="")


def test_what_earlier_runs_kept_is_shown_while_engines_start(
    write_rows: WriteRows, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_rows(prefix=[f"row {i}" for i in range(1_000)]), tmp_path / "out"
    job = spec(source, output, checkpoint, **SLOW)
    with pytest.raises(InterruptedJobError):
        run_job(job, watcher=Impatient("running"))

    def start(*given: object, check: Callable[[], None], **more: object) -> None:
        """Takes a minute."""
        for _ in range(600):
            check()
            time.sleep(0.1)
        pytest.fail("nothing was shown")

    monkeypatch.setattr("serving.fleet.join_or_start", start)
    with pytest.raises(InterruptedJobError):
        run_job(job, watcher=Impatient("starting the engine"))


def test_a_damaged_segment_is_set_aside_and_said(write_rows: WriteRows, tmp_path: Path, checkpoint: Path) -> None:
    source, output = write_rows(prefix=[f"row {i}" for i in range(1_000)]), tmp_path / "out"
    job = spec(source, output, checkpoint, **SLOW)
    with pytest.raises(InterruptedJobError):
        run_job(job, watcher=Impatient("running"))
    (segment,) = output.glob("_spanfill/journal/*/*.arrow")
    segment.write_bytes(segment.read_bytes()[:-1] + b"\0")
    onlooker = Onlooker(output)
    manifest = run_job(job, watcher=onlooker)
    assert [line for line in onlooker.heard if f"journal segment {segment.name} is damaged" in line]
    assert (output / "_spanfill" / "damaged" / segment.name).exists()
    assert (manifest["rows"], manifest["tally"]["replayed"]) == (1_000, 0)


def test_an_output_inside_the_input_folder_is_refused(write_rows: WriteRows, tmp_path: Path, checkpoint: Path) -> None:
    write_rows("in/a.parquet", prefix=["a"])
    with pytest.raises(OutputError, match="lies in the input folder"):
        run_job(spec(tmp_path / "in", tmp_path / "in" / "out", checkpoint))
