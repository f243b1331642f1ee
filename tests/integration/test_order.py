"""Which rows meet in an engine's prefix cache, and that it changes nothing but the speed."""

import random
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.verify import verify
from tests.runs import rows, running

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]
FILES, SPANS = 12, 20


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spans of a dozen files, shuffled over two Parquet files; one row is bad and some repeat."""
    draw = random.Random(7)
    texts = ["".join(f"def f{n}_{i}(x):\n    return x + {n * i}\n\n" for i in range(40)) for n in range(FILES)]
    cuts = [(text, draw.randrange(200, len(text) - 100)) for text in texts for _ in range(SPANS)]
    pairs: list[tuple[str | None, str]] = [(text[:at], text[at + 9 :]) for text, at in cuts]
    pairs[17] = (None, "x")
    pairs += pairs[:5]
    draw.shuffle(pairs)
    folder = tmp_path_factory.mktemp("shuffled")
    for name, part in (("a", pairs[:100]), ("b", pairs[100:])):
        table = pa.table({"prefix": [p for p, _ in part], "suffix": pa.array([s for _, s in part]).dictionary_encode()})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def run(source: Path, output: Path, **more: Any) -> tuple[dict[str, Any], dict[tuple[str, int], tuple[Any, ...]]]:
    values = {"input": str(source), "output": str(output), "engine": "simulated", "max_tokens": 24, "rows_per_part": 60}
    values |= {"engine_args": {"time_scale": 200}, "extra_columns": ["source_file", "source_row"]}
    manifest = run_job(JobSpec.parse(values | {"replicas": 2, "batch_rows": 8} | more))
    found = rows(output)
    return manifest, {(r["source_file"], r["source_row"]): (r["prefix"], r["suffix"], r["infill"]) for r in found}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "n": 1, "seed": 3}], ids=["greedy", "sampled"])
def test_gathering_all_rows_shares_more_and_changes_no_infill(
    sampling: dict[str, Any], shuffled: Path, tmp_path: Path
) -> None:
    near, infills = run(shuffled, tmp_path / "near", **sampling)
    far, gathered = run(shuffled, tmp_path / "far", order="global", **sampling)
    assert gathered == infills
    assert len(infills) == FILES * SPANS + 4
    assert far["errors"] == near["errors"] == 1
    assert far["ideal_hit_share"] > 1.3 * near["ideal_hit_share"]
    errors = [[(e["source_file"], e["source_row"]) for e in rows(tmp_path / d, "errors")] for d in ("near", "far")]
    assert errors[0] == errors[1]
    assert verify(str(tmp_path / "far")).problems == []
    assert run(shuffled, tmp_path / "far", order="global", **sampling)[0] == far
    again = run(shuffled, tmp_path / "far", order="global", retry_errors=True, **sampling)[0]
    assert (again["rows"], again["errors"]) == (far["rows"], 1)


def test_rows_with_the_same_prompt_are_generated_once(shuffled: Path, tmp_path: Path) -> None:
    manifest, infills = run(shuffled, tmp_path / "out", rows_per_part=1_000, order="global")
    assert manifest["tally"]["twins"] >= 5
    assert manifest["rows"] == len(infills) == FILES * SPANS + 4
    sampled, _ = run(shuffled, tmp_path / "sampled", rows_per_part=1_000, order="global", temperature=0.7)
    assert sampled["tally"]["twins"] == 0, "rows without ids have seeds of their own"


def test_a_replica_meets_a_files_rows_again(shuffled: Path, tmp_path: Path) -> None:
    manifest, _ = run(shuffled, tmp_path / "out", rows_per_part=1_000, order="global")
    assert len(manifest["replicas"]) == 2
    assert manifest["cached_tokens"] >= 0.95 * manifest["tally"]["ideal_tokens"]


def test_a_job_begun_anew_gathers_its_new_input(tmp_path: Path) -> None:
    for text in ("old", "new"):
        pq.write_table(pa.table({"prefix": [f"{text} b", f"{text} a"], "suffix": ["", ""]}), tmp_path / "rows.parquet")
        _, infills = run(tmp_path / "rows.parquet", tmp_path / "out", order="global", overwrite=True)
        assert sorted(prefix for prefix, _, _ in infills.values()) == [f"{text} a", f"{text} b"]


def test_a_job_stops_while_it_gathers_and_gathers_anew_after_a_kill(tmp_path: Path) -> None:
    source, output, draw = tmp_path / "rows.parquet", tmp_path / "out", random.Random(0)
    prefixes = [draw.randbytes(10_000).hex() for _ in range(15_000)]
    pq.write_table(pa.table({"prefix": prefixes, "suffix": [""] * len(prefixes)}), source, row_group_size=500)
    state = output / "_spanfill"
    command = ("--input", source, "--output", output, "--order", "global", "--engine", "instant")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with running(tmp_path / "log", *command) as job:
            job.until(lambda: any((state / ".sort.tmp").glob("*/*")))
            job.process.send_signal(number)
            assert job.wait(10) == code
        assert not (state / "gathered.parquet").exists()
        assert (state / ".sort.tmp").exists() == (number == signal.SIGKILL)
    with running(tmp_path / "log", *command) as job:
        job.until((state / "gathered.parquet").exists)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == 143
    assert not (state / ".sort.tmp").exists()
    assert pq.read_table(state / "gathered.parquet").column("prefix").to_pylist() == sorted(prefixes)


def test_an_input_that_changed_after_its_rows_were_gathered_is_noticed(tmp_path: Path) -> None:
    source, output = tmp_path / "rows.parquet", tmp_path / "out"
    table = pa.table({"prefix": [f"row {i}" for i in range(20)], "suffix": [""] * 20})
    pq.write_table(table, source)
    run(source, output, order="global")
    assert verify(str(output)).problems == []
    pq.write_table(table.slice(0, 10), source)
    assert verify(str(output)).problems == ["rows.parquet is not what it was when its rows were gathered"]
    source.unlink()
    (problem,) = verify(str(output)).problems
    assert problem.startswith("the input cannot be compared: ")
