"""From a row to its seeds, and from an engine's answer to the columns of the output."""

import sys
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.journal import Sample
from jobs.rows import PromptFacts, output_columns, row_prompts, row_seeds, row_untils, to_samples
from jobs.spec import JobSpec
from jobs.tally import Tally
from serving.formats import Prompt, load_format
from serving.protocol import Completion, Result

FORMAT = load_format("codegen25")
EOM = FORMAT.tokenizer.special_id("<eom>")
SUFFIX = "\n    return total\n"


def spec(**options: object) -> JobSpec:
    return JobSpec.parse({"input": "in", "output": "out", **options})


def columns(text: str, stop_token_id: int | None = EOM, **options: Any) -> dict[str, list[object]]:
    sample = Sample(5, 0, FORMAT.tokenizer.encode(text), stop_token_id, -0.5)
    facts = PromptFacts(7, 3, 4, False)
    found = output_columns(
        spec(**options), FORMAT, [facts], [("x", SUFFIX)], [sample], [("a.parquet", sample.row)], Tally()
    )
    return {name: column.to_pylist() for name, column in found.items()}


@pytest.mark.parametrize(
    ("text", "options", "infill", "reason"),
    [
        ("total += x", {}, "total += x", "eom"),
        ("total += x", {"stop": [" +="]}, "total", "stop"),
        ("total += x" + SUFFIX, {"trim": ["suffix-overlap"]}, "total += x", "overlap"),
        ("total += x" + SUFFIX, {}, "total += x" + SUFFIX, "eom"),
        ("total += x", {"trim": ["suffix-overlap", "suffix-echo", "next-line"]}, "total += x", "eom"),
        ("a\na\na\na\n", {"trim": ["repeated-lines"]}, "a\n", "eom"),
        ("total += x" + SUFFIX + "more", {"stop_at_suffix": True}, "total += x", "overlap"),
        ("total += x" + SUFFIX, {"stop_at_suffix": True, "stop": ["x"]}, "total += ", "stop"),
        ("total += x", {"stop_at_suffix": True}, "total += x", "eom"),
    ],
)
def test_the_infill_is_cut_and_says_why_it_ended(text: str, options: dict[str, Any], infill: str, reason: str) -> None:
    found = columns(text, **options)
    assert (found["infill"], found["finish_reason"]) == ([infill], [reason])


def test_each_row_is_ended_by_its_own_suffix_if_that_is_asked_for() -> None:
    batch = pa.record_batch({"prefix": ["a", "b", "c"], "suffix": [SUFFIX, None, ")"]})
    assert row_untils(spec(), batch) == [None, None, None]
    assert row_untils(spec(stop_at_suffix=True), batch) == [SUFFIX, None, None]
    assert row_untils(spec(stop_at_suffix=True, columns={"suffix": ""}), batch) == [None, None, None]


def test_extra_columns_come_when_asked_for_and_only_then() -> None:
    assert "token_ids" not in columns("x")
    found = columns("x", extra_columns=["mean_logprob", "token_ids", "source_file", "source_row"])
    assert found["mean_logprob"] == [-0.5]
    assert found["token_ids"] == [FORMAT.tokenizer.encode("x")]
    assert (found["source_file"], found["source_row"]) == (["a.parquet"], [5])


def test_an_end_by_length_or_by_another_control_token_is_told_apart() -> None:
    assert columns("x", stop_token_id=None)["finish_reason"] == ["length"]
    assert columns("x", stop_token_id=FORMAT.tokenizer.special_id("<|endoftext|>"))["finish_reason"] == ["eos"]


def test_an_engines_error_is_one_sample_and_logprobs_are_averaged() -> None:
    (failed,) = to_samples(Result(3, error_code="engine_error", error_message="boom"), 9, replica="r", attempts=2)
    assert (failed.row, failed.error_code, failed.error_message, failed.attempts) == (9, "engine_error", "boom", 2)
    done = Result(3, (Completion([1, 2], "stop", EOM, [-1.0, -3.0]), Completion([1], "length")))
    samples = to_samples(replace(done, cached_tokens=16), 9, replica="r", attempts=1)
    assert [(s.sample, s.mean_logprob, s.cached_tokens) for s in samples] == [(0, -2.0, 16), (1, None, 0)]


def test_what_is_kept_of_an_answer_has_four_bytes_a_token() -> None:
    ids = list(range(1_000, 1_128))
    (sample,) = to_samples(Result(3, (Completion(ids, "length"),)), 9, replica="r", attempts=2)
    assert (list(sample.token_ids), sample.attempts) == (ids, 2)
    assert sys.getsizeof(sample.token_ids) < 5 * len(ids)


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.large_string())])
def test_a_row_with_a_text_that_is_too_long_is_an_error_row(kind: pa.DataType) -> None:
    prefixes = pa.array(["ä" * 5, "b", None, "ä" * 6], kind)
    batch = pa.record_batch({"prefix": prefixes, "suffix": ["x" * 11, "y", "z", ""]})
    first, second, third, fourth = (made for _, made in row_prompts(spec(most_text=10), FORMAT, 2_048, batch))
    assert str(first).startswith("column suffix has a text of 11 bytes, more than 10.")
    assert isinstance(second, Prompt)
    assert "column prefix is null" in str(third)
    assert str(fourth).startswith("column prefix has a text of 12 bytes, more than 10.")
    assert all(isinstance(made, Prompt) for _, made in row_prompts(spec(), FORMAT, 2_048, batch.slice(0, 2)))


@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 2**62), st.integers(1, 5))
def test_seeds_depend_on_job_id_and_sample_and_on_nothing_else(one: str, other: str, seed: int, n: int) -> None:
    job = spec(temperature=0.5, n=n, seed=seed)
    seeds = row_seeds(job, one)
    assert len(set(seeds)) == n
    assert all(0 <= s < 2**63 for s in seeds)
    assert seeds == row_seeds(spec(temperature=0.9, n=n, seed=seed, input="elsewhere"), one)
    if one != other:
        assert not set(seeds) & set(row_seeds(job, other))
    assert not set(seeds) & set(row_seeds(spec(temperature=0.5, n=n, seed=seed + 1), one))
