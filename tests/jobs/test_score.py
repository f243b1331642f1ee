"""What an engine is asked to score, what is made of its answers, and whole jobs without Ray."""

import asyncio
import itertools
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import run_job, runner
from jobs.feeder import Feeder, Route
from jobs.job import feeder_config
from jobs.journal import Sample
from jobs.plan import Unit
from jobs.rows import PromptFacts
from jobs.score import (
    SCORING,
    check_logprobs_mode,
    nothing_scored,
    score_columns,
    score_prompts,
    score_totals,
    settle_columns,
)
from jobs.spec import JobSpec
from jobs.status import read_status
from jobs.tally import Tally
from jobs.verify import verify
from jobs.windows import SPARE, Windows, joined, scored_sample, window_sizes, windows
from serving.errors import ConfigError, EngineError, InputError, PromptTooLongError, SpanfillError
from serving.formats import Prompt, load_format
from serving.models import resolve_model
from serving.protocol import MicroBatch, MicroBatchResult, Result
from serving.simulated import SimulatedEngine
from tests.conftest import Command, WriteRows
from tests.runs import contents, rows

USAGE = 2
FORMAT = load_format("codegen25")
ENCODE = FORMAT.tokenizer.encode
BEGIN = FORMAT.tokenizer.special_id("<|endoftext|>")
PREFIX, MIDDLE, SUFFIX = "def total(xs):\n    ", "return sum(xs)  # π", "\n\nprint(total([1]))\n"
LONG = "".join(f"word{i} " for i in range(60))


def spec(**options: Any) -> JobSpec:
    return JobSpec.parse({"task": "score", "input": "in", "output": "out", **options})


def made(
    *, context: int = 1_024, options: dict[str, Any] | None = None, **columns: Any
) -> list[Prompt | SpanfillError]:
    """What the rows of a batch become."""
    batch = pa.record_batch({name: pa.array(values, pa.string()) for name, values in columns.items()})
    job = settle_columns(spec(**(options or {})), batch.schema.names)
    return [prompt for _, prompt in score_prompts(job, FORMAT, context, batch)]


def good(**arguments: Any) -> list[Prompt]:
    found = made(**arguments)
    assert not [prompt for prompt in found if isinstance(prompt, SpanfillError)]
    return [prompt for prompt in found if isinstance(prompt, Prompt)]


def test_a_text_stands_behind_the_token_that_begins_a_document() -> None:
    plain, empty, hostile = good(text=[MIDDLE, "", "<|endoftext|>"])
    assert list(plain.token_ids) == [BEGIN, *ENCODE(MIDDLE)]
    assert list(empty.token_ids) == [BEGIN]
    assert [prompt.scored for prompt in (plain, empty)] == [len(ENCODE(MIDDLE)), 0]
    assert BEGIN not in hostile.token_ids[1:]


@pytest.mark.parametrize("suffix", [SUFFIX, "", None])
def test_a_middle_stands_behind_the_prompt_of_an_infill(suffix: str | None) -> None:
    (found,) = good(prefix=[PREFIX], suffix=[suffix], middle=[MIDDLE])
    prompt = FORMAT.prompt(PREFIX, suffix, max_tokens=1)
    assert list(found.token_ids) == [*prompt.token_ids, *ENCODE(MIDDLE)]
    assert (found.scored, found.truncated) == (len(ENCODE(MIDDLE)), False)


def test_the_end_of_the_infill_is_scored_when_that_is_asked_for() -> None:
    columns = {"prefix": [PREFIX], "suffix": [SUFFIX], "middle": [MIDDLE]}
    (without,), (with_end,) = good(**columns), good(**columns, options={"score_end": True})
    assert list(with_end.token_ids) == [*without.token_ids, FORMAT.tokenizer.special_id("<eom>")]
    assert with_end.scored == without.scored + 1


def test_a_prompt_that_is_too_long_is_cut_as_for_an_infill_of_the_middles_length() -> None:
    (found,) = good(prefix=[LONG * 3], suffix=[LONG], middle=[MIDDLE], context=128)
    room = len(ENCODE(MIDDLE)) + SPARE
    prompt = FORMAT.prompt(LONG * 3, LONG, max_tokens=room, max_context=128)
    assert list(found.token_ids) == [*prompt.token_ids, *ENCODE(MIDDLE)]
    assert (found.truncated, len(found.token_ids) < 128) == (True, True)


