"""A plan: what a sample tells of an input, what the lines say, and what a user is told when something is wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.calibration import Calibration, Observed, calibrate, observe
from jobs.estimate import Wish, plan_job
from jobs.plan import Unit
from jobs.sample import stretches
from jobs.sharing import ideal_cached_share
from jobs.spec import JobSpec
from serving.errors import ConfigError
from serving.gpus import GPUS
from serving.models import CODEGEN25_7B
from tests.conftest import Command, WriteRows
from tests.jobs.conftest import JobFolder

USAGE = 2
KEYS = {
    *("model", "parameters", "rows", "sampled_rows", "stretches", "prompt_tokens_mean", "prompt_tokens_p50"),
    *("prompt_tokens_p90", "prompt_tokens_p99", "prompt_tokens_max", "truncated_share", "error_share", "twin_share"),
    *("n", "block_size", "cached_share", "cached_share_cpu", "cached_share_all", "cached_share_all_cpu", "order"),
    *("output_tokens", "output_tokens_from", "stop_share", "fraction", "replicas", "tensor_parallel_size", "gpus"),
    *("shared_share", "calibration", "calibrated"),
}
LINE_KEYS = {
    *("gpu", "precision", "fits", "why", "batch", "bound_rows_per_second", "steady_rows_per_second"),
    *("predicted_rows_per_second", "hours", "gpu_hours", "cost"),
}


@pytest.fixture
def rows(write_rows: WriteRows) -> Path:
    """Forty rows of two files: neighbours share a beginning."""
    return write_rows(
        prefix=[f"{'alpha beta gamma ' * 20}{i // 20} {'delta ' * 30}{i}" for i in range(40)], suffix=["\nend"] * 40
    )


@pytest.fixture
def plan(spanfill: Command, rows: Path) -> Callable[..., Any]:
    """``spanfill plan`` of the forty rows."""
    return lambda *options: spanfill("plan", "--input", rows, *options)


def test_the_json_has_its_keys(plan: Callable[..., Any]) -> None:
    done = plan("--json", "--model", "codegen25-7b-multi", "--price", "2", "--price", "h200=3", "--replicas", 4)
    told = json.loads(done.stdout)
    assert (done.code, set(told)) == (0, KEYS)
    assert {(line["gpu"], line["precision"]) for line in told["gpus"]} == {
        (g, p) for g in GPUS for p in ("bf16", "fp8")
    }
    for line in told["gpus"]:
        assert set(line) == LINE_KEYS
        assert line["fits"]
        assert line["steady_rows_per_second"] <= line["bound_rows_per_second"]
        assert line["predicted_rows_per_second"] == pytest.approx(0.6 * line["bound_rows_per_second"])
        assert line["hours"] == pytest.approx(40 / (4 * line["predicted_rows_per_second"]) / 3600)
        assert line["gpu_hours"] == pytest.approx(4 * line["hours"])
        assert line["cost"] == pytest.approx(line["gpu_hours"] * (3 if line["gpu"] == "H200" else 2))
    assert (told["rows"], told["sampled_rows"], told["error_share"], told["calibrated"]) == (40, 40, 0, None)
    assert told["cached_share_all"] == told["cached_share"] > 0.5 > told["truncated_share"]


def test_a_prediction_is_of_the_bound_and_never_beyond_the_steady_rate(plan: Callable[..., Any]) -> None:
    options = ("--json", "--model", "codegen25-7b-multi", "--precision", "bf16", "--max-num-seqs", 8)
    (line, *_) = json.loads(plan(*options, "--fraction", 0.05).stdout)["gpus"]
    assert line["predicted_rows_per_second"] == pytest.approx(0.05 * line["bound_rows_per_second"])
    (line, *_) = json.loads(plan(*options, "--fraction", 1).stdout)["gpus"]
    assert line["predicted_rows_per_second"] == line["steady_rows_per_second"] < 0.9 * line["bound_rows_per_second"]


@pytest.mark.parametrize(("options", "count"), [([], 20), (["--order", "global"], 10)])
def test_equal_prompts_are_planned_once_where_a_job_generates_them_once(
    spanfill: Command, write_rows: WriteRows, options: list[str], count: int
) -> None:
    rows = write_rows(prefix=[f"{'alpha beta gamma ' * 80}{i % 10}" for i in range(40)])
    told = [
        json.loads(spanfill("plan", "--input", path, "--rows-per-part", 20, *options, "--json").stdout)
        for path in (rows, write_rows("once.parquet", prefix=[f"{'alpha beta gamma ' * 80}{i}" for i in range(40)]))
    ]
    assert [each["twin_share"] for each in told] == [1 - count / 40, 0]
    (line, *_), (other, *_) = (each["gpus"] for each in told)
    rates = [each["predicted_rows_per_second"] for each in (line, other)]
    assert line["hours"] * rates[0] == pytest.approx(other["hours"] * rates[1] * count / 40)


def test_equal_prompts_are_planned_each_where_a_job_samples(spanfill: Command, write_rows: WriteRows) -> None:
    rows = write_rows(prefix=[f"{'alpha beta gamma ' * 80}{i % 10}" for i in range(40)])
    assert json.loads(spanfill("plan", "--input", rows, "--temperature", 0.8, "--json").stdout)["twin_share"] == 0


def test_the_samples_of_a_row_share_its_prompt_and_are_decoded_each(plan: Callable[..., Any]) -> None:
    options = ("--json", "--model", "codegen25-7b-multi", "--temperature", 0.8, "--gpu", "H100", "--precision", "bf16")
    one, four = (json.loads(plan(*options, "--n", n).stdout) for n in (1, 4))
    length = one["prompt_tokens_mean"]
    assert four["prompt_tokens_mean"] == length
    computed = (1 - one["cached_share"]) * length
    again = (4 * (1 - four["cached_share"]) * length - computed) / 3
    assert 1 <= again <= 16  # What is left of each prompt behind its whole blocks of 16.
    (line,), (slower,) = one["gpus"], four["gpus"]
    for name in ("bound_rows_per_second", "steady_rows_per_second", "predicted_rows_per_second"):
        assert line[name] / 4 < slower[name] < line[name]
    assert slower["hours"] == pytest.approx(40 / slower["predicted_rows_per_second"] / 3600)
    assert "completions: 4 a row" in plan(*options[1:], "--n", 4).stdout


def test_the_samples_of_a_row_hold_its_prompt_once(plan: Callable[..., Any]) -> None:
    options = ("--json", "--model", "codegen25-7b-multi", "--temperature", 0.8, "--output-tokens", 8)
    gpu = ("--gpu", "L40S", "--precision", "bf16", "--max-num-seqs", 10_000)
    one, four, many = (json.loads(plan(*options, *gpu, "--n", n).stdout) for n in (1, 4, 16))
    assert one["shared_share"] == many["shared_share"] > 0.9
    batches = [told["gpus"][0]["batch"] for told in (one, four, many)]
    assert 2 < batches[1] / batches[0] < 2.5
    assert 4 < batches[2] / batches[0] < 8.5


def test_samples_without_a_temperature_are_refused(plan: Callable[..., Any]) -> None:
    refused = plan("--n", 4)
    assert (refused.code, refused.stdout) == (USAGE, "")
    assert "set temperature" in refused.stderr


def test_gathered_rows_share_what_the_whole_sample_shares(write_rows: WriteRows) -> None:
    rows = write_rows(prefix=[f"{'alpha beta gamma ' * 80}{i}" for i in range(40)])
    spec = JobSpec(input=str(rows), output=".", rows_per_part=4)
    near, far = (plan_job(spec.model_copy(update={"order": order}), Wish()) for order in ("prefix", "global"))
    assert near.load.cached_share == near.sample.cached_share < near.sample.cached_share_all
    assert far.load.cached_share == far.sample.cached_share_all == near.sample.cached_share_all
    assert far.sample.cached_share_all_cpu > far.sample.cached_share_cpu
    assert far.as_dict()["order"] == "global"


def test_a_sample_tells_gathered_rows_least_share(plan: Callable[..., Any]) -> None:
    assert "is a lower bound" in " ".join(plan("--order", "global", "--sample", 10).stdout.split())
    assert "is a lower bound" not in plan("--order", "input", "--sample", 10).stdout


@pytest.mark.parametrize(
    ("output", "told", "stops"), [(None, 128, 0), (24, 24, 1), (127.75, 127.75, 0.25), (128, 128, 0)]
)
def test_a_row_that_ends_before_max_tokens_has_a_stop_token(
    rows: Path, output: float | None, told: float, stops: float
) -> None:
    load = plan_job(JobSpec(input=str(rows), output="."), Wish(output_tokens=output)).load
    assert (load.output_tokens, load.stop_share, load.steps) == (told, stops, told + stops)


def test_the_table_names_every_gpu_and_what_it_rests_on(plan: Callable[..., Any]) -> None:
    told = plan("--sample", 10, "--gpu", "H100", "--gpu", "L40S", "--precision", "bf16")
    assert told.code == 0
    for words in ("H100", "L40S", "10 of them sampled", "Williams", "under-estimates sharing", "the worst case"):
        assert words in told.stdout, told.stdout
    assert "H200" not in told.stdout
    assert "fp8" not in told.stdout


def test_rows_in_the_inputs_order_are_told_an_upper_bound(plan: Callable[..., Any]) -> None:
    assert "an upper bound" in " ".join(plan("--order", "input").stdout.split())
    assert "an upper bound" not in " ".join(plan().stdout.split())


def test_a_model_that_does_not_fit_is_a_line_that_says_why(rows: Path) -> None:
    spec = JobSpec(input=str(rows), output=".", model="codegen25-7b-multi", max_model_len=100_000)
    lines = plan_job(spec, Wish()).lines
    (small,) = [line for line in lines if not line.fits]
    assert (small.gpu, small.precision, small.hours) == ("L40S", "bf16", None)
    assert "a context is 100,000" in small.why


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "H10"], "GPU H10 is unknown. Did you mean H100? Known: H100, H200, A100, L40S"),
        (["--precision", "int4"], "precision int4 is unknown. Known: bf16, fp8"),
        (["--price", "cheap"], "--price cheap is no price. Write dollars a GPU-hour"),
        (["--price", "H100=-1"], "--price -1 is no price"),
        (["--price", "nan"], "--price nan is no price"),
        (["--price", "TPU=2"], "GPU TPU is unknown"),
        (["--gpu", "H100", "--price", "H200=3"], "--price H200 is of a GPU that is not shown. Add --gpu H200."),
        (["--price", "1", "--price", "2"], "--price is given twice"),
        (["--fraction", "0"], "--fraction 0 is no share"),
        (["--fraction", "nan"], "--fraction nan is no share"),
        (["--output-tokens", "500"], "--output-tokens 500 is not from 1 to --max-tokens 128"),
        (["--output-tokens", "5", "--like", "x"], "exclude each other"),
        (["--like", "nowhere"], "nowhere is no finished job"),
        (["--calibrate", "nowhere"], "nowhere is no job's folder"),
        (["--replicas", "0"], "replicas = 0"),
        (["--order", "random"], "order"),
        (["--tensor-parallel-size", "5"], "--tensor-parallel-size 5 does not divide the model's"),
        (["--model", "nonsense"], "nonsense is no known model"),
        (["--column", "prefix=text"], "column text is missing"),
        (["--max-tokens", "5000"], "max_tokens = 5000 leaves no room"),
    ],
)
def test_a_wrong_option_is_named(plan: Callable[..., Any], options: list[str], words: str) -> None:
    done = plan(*options)
    assert (done.code, words in done.stderr) == (USAGE, True), done.stderr


def test_a_missing_or_empty_input_is_named(spanfill: Command, write_rows: WriteRows, tmp_path: Path) -> None:
    done = spanfill("plan", "--input", tmp_path / "none.parquet")
    assert (done.code, "none.parquet does not exist" in done.stderr) == (USAGE, True)
    done = spanfill("plan", "--input", write_rows(prefix=["", ""][:0] or [None]))
    assert done.code == USAGE, done.stderr


def test_error_rows_reach_no_engine(spanfill: Command, write_rows: WriteRows) -> None:
    source = write_rows(prefix=["a", None, "b", "c"])
    told = json.loads(spanfill("plan", "--json", "--input", source, "--gpu", "H100", "--precision", "bf16").stdout)
    line = told["gpus"][0]
    assert (told["rows"], told["error_share"]) == (4, 0.25)
    assert line["hours"] == pytest.approx(3 / line["predicted_rows_per_second"] / 3600)


def test_stretches_are_spread_evenly_and_cut_at_units() -> None:
    units = [Unit(i, i // 4, (i % 4) * 100, (i % 4) * 100 + 100) for i in range(40)]
    taken = stretches(units, sample=1_000)
    assert sum(unit.rows for unit in taken) == 1_000
    assert {unit.file for unit in taken} >= {0, 3, 6, 8}
    for piece in taken:
        unit = units[piece.index]
        assert (unit.file, unit.start <= piece.start < piece.stop <= unit.stop) == (piece.file, True)
    assert stretches(units, sample=4_000) == units
    assert sum(unit.rows for unit in stretches(units, sample=7)) == 7


def test_the_ideal_share_counts_whole_blocks_and_never_the_last_token() -> None:
    prompt = list(range(64))
    assert ideal_cached_share([prompt, prompt], 16) == 48 / 128
    assert ideal_cached_share([prompt, [*prompt, 1]], 16) == 64 / 129
    assert ideal_cached_share([prompt, [*prompt[:31], 0, *prompt[32:]]], 16) == 16 / 128
    assert ideal_cached_share([prompt, prompt], 128) == ideal_cached_share([], 16) == ideal_cached_share([[]], 16) == 0


def observed(name: str, computed: float, output: float, seconds: float, **manifest: Any) -> Observed:
    told = {"model": "m", "engine": "vllm", "versions": {"torch": "2.13.0+cpu"}} | manifest
    return Observed(name, computed, computed, output, seconds, 1, told, {})


def test_two_jobs_tell_both_costs_and_more_are_averaged() -> None:
    shapes = [(900, 8), (100, 96), (500, 32)]
    jobs = [observed(str(c), c, o, 2e-4 * c + 3e-3 * o) for c, o in shapes]
    for chosen in (jobs[:2], jobs):
        fitted = calibrate(chosen, CODEGEN25_7B)
        assert fitted.prompt_seconds == pytest.approx(2e-4)
        assert fitted.output_seconds == pytest.approx(3e-3)
        assert (fitted.ratio_assumed, fitted.on_cpu) == (False, True)
    assert fitted.rows_per_second(computed_tokens=500, output_tokens=0, replicas=2) == pytest.approx(20)


def test_a_cost_is_never_negative() -> None:
    fitted = calibrate([observed("a", 100, 10, 1.0), observed("b", 900, 10, 0.9)], CODEGEN25_7B)
    assert fitted.prompt_seconds == 0
    assert fitted.output_seconds == pytest.approx(0.095, rel=0.01)


def test_one_job_tells_the_scale_and_foretells_itself() -> None:
    for jobs in ([observed("a", 400, 32, 0.25)], [observed("a", 400, 32, 0.25), observed("b", 400, 32, 0.25)]):
        fitted = calibrate(jobs, CODEGEN25_7B)
        assert fitted.ratio_assumed
        assert fitted.output_seconds > fitted.prompt_seconds > 0
        assert fitted.rows_per_second(computed_tokens=400, output_tokens=32) == pytest.approx(4)


def test_jobs_of_two_models_do_not_calibrate_together() -> None:
    with pytest.raises(ConfigError, match="b and a differ in their model"):
        calibrate([observed("a", 1, 1, 1), observed("b", 1, 1, 1, model="n")], CODEGEN25_7B)


def test_a_finished_job_gives_its_output_tokens_and_its_machine(
    clean: JobFolder, spanfill: Command, checkpoint: Path
) -> None:
    options = ("plan", "--json", "--input", clean.input, "--model", checkpoint)
    done = spanfill(*options, "--like", clean.output)
    assert (done.code, "has no infills of a model" in done.stderr) == (USAGE, True), done.stderr
    clean.edit(clean.state("manifest.json"), lambda values: values.update(engine="simulated"))
    told = json.loads(spanfill(*options, "--like", clean.output).stdout)
    manifest = json.loads(clean.state("manifest.json").read_text())
    reasons, share = manifest["finish_reasons"], told["stop_share"]
    assert share == pytest.approx((reasons.get("eom", 0) + reasons.get("eos", 0)) / manifest["rows"])
    assert 0 < share < 1
    assert told["output_tokens"] == pytest.approx(manifest["completion_tokens"] / manifest["rows"])
    assert told["output_tokens_from"] == str(clean.output)
    clean.edit(clean.state("manifest.json"), lambda values: values.update(engine="instant"))
    done = spanfill(*options, "--calibrate", clean.output)
    assert (done.code, "tells no speed of an engine" in done.stderr) == (USAGE, True), done.stderr
    settings = {"max_num_seqs": 256, "max_num_batched_tokens": 8_192, "block_size": 16}
    assert manifest["engines"] == {"replicas": 1, "settings": settings}

    clean.edit(clean.state("manifest.json"), lambda values: values.update(engine="vllm", rows_per_second=50.0))
    done = spanfill("plan", "--input", clean.input, "--calibrate", clean.output)
    assert (done.code, f"not {'demo-codegen25'}" in done.stderr) == (USAGE, True), done.stderr
    told = json.loads(spanfill(*options, "--like", clean.output, "--calibrate", clean.output).stdout)
    assert told["calibrated"]["gpu"] == str(clean.output)
    generated = 1 - manifest["tally"]["twins"] / manifest["tally"]["rows"]
    assert generated < 1
    assert told["calibrated"]["predicted_rows_per_second"] == pytest.approx(50 * generated, rel=0.1)
    assert isinstance(Calibration(**told["calibration"]), Calibration)
    job = observe(str(clean.output))
    assert job.output_tokens == pytest.approx(told["output_tokens"] + told["stop_share"])

    clean.edit(clean.state("manifest.json"), lambda values: values.update(replicas={"before": 20, "after": 20}))
    assert observe(str(clean.output)) == replace(job, manifest=json.loads(clean.state("manifest.json").read_text()))
    clean.edit(clean.state("manifest.json"), lambda values: values["engines"].update(replicas=2))
    assert observe(str(clean.output)).seconds == pytest.approx(2 * job.seconds)
    clean.interrupt(0)
    done = spanfill(*options, "--calibrate", clean.output)
    assert (done.code, "is a job that is not finished" in done.stderr) == (USAGE, True), done.stderr
