"""What a user is told when something is wrong, before anything is started."""

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import summary
from jobs.options import merged, pairs_of, scalars_of
from jobs.spec import JobSpec
from serving.engine_args import check_engine_args
from tests.conftest import Command, WriteRows

USAGE = 2


@pytest.fixture
def run(spanfill: Command, tmp_path: Path, checkpoint: Path) -> Command:
    """``spanfill run`` on the small checkpoint with the instant engine, into a fresh folder."""

    def command(source: Path | str, *options: object) -> object:
        return spanfill(
            "run",
            "--input",
            source,
            "--output",
            tmp_path / "out",
            "--model",
            checkpoint,
            "--engine",
            "instant",
            *options,
        )

    return command  # type: ignore[return-value]


def test_speculation_passes_validation() -> None:
    drafts = "speculative_config={method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4}"
    check_engine_args(scalars_of(pairs_of([drafts], "--engine-arg")) or {})
    assert scalars_of(pairs_of([drafts], "--engine-arg")) == {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    }


def test_a_missing_input_is_named(run: Command, tmp_path: Path) -> None:
    done = run(tmp_path / "nothing.parquet")
    assert done.code == USAGE
    assert "nothing.parquet does not exist" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_named_with_the_option_that_helps(run: Command, write_rows: WriteRows) -> None:
    done = run(write_rows(before=["a"]))
    assert done.code == USAGE
    assert "column prefix is missing; the input has before" in done.stderr
    assert "--column prefix=NAME" in done.stderr


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prefix": [1, 2]}, "column prefix is int64, not string"),
        ({"prefix": ["a"], "suffix": [1.5]}, "column suffix is double, not string"),
        ({"prefix": ["a"], "id": [[1]]}, "column id is list"),
        ({"prefix": [b"a"]}, "column prefix is binary, not string"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(
    run: Command, write_rows: WriteRows, columns: dict[str, list[object]], words: str
) -> None:
    done = run(write_rows(**columns))
    assert (done.code, words in done.stderr) == (USAGE, True), done.stderr


def test_an_output_column_in_the_input_is_refused(run: Command, write_rows: WriteRows) -> None:
    done = run(write_rows(prefix=["a"], infill=["b"]))
    assert done.code == USAGE
    assert "already has a column infill" in done.stderr
    assert "--keep-columns" in done.stderr


def test_an_empty_file_and_a_damaged_footer_are_named(run: Command, write_rows: WriteRows, tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    empty.touch()
    done = run(empty)
    assert (done.code, "empty.parquet is empty" in done.stderr) == (USAGE, True)
    broken = write_rows(prefix=["a"] * 100)
    data = broken.read_bytes()
    broken.write_bytes(data[:-30] + b"\xff" * 22 + data[-8:])
    done = run(broken)
    assert (done.code, "rows.parquet is no readable Parquet file" in done.stderr) == (USAGE, True), done.stderr


def test_a_folder_without_parquet_says_so(run: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("?")
    done = run(tmp_path / "in")
    assert (done.code, "no Parquet file is there (1 other files were seen)" in done.stderr) == (USAGE, True)


def test_files_that_differ_in_a_column_are_named(run: Command, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows("in/a.parquet", prefix=["a"], x=[1])
    write_rows("in/b.parquet", prefix=["a"], x=["1"])
    done = run(tmp_path / "in")
    assert (done.code, "b.parquet: column x is string, not int64, unlike a.parquet" in done.stderr) == (USAGE, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-tokens", "-5"], "max_tokens = -5"),
        (["--max-tokens", "2048"], "max_tokens = 2048 leaves no room"),
        (["--temperature", "-1"], "temperature = -1"),
        (["--n", "3"], "n > 1 at temperature 0"),
        (["--top-p", "0"], "top_p = 0"),
        (["--replicas", "0"], "replicas = 0"),
        (["--suffix-share", "2"], "suffix_share = 2"),
        (["--trim", "everything"], "'everything' is none of"),
        (["--with", "colour"], "'colour' is none of"),
        (["--order", "random"], "order = 'random'"),
        (["--compression", "zip"], "'zip' is none of"),
        (["--column", "prefix"], "no equals sign"),
        (["--column", "middle=x"], "'middle' is none of"),
        (["--engine", "vllm", "--engine-arg", "max_num_seq=3"], "max_num_seq is unknown to vLLM"),
        (["--engine-arg", "max_num_seq=3"], "engine_args of the instant engine: max_num_seq = 3"),
        (["--engine", "vllm", "--engine-arg", "dtype=float16"], "--dtype"),
        (["--engine", "vllm", "--engine-arg", "max_num_seqs=abc"], "max_num_seqs = 'abc' is str, not int"),
        (["--engine-arg", "max_num_seqs=["], "--engine-arg max_num_seqs=[ is not YAML"),
        (["--engine-arg", "max_num_seqs=2024-13-45"], "max_num_seqs=2024-13-45 is not YAML"),
        (["--input", "ftp://127.0.0.1:1/x"], "ftp://127.0.0.1:1/x cannot be opened"),
        (["--format", "morse"], "format morse is unknown"),
        (["--keep-columns", "colour"], "column colour is missing"),
        (["--job", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_an_absurd_option_is_named(run: Command, write_rows: WriteRows, options: list[str], words: str) -> None:
    done = run(write_rows(prefix=["a"]), *options)
    assert (done.code, words in done.stderr) == (USAGE, True), done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_names_those_that_are_known(spanfill: Command, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = write_rows(prefix=["a"])
    done = spanfill("run", "--input", rows, "--output", tmp_path / "out", "--model", "codegen25-7b-mutli")
    assert (done.code, "codegen25-7b-multi" in done.stderr) == (USAGE, True)


def test_a_model_without_suffix_support_is_refused_only_with_a_suffix(run: Command, write_rows: WriteRows) -> None:
    done = run(write_rows(prefix=["a"], suffix=["b"]), "--format", "causal")
    assert done.code == USAGE
    assert "tokenizer" in done.stderr or "no suffix support" in done.stderr


def test_a_folder_of_somebody_else_is_left_alone(run: Command, write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    done = run(write_rows(prefix=["a"]), "--overwrite")
    assert (done.code, "thesis.txt" in done.stderr) == (USAGE, True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_output_that_cannot_be_written_is_named(spanfill: Command, write_rows: WriteRows, checkpoint: Path) -> None:
    rows = write_rows(prefix=["a"])
    done = spanfill("run", "--input", rows, "--output", "/proc/out", "--model", checkpoint, "--engine", "instant")
    assert (done.code, "/proc/out" in done.stderr) == (USAGE, True), done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_that_is_a_file_is_refused(spanfill: Command, write_rows: WriteRows, checkpoint: Path) -> None:
    rows = write_rows(prefix=["a"])
    before = rows.read_bytes()
    done = spanfill("run", "--input", rows, "--output", rows, "--model", checkpoint, "--engine", "instant")
    assert (done.code, "rows.parquet is a file" in done.stderr) == (USAGE, True), done.stderr
    assert rows.read_bytes() == before


def test_an_unknown_key_in_a_job_file_is_named(run: Command, write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("max_token: 3\n")
    done = run(write_rows(prefix=["a"]), "--job", tmp_path / "job.yaml")
    assert (done.code, "max_token = 3" in done.stderr) == (USAGE, True)


def test_of_several_job_files_the_later_wins_and_flags_over_all_key_by_key(tmp_path: Path) -> None:
    first, tuned = tmp_path / "job.yaml", tmp_path / "engine.yaml"
    first.write_text("max_tokens: 3\nengine_args: {seed: 1, max_num_seqs: 8, block_size: 16}\n")
    tuned.write_text("engine_args: {max_num_seqs: 64, block_size: 32}\n")
    found = merged([first, tuned], {"max_tokens": 5, "engine_args": {"block_size": 128}})
    assert found == {"max_tokens": 5, "engine_args": {"seed": 1, "max_num_seqs": 64, "block_size": 128}}
    assert merged([], {"limit": 1}) == {"limit": 1}


def test_explain_shows_the_exact_prompt(spanfill: Command, write_rows: WriteRows, checkpoint: Path) -> None:
    rows = write_rows(prefix=["x = <sep>", "def f():\n    "], suffix=["y", "\n    return 1"])
    done = spanfill("explain", "--input", rows, "--row", 1, "--model", checkpoint, "--json")
    told = json.loads(done.stdout)
    assert told["prompt"] == "def f():\n    <mask_1>\n    return 1<|endoftext|><sep><mask_1>"
    assert told["stop_tokens"]["<eom>"] == 50_318
    assert told["truncated"] is False
    first = json.loads(spanfill("explain", "--input", rows, "--model", checkpoint, "--json").stdout)
    assert [text for text, control in first["pieces"] if not control] == ["x = <sep>", "y"]
    beyond = spanfill("explain", "--input", rows, "--row", 2, "--model", checkpoint)
    assert (beyond.code, "has 2 rows, no row 2" in beyond.stderr) == (USAGE, True)


def test_an_empty_role_leaves_the_column_out(spanfill: Command, write_rows: WriteRows, checkpoint: Path) -> None:
    rows = write_rows(prefix=["x = "], suffix=["y"])
    done = spanfill("explain", "--input", rows, "--model", checkpoint, "--column", "suffix=", "--json")
    assert json.loads(done.stdout)["prompt"] == "x = "


@pytest.mark.parametrize("command", ["explain", "infill"])
def test_an_unknown_format_is_named_by_every_command(
    spanfill: Command, write_rows: WriteRows, tmp_path: Path, checkpoint: Path, command: str
) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    where = ["--input", write_rows(prefix=["a"])] if command == "explain" else [f"{tmp_path / 'a.py'}:1:2"]
    done = spanfill(command, *where, "--model", checkpoint, "--format", "morse")
    assert (done.code, "format morse is unknown" in done.stderr) == (USAGE, True), done.stderr


def test_explain_names_a_null_prefix(spanfill: Command, tmp_path: Path, checkpoint: Path) -> None:
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prefix": pa.array([None], pa.string())}), rows)
    done = spanfill("explain", "--input", rows, "--model", checkpoint)
    assert (done.code, "rows.parquet, row 0: column prefix is null" in done.stderr) == (USAGE, True)


def test_models_tells_licences(spanfill: Command) -> None:
    done = spanfill("models", "--json")
    told = json.loads(done.stdout)
    assert told["codegen25-7b-multi"]["licence"] == "Apache-2.0"
    assert "research" in told["codegen25-7b-instruct"]["notice"]
    assert "27.6 GB" in told["codegen25-7b-multi"]["disk"]


def test_show_needs_a_jobs_folder(spanfill: Command, tmp_path: Path) -> None:
    done = spanfill("show", tmp_path)
    assert (done.code, "no job's folder" in done.stderr) == (USAGE, True)


def test_pairs_writes_and_reports(spanfill: Command, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    done = spanfill("pairs", tmp_path / "a.py", "--output", tmp_path / "p.parquet", "--mode", "line", "--json")
    assert done.code == 0
    assert json.loads(done.stdout)["pairs"] == pq.read_metadata(tmp_path / "p.parquet").num_rows == 2


def test_pairs_refuses_a_folder_as_its_output(spanfill: Command, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    done = spanfill("pairs", tmp_path / "a.py", "--output", tmp_path)
    assert (done.code, "is a folder. Name a file, for example" in done.stderr) == (USAGE, True), done.stderr


@pytest.mark.parametrize(
    "command", ["run", "score", "pairs", "infill", "explain", "show", "models", "demo", "bench feed"]
)
def test_help_shows_an_example(spanfill: Command, command: str) -> None:
    done = spanfill(*command.split(), "--help")
    assert done.code == 0
    assert "Example: spanfill" in done.stdout


@pytest.mark.parametrize("command", ["run", "score", "serve", "tenants create", "keys rotate", "plan", "tune"])
def test_help_tells_what_an_option_is_without_it(spanfill: Command, command: str) -> None:
    """What stands in brackets may be taken for markup, and is not printed then."""
    told = spanfill(*command.split(), "--help").stdout
    assert "default: " in told
    assert " .  " not in told


@pytest.mark.parametrize(
    ("rows", "order", "hints"), [(100, "prefix", False), (101, "prefix", True), (101, "global", False)]
)
def test_the_end_says_what_the_caches_could_have_had(
    capsys: pytest.CaptureFixture[str], rows: int, order: Literal["prefix", "global"], hints: bool
) -> None:
    """And where that is the ideal of each part alone."""
    manifest: dict[str, Any] = {"rows": rows, "input_rows": rows, "errors": 0, "seconds": 1.0, "rows_per_second": 2.0}
    manifest |= {"output_tokens_per_second": 4.0, "prefix_cache_hit_share": 0.25, "ideal_hit_share": 0.5}
    manifest |= {"tally": {"rows": rows}, "engine": "simulated"}
    failed = manifest | {"rows": rows - 3, "errors": 3, "error_codes": {"bad_input": 3}}
    summary(manifest, JobSpec(input="in", output="out", rows_per_part=100, order=order))
    told = " ".join(capsys.readouterr().err.split())
    assert "25.0% of the prompt tokens from the prefix cache (ideal: 50.0%; simulated engine)" in told
    assert ("--order global" in told) is hints
    assert told.startswith(f"{rows} rows, 0 errors")
    summary(failed, JobSpec(input="in", output="out"))
    assert capsys.readouterr().err.startswith(f"{rows} rows, 3 errors")
    summary(manifest | {"rows": 3 * rows}, JobSpec(input="in", output="out", n=3, temperature=1.0))
    assert capsys.readouterr().err.startswith(f"{3 * rows} samples of {rows} rows, 0 errors")
