"""Settings tried on a sample: which make sense, on which rows, and on the simulated engine over the path of ``run``."""

import io
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from jobs.job import prepare_job
from jobs.search import Figures, Knob, Settings, Trial, search
from jobs.spec import JobSpec
from jobs.tune import check_output, objection, report, sample_rows, table, tune
from serving import fleet
from serving.errors import InputError, InterruptedJobError, OutputError, ResourceError, TerminatedJobError
from tests.conftest import WriteRows

WHOLE = {"enable_chunked_prefill": False, "max_num_batched_tokens": 1_024}


@pytest.mark.parametrize(
    ("name", "asked", "in_force", "why"),
    [
        ("block_size", {"block_size": 16}, {}, ""),
        ("max_num_batched_tokens", {"max_num_batched_tokens": 1_024}, WHOLE, "prompt of up to 2,048"),
        ("max_num_batched_tokens", {"max_num_batched_tokens": 2_048}, WHOLE, ""),
        ("max_num_batched_tokens", {"max_num_batched_tokens": 1_024}, {"enable_chunked_prefill": True}, ""),
        ("enable_chunked_prefill", WHOLE, {"enable_chunked_prefill": True}, "prompt of up to 2,048"),
        ("enable_chunked_prefill", {"enable_chunked_prefill": False}, {"max_num_batched_tokens": 1_024}, ""),
        ("max_num_seqs", {"max_num_seqs": 128}, {}, ""),
        ("max_num_seqs", {"max_num_seqs": 129}, {}, "258 would (--rows)"),
        ("block_size", {"max_num_seqs": 1_024, "block_size": 16}, {}, ""),
    ],
)
def test_a_prompt_must_fit_a_step_and_the_sample_the_batch(
    name: str, asked: Settings, in_force: Settings, why: str
) -> None:
    """A batch that is asked for whatever the sample is objects to nothing else, nor does a budget of vLLM's own."""
    said = objection(name, asked, in_force, rows=256, max_model_len=2_048, gpu=True)
    assert why in said
    assert bool(why) == bool(said)


@pytest.mark.parametrize(
    ("replicas", "samples", "why"), [(1, 8, ""), (8, 8, "512 would"), (8, 1, "4,096 would"), (3, 4, "")]
)
def test_engines_share_the_sample_and_samples_of_a_row_fill_their_batches(
    replicas: int, samples: int, why: str
) -> None:
    needs = partial(objection, rows=384, max_model_len=2_048, gpu=True, replicas=replicas, samples=samples)
    said = needs("max_num_seqs", {"max_num_seqs": 256}, {})
    assert why in said
    assert bool(why) == bool(said)


@pytest.mark.parametrize("name", ["async_scheduling", "enable_chunked_prefill"])
def test_what_a_cpu_build_cannot_do_is_not_tried_there(name: str) -> None:
    said = [objection(name, {name: True}, {}, rows=256, max_model_len=2_048, gpu=gpu) for gpu in (True, False)]
    assert said[0] == ""
    assert said[1].startswith("vLLM's CPU build")