@given(st.integers(0, 60), st.none() | st.integers(0, 60), st.integers(0, 40), st.integers(16, 64))
def test_a_middle_is_never_cut_and_fits_or_is_an_error_row(
    before: int, after: int | None, middle: int, context: int
) -> None:
    suffix = None if after is None else "b " * after
    (found,) = made(prefix=["a " * before], suffix=[suffix], middle=["c " * middle], context=context)
    ids = ENCODE("c " * middle)
    if isinstance(found, SpanfillError):
        assert isinstance(found, PromptTooLongError)
        assert f"middle of {len(ids)} tokens leaves no room for a prompt in a context of {context}" in found.message
        assert len(ids) + SPARE + FORMAT.control_count >= context
    else:
        assert len(found.token_ids) + SPARE <= context
        assert list(found.token_ids)[len(found.token_ids) - found.scored :] == ids


def test_rows_that_cannot_be_scored_are_named_and_spare_their_neighbours() -> None:
    first, second, third = made(prefix=["a", None, "c"], middle=["x", "y", None])
    assert isinstance(first, Prompt)
    assert "column prefix is null. Give a prefix" in str(second)
    assert "column middle is null. Give a middle" in str(third)
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"no \xff"], pa.binary()).buffers())
    batch = pa.record_batch({"id": pa.array([7, 8]), "text": broken})
    job = settle_columns(spec(), batch.schema.names)
    (one, whole), (other, error) = score_prompts(job, FORMAT, 1_024, batch)
    assert (one, other, isinstance(whole, Prompt)) == (7, 8, True)
    assert "column text is not UTF-8 at byte 3" in str(error)


IDS = st.integers(0, 50_255)


@given(st.lists(IDS, min_size=1, max_size=5), st.lists(IDS, min_size=1, max_size=60), st.integers(1, 20))
def test_windows_score_each_token_once(head: list[int], text: list[int], room: int) -> None:
    context = len(head) + room + SPARE
    asked = windows([*head, *text], len(text), context)
    assert [len(ids) - len(head) for ids in asked] == window_sizes(len(head) + len(text), len(text), context)
    assert all(list(ids[: len(head)]) == head and len(ids) + SPARE <= context for ids in asked)
    assert [token for ids in asked for token in ids[len(head) :]] == text


def test_of_an_answer_the_sum_over_the_scored_tokens_is_kept() -> None:
    result = Result(0, cached_tokens=16, prompt_logprobs=[-9.0, -1.0, -2.5])
    sample = scored_sample(result, 7, 2, replica="r", attempts=3)
    assert (sample.row, sample.sum_logprob, sample.scored) == (7, -3.5, 2)
    assert (sample.cached_tokens, sample.replica, sample.attempts, sample.token_ids) == (16, "r", 3, [])
    failed = scored_sample(Result(0, error_code="engine_error", error_message="boom"), 7, 2, replica="r", attempts=1)
    assert (failed.error_code, failed.error_message) == ("engine_error", "boom")
    with pytest.raises(EngineError, match="told 3 logarithms of 4 tokens"):
        scored_sample(result, 7, 4, replica="r", attempts=1)


@given(st.permutations(range(5)))
def test_windows_that_come_in_any_order_make_the_same_row(order: list[int]) -> None:
    parts = [Sample(3, 0, [], sum_logprob=-0.1 * 3**n, scored=n, cached_tokens=n, attempts=n) for n in range(5)]
    pending = Windows()
    found = [sample for number in order for sample in pending.add(number, parts[number], len(parts))]
    assert found == [joined(parts)]
    assert (found[0].sum_logprob, found[0].scored) == (math.fsum(-0.1 * 3**n for n in range(5)), 10)
    assert (found[0].cached_tokens, found[0].attempts) == (10, 4)


def test_a_window_that_fails_fails_its_row_in_the_first_ones_words() -> None:
    parts = [Sample(3, 0, [], error_code=code, error_message=code) for code in (None, "first", "second")]
    assert joined(parts).error_message == "first"


