"""Rows that crash, kill or hang the engine they are in: isolated, made error rows, and their neighbours finish."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.verify import verify
from serving.formats import load_format
from tests.runs import Listener, rows

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]
COUNT = 400
POISON = "xqxqxqxq"


@pytest.mark.parametrize(
    ("fault", "batch_rows", "code", "words", "poisonous"),
    [
        ("crash_on", 4, "engine_dead", "the simulated engine crashed", {150, 151, 399}),
        ("kill_on", 16, "engine_dead", "the replica's process died", {192}),
        ("hang_on", 1, "engine_hung", "the engine hangs: it made no step in", {300}),
    ],
)
def test_a_poisonous_row_becomes_an_error_row_and_its_neighbours_finish(
    fault: str, batch_rows: int, code: str, words: str, poisonous: set[int], tmp_path: Path
) -> None:
    tokens = load_format("codegen25").tokenizer.encode(POISON)
    prefixes = [f"row {i}\n{POISON if i in poisonous else 'good'}" for i in range(COUNT)]
    pq.write_table(pa.table({"id": range(COUNT), "prefix": prefixes}), tmp_path / "rows.parquet")
    values = {"input": str(tmp_path / "rows.parquet"), "output": str(tmp_path / "out"), "max_tokens": 16}
    values |= {"engine": "simulated", "engine_args": {fault: tokens, "time_scale": 20}, "batch_rows": batch_rows}
    watcher = Listener()
    manifest = run_job(JobSpec.parse(values | {"order": "input", "max_attempts": 1}), watcher=watcher)
    assert sum("looking for those at fault" in line for line in watcher.heard) == 1, watcher.heard
    assert (manifest["rows"], manifest["error_codes"]) == (COUNT - len(poisonous), {code: len(poisonous)})
    assert [row["id"] for row in rows(tmp_path / "out")] == [i for i in range(COUNT) if i not in poisonous]
    errors = rows(tmp_path / "out", "errors")
    assert {row["id"] for row in errors} == poisonous
    assert all(words in row["error_message"] for row in errors), errors
    assert all(row["attempts"] == 2 if batch_rows == 1 else row["attempts"] >= 3 for row in errors)
    assert verify(str(tmp_path / "out")).problems == []


def test_error_rows_are_done_again_when_the_cause_is_mended(tmp_path: Path) -> None:
    tokens = load_format("codegen25").tokenizer.encode(POISON)
    prefixes = [f"row {i}\n{POISON if i % 50 == 0 else 'good'}" for i in range(100)]
    prefixes[7] = None  # type: ignore[call-overload]
    pq.write_table(pa.table({"id": range(100), "prefix": prefixes}), tmp_path / "rows.parquet")
    values = {"input": str(tmp_path / "rows.parquet"), "output": str(tmp_path / "out"), "max_tokens": 16}
    values |= {"engine": "simulated", "batch_rows": 1, "max_attempts": 1, "max_error_rate": 1.0, "rows_per_part": 50}
    first = run_job(JobSpec.parse(values | {"engine_args": {"crash_on": tokens, "time_scale": 20}}))
    assert (first["rows"], first["errors"]) == (97, 3)
    parts = {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    again = run_job(JobSpec.parse(values | {"engine_args": {"time_scale": 20}, "retry_errors": True}))
    assert (again["rows"], again["errors"], again["error_codes"]) == (99, 1, {"bad_input": 1})
    assert all(path.read_bytes() == content for path, content in parts.items())
    assert sorted(row["id"] for row in rows(tmp_path / "out")) == [i for i in range(100) if i != 7]
    assert [row["id"] for row in rows(tmp_path / "out", "errors")] == [7]
    assert verify(str(tmp_path / "out")).problems == []
    assert run_job(JobSpec.parse(values | {"engine_args": {"time_scale": 20}}))["parts"] == again["parts"]