def test_the_sample_is_runs_of_neighbours_from_the_whole_input(write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows("in/a.parquet", id=range(50), prefix=["a"] * 50, other=[1.0] * 50)
    write_rows("in/b.parquet", id=range(50, 53), prefix=["b"] * 3, other=[1.0] * 3)
    write_rows("in/c.parquet", id=range(53, 100), prefix=["c"] * 47, other=[1.0] * 47)
    job = prepare_job(JobSpec(input=str(tmp_path / "in"), output="out", engine="instant"))
    sample = sample_rows(job, 20)
    assert sample.column_names == ["id", "prefix"]
    ids = sample["id"].to_pylist()
    assert ids == [0, 1, 12, 13, 14, 25, 26, 37, 38, 39, 50, 51, 62, 63, 64, 75, 76, 87, 88, 89]
    assert sample_rows(job, 1_000)["id"].to_pylist() == list(range(100))


@pytest.mark.parametrize(
    ("gpu", "engine", "rows"), [(True, "vllm", 2_048), (True, "instant", 256), (False, "vllm", 256)]
)
def test_the_sample_fills_the_batches_of_its_machine(
    write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, gpu: bool, engine: str, rows: int
) -> None:
    def stopped(job: object, asked: int) -> pa.Table:
        raise InputError(f"{asked} rows were asked for")

    monkeypatch.setattr("jobs.tune.is_gpu_build", lambda: gpu)
    monkeypatch.setattr("jobs.tune.sample_rows", stopped)
    spec = JobSpec.parse({"input": str(write_rows(prefix=["a"])), "output": "out", "engine": engine})
    with pytest.raises(InputError, match=f"^{rows} rows were"):
        tune(spec, minutes=1)


def test_a_trial_has_engines_of_its_own_or_none(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fleet that runs already would do is not what its settings would."""
    asked: list[object] = []

    def refuse(*_: object, alone: bool = False, **__: object) -> None:
        asked.append(alone)
        raise ResourceError("no GPU is free", remedy="Stop the fleet.")

    monkeypatch.setattr(fleet, "connected", lambda: nullcontext(False))
    monkeypatch.setattr(fleet, "start_serve", lambda **_: None)
    monkeypatch.setattr(fleet, "join_or_start", refuse)
    monkeypatch.setattr("jobs.runner.Crew", lambda *_: SimpleNamespace(fill=lambda: None, close=lambda: None))
    monkeypatch.setattr("jobs.runner.check_cluster", lambda *_: None)
    spec = JobSpec.parse({"input": str(write_rows(prefix=["a", "b"])), "output": "out", "engine": "instant"})
    with pytest.raises(ResourceError, match="no GPU is free"):
        tune(spec, minutes=1)
    assert asked == [True]


@pytest.mark.parametrize("error", [InterruptedJobError, TerminatedJobError])
def test_an_interrupted_search_does_not_say_that_it_resumes(
    write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, error: type[InterruptedJobError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("jobs.tune.run_job", refuse)
    spec = JobSpec.parse({"input": str(write_rows(prefix=["a", "b"])), "output": "out", "engine": "instant"})
    with pytest.raises(error, match="begins anew"):
        tune(spec, minutes=1)


def test_an_empty_input_is_refused(write_rows: WriteRows) -> None:
    source = write_rows(prefix=pa.array([], pa.string()))
    job = prepare_job(JobSpec(input=str(source), output="out", engine="instant"))
    with pytest.raises(InputError, match="no rows"):
        sample_rows(job, 10)


def test_the_report_is_a_job_file_with_the_figures_as_comments() -> None:
    found = search(lambda s: Figures(10 + s.get("a", 0), 0.25), (Knob("a", (2, 3)),), {}, late=lambda: False)
    text = report(found, source="rows.parquet")
    spec = JobSpec.parse(yaml.safe_load(text) | {"input": "in", "output": "out"})
    assert spec.engine_args == {"a": 3}
    assert "# 13.00 rows/s, 1.30 times the baseline's." in text
    assert "#   a=2: 12.00 rows/s, ratio 1.20, 25.0% of the prompt tokens cached" in text
    assert table(found).row_count == len(found.trials)


def test_the_report_says_what_was_not_tried() -> None:
    knobs = (Knob("a", (2, 3)),)
    unwanted = {3: "three is too many"}
    found = search(
        lambda s: Figures(10, 0.25), knobs, {}, late=lambda: False, objection=lambda _, s, __: unwanted.get(s["a"], "")
    )
    text = report(found, source="rows.parquet")
    assert "# Not tried:\n#   a=3: three is too many\n" in text
    assert table(found).row_count == len(found.trials) + 1
    assert found.as_dict()["left_out"] == {"a=3": "three is too many"}


def test_a_failure_is_shown_as_it_is() -> None:
    found = search(lambda s: Figures(10, 0.25), (), {}, late=lambda: False)
    found.trials.append(Trial("a=[1]", {"a": [1]}, failure="expected [/red] here"))
    told = io.StringIO()
    Console(file=told, width=120).print(table(found))
    assert "a=[1]" in told.getvalue()
    assert "expected [/red] here" in told.getvalue()


@pytest.mark.engine
@pytest.mark.usefixtures("cluster")
def test_more_sequences_win_on_a_simulated_engine(tmp_path: Path) -> None:
    """A roofline's fields stand for engine arguments; one value of the grid cannot be."""
    pq.write_table(pa.table({"prefix": [f"def f{i}():\n    " for i in range(64)]}), tmp_path / "rows.parquet")
    slow = {"max_num_seqs": 1, "step_overhead_seconds": 0.005}
    spec = JobSpec.parse(
        {"input": str(tmp_path / "rows.parquet"), "output": ".", "engine": "simulated", "engine_args": slow}
        | {"max_tokens": 8}
    )
    told: list[str] = []
    knobs = (Knob("max_num_seqs", (0, 16)),)
    found = tune(spec, rows=32, minutes=5, knobs=knobs, tell=lambda so_far: told.append(so_far.trials[-1].setting))
    assert found.best == slow | {"max_num_seqs": 16}
    assert found.rows_per_second > 2 * found.baseline
    assert told == ["warm-up", "baseline", "baseline", "max_num_seqs=0", "max_num_seqs=16", "max_num_seqs=16"]
    assert "max_num_seqs" in found.trials[3].failure


@pytest.mark.parametrize("name", ["/proc/engine.yaml", "{}/file/engine.yaml"])
def test_a_report_that_cannot_be_written_is_known_before_anything_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"engine\.yaml cannot be written"):
        check_output(Path(name.format(tmp_path)))
    with pytest.raises(OutputError, match=r"is a folder\. Name a file in it"):
        check_output(tmp_path)
    check_output(tmp_path / "new" / "engine.yaml")
    assert list((tmp_path / "new").iterdir()) == []