@pytest.mark.parametrize(
    ("columns", "present", "required"),
    [
        ({}, ["prefix", "middle"], ("prefix", "middle")),
        ({}, ["id", "prefix", "text"], ("text",)),
        ({"text": "code"}, ["code", "prefix", "middle"], ("text",)),
        ({"prefix": "before"}, ["before", "middle", "text"], ("prefix", "middle")),
        ({"text": ""}, ["prefix", "middle", "text"], ("prefix", "middle")),
        ({"middle": ""}, ["prefix", "middle", "text"], ("text",)),
    ],
)
def test_what_is_scored_is_what_is_named_or_else_what_is_there(
    columns: dict[str, str], present: list[str], required: tuple[str, ...]
) -> None:
    settled = settle_columns(spec(columns=columns), present)
    assert settled.required_roles == required
    assert settle_columns(settled, present) == settled
    others = {"prefix", "suffix", "middle", "text"} - {*required, "suffix" if "middle" in required else ""}
    assert {role for role in settled.roles if not settled.column(role)} == others


@pytest.mark.parametrize(
    ("options", "present", "words"),
    [
        ({}, ["prefix", "middle", "text"], "either could be scored"),
        ({"columns": {"middle": "a", "text": "b"}}, ["prefix", "a", "b"], "either could be scored"),
        ({}, ["prefix", "suffix"], "the input has prefix, suffix"),
        ({"score_end": True}, ["text"], "no end of an infill"),
    ],
)
def test_what_cannot_be_told_is_refused(options: dict[str, Any], present: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        settle_columns(spec(**options), present)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 4}, "scoring generates nothing; leave out max_tokens"),
        ({"stop": ["x"], "temperature": 0.5}, "leave out temperature, stop"),
        ({"order": "global"}, "order global is for a prefix cache"),
        ({"columns": {"infill": "x"}}, "'infill' is none of"),
        ({"extra_columns": ["token_ids"]}, "'token_ids' is none of"),
        ({"task": "infill", "score_end": True}, "score_end is for task score"),
        ({"task": "infill", "columns": {"text": "x"}}, "'text' is none of"),
    ],
)
def test_what_belongs_to_the_other_task_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec(**options)


def test_the_task_and_what_is_scored_identify_a_job() -> None:
    engine = resolve_model("Salesforce/codegen25-7b-multi_P", format="codegen25").engine_config()
    jobs = [spec(), spec(score_end=True), spec(columns={"text": "a"}), JobSpec(input="in", output="out")]
    identities = [job.infill_identity(engine, {}, "codegen25", []) for job in jobs]
    assert not [pair for pair in itertools.combinations(identities, 2) if pair[0] == pair[1]]
    assert "max_tokens" not in identities[0]


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_logits_are_no_logarithms(mode: str) -> None:
    with pytest.raises(ConfigError, match=mode):
        check_logprobs_mode({"logprobs_mode": mode})
    check_logprobs_mode({"logprobs_mode": mode.replace("logits", "logprobs")})
    check_logprobs_mode({})


def test_figures_are_natural_logarithms_and_bits_of_utf8_bytes() -> None:
    samples = [Sample(0, 0, [], sum_logprob=-4 * math.log(2), scored=2), nothing_scored(1)]
    facts, tally = [PromptFacts(9, 0, 0, True, 2), PromptFacts(1, 0, 0, False)], Tally()
    job = spec(extra_columns=["truncated", "source_file", "source_row"])
    found = score_columns(job, facts, samples, ["éa", ""], [("a", 0), ("b", 4)], tally)
    values = {name: column.to_pylist() for name, column in found.items()}
    assert values == {
        "sum_logprob": [pytest.approx(-4 * math.log(2)), 0.0],
        "mean_logprob": [pytest.approx(-2 * math.log(2)), None],
        "tokens": [2, 0],
        "bits_per_byte": [pytest.approx(4 / 3), None],
        "truncated": [True, False],
        "source_file": ["a", "b"],
        "source_row": [0, 4],
    }
    totals = {"scored_tokens": 2, "mean_logprob": -2 * math.log(2), "bits_per_byte": 4 / 3}
    assert score_totals(tally) == pytest.approx(totals)
    assert score_totals(Tally()) == {"scored_tokens": 0, "mean_logprob": None, "bits_per_byte": None}


Local = Callable[..., dict[str, Any]]


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Local:
    """Run a job with its feeder and an instant engine in this process; after ``calls`` calls the engine is lost."""

    def score(source: Path, output: Path, *, calls: int | None = None, **options: Any) -> dict[str, Any]:
        use_this_process(monkeypatch, calls)
        return run_job(spec(input=str(source), output=str(output), engine="instant", **options))

    return score


def use_this_process(monkeypatch: pytest.MonkeyPatch, calls: int | None = None) -> None:
    """Let ``run_job`` do without Ray."""

    def feed(run: Any, left: deque[Unit]) -> None:
        for tally in asyncio.run(answered(run, list(left))):
            run.finished.add(tally)
        left.clear()
        run.ran = 1.0

    async def answered(run: Any, units: list[Unit]) -> list[Tally | None]:
        engine, number = SimulatedEngine(run.job.engine), itertools.count()

        async def call(batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
            assert run.job.spec.task == "infill" or batch.sampling == SCORING
            if next(number) == calls:
                raise LookupError("the engine is lost")
            found = await asyncio.gather(*(engine.generate(request, batch.sampling) for request in batch.requests))
            yield MicroBatchResult("local", tuple(found))

        feeder = Feeder(feeder_config(run.job, beginning=run.ledger.beginning, lease=run.lease.number))
        feeder.connect(call, Route(replicas=1, window=2, batch_rows=64, block_size=16))
        return await asyncio.gather(*(feeder.run(unit, run.job.inputs.files[unit.file]) for unit in units))

    monkeypatch.setattr(runner, "_feed", feed)


def bits(text: str) -> float | None:
    """What the instant engine, for which each token has the logarithm -1, makes of a text."""
    return len(ENCODE(text)) / math.log(2) / len(text.encode()) if text else None


def test_texts_of_any_length_are_scored_and_what_cannot_be_is_told(
    write_rows: WriteRows, tmp_path: Path, local: Local, spanfill: Command
) -> None:
    texts, output = [MIDDLE, "", None, LONG], tmp_path / "out"
    source = write_rows(id=range(4), text=texts, other=["a", "b", "c", "d"])
    manifest = local(source, output, max_model_len=32, max_error_rate=1.0, extra_columns=["source_row"])
    scored = {number: text for number, text in enumerate(texts) if text is not None}
    assert len(ENCODE(LONG)) > 3 * 32
    found = rows(output)
    assert list(found[0]) == [
        *("id", "text", "other"),
        *("sum_logprob", "mean_logprob", "tokens", "bits_per_byte", "source_row"),
    ]
    assert [row["id"] for row in found] == [row["source_row"] for row in found] == list(scored)
    assert [row["tokens"] for row in found] == [len(ENCODE(text)) for text in scored.values()]
    assert [row["sum_logprob"] for row in found] == [-row["tokens"] for row in found]
    assert [row["mean_logprob"] for row in found] == [-1.0, None, -1.0]
    assert [row["bits_per_byte"] for row in found] == pytest.approx([bits(text) for text in scored.values()])
    (error,) = rows(output, "errors")
    assert (error["id"], error["error_code"], error["attempts"]) == (2, "bad_input", 0)
    assert (manifest["rows"], manifest["errors"], manifest["replicas"]) == (3, 1, {"local": 2})
    assert (manifest["task"], manifest["finish_reasons"], manifest["completion_tokens"]) == ("score", {}, 0)
    assert manifest["scored_tokens"] == manifest["scored_tokens_per_second"] == sum(row["tokens"] for row in found)
    assert "figures are noise" in manifest["simulated"]
    assert (verify(str(output)).problems, read_status(str(output)).state) == ([], "finished")
    shown = spanfill("show", output)
    assert f"── 0 · -{len(ENCODE(MIDDLE))}.000 nats · {len(ENCODE(MIDDLE))} tokens · " in shown.stdout
    assert "── 1 · 0.000 nats · 0 tokens ──" in shown.stdout
    assert MIDDLE in shown.stdout


def test_equal_rows_are_scored_once_and_equal_tokens_cut_elsewhere_are_not_equal(
    write_rows: WriteRows, tmp_path: Path, local: Local, spanfill: Command
) -> None:
    source = write_rows(
        prefix=["a b", "a", "a", LONG], suffix=[None, None, None, SUFFIX], middle=[" c", " b c", " b c", MIDDLE]
    )
    output = tmp_path / "out"
    manifest = local(source, output, max_model_len=64, extra_columns=["truncated"])
    found = rows(output)
    assert [row["tokens"] for row in found] == [1, 2, 2, len(ENCODE(MIDDLE))]
    assert [row["sum_logprob"] for row in found] == [-row["tokens"] for row in found]
    assert [row["truncated"] for row in found] == [False, False, False, True]
    assert (manifest["tally"]["twins"], manifest["truncated"]) == (1, 1)
    assert verify(str(output)).problems == []
    shown = spanfill("show", output, "--row", 3)
    assert f"{MIDDLE}\n\nprint(total([1]))\n" in shown.stdout


def test_a_job_that_is_lost_goes_on_and_ends_with_the_same_files(
    write_rows: WriteRows, tmp_path: Path, local: Local
) -> None:
    source = write_rows(text=[f"{LONG[: 7 * (i % 50)]} {i}" for i in range(300)])
    options: dict[str, Any] = {"max_model_len": 32, "batch_rows": 4}
    local(source, tmp_path / "whole", **options)
    with pytest.raises(LookupError, match="lost"):
        local(source, tmp_path / "out", calls=2, **options)
    assert read_status(str(tmp_path / "out")).state == "interrupted"
    manifest = local(source, tmp_path / "out", **options | {"batch_rows": 32, "order": "input"})
    assert 0 < manifest["tally"]["replayed"] < 300
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify(str(tmp_path / "out")).problems == []


@pytest.fixture
def command(spanfill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``spanfill score`` with the instant engine in this process, into a fresh folder."""
    use_this_process(monkeypatch)

    def run(source: Path, *options: object) -> Any:
        return spanfill("score", "--input", source, "--output", tmp_path / "out", "--engine", "instant", *options)

    return run


def test_the_command_scores_and_says_so(command: Command, write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows(before=["a", "b"], hole=[MIDDLE, None], text=["x", "y"])
    names = ["--column", "prefix=before", "--column", "middle=hole", "--max-error-rate", 1]
    done = command(source, *names, "--limit", 1)
    assert (done.code, done.stdout) == (0, "")
    assert "every figure is noise" in done.stderr
    assert f"{len(ENCODE(MIDDLE))} scored tokens/s" in done.stderr
    assert [row["text"] for row in rows(tmp_path / "out")] == ["x"]
    refused = command(source, *names)
    assert (refused.code, "belongs to another job; different: limit" in refused.stderr) == (USAGE, True)
    failed = command(source, *names, "--overwrite", "--json")
    assert (failed.code, json.loads(failed.stdout)["error_codes"]) == (3, {"bad_input": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--order", "global"], "order global is for a prefix cache"),
        (["--with", "token_ids"], "'token_ids' is none of"),
        (["--column", "infill=x"], "'infill' is none of"),
        (["--column", "middle=x"], "column prefix is missing; the input has text"),
        (["--column", "text=x"], "column x is missing; the input has text"),
        (["--column", "text="], "no column middle and no column text; the input has text"),
        (["--score-end"], "no end of an infill to score"),
        (["--engine-arg", "logprobs_mode=raw_logits"], "gives no logarithms"),
        (["--max-model-len", "8"], "max_model_len = 8"),
    ],
)
def test_an_absurd_option_is_named(command: Command, write_rows: WriteRows, options: list[str], words: str) -> None:
    done = command(write_rows(text=["a"]), *options)
    assert (done.code, words in done.stderr) == (USAGE, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_column_that_the_output_adds_is_refused(command: Command, write_rows: WriteRows) -> None:
    done = command(write_rows(text=["a"], tokens=[1]))
    assert (done.code, "already has a column tokens" in done.stderr) == (USAGE, True)


def test_a_job_file_of_infills_is_refused_by_what_it_generates(
    command: Command, write_rows: WriteRows, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text("max_tokens: 3\n")
    done = command(write_rows(text=["a"]), "--job", tmp_path / "job.yaml")
    assert (done.code, "leave out max_tokens" in done.stderr) == (USAGE, True)
