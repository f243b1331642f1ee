"""What a job's fingerprint is made of."""

from typing import Any

import pytest

from jobs.spec import JobSpec, fingerprint
from jobs.tune import GRID
from serving.engine_args import SPEED_ARGUMENTS
from serving.models import resolve_model


def job_fingerprint(**options: Any) -> str:
    spec = JobSpec.parse({"input": "in", "output": "out", **options})
    engine = resolve_model("Salesforce/codegen25-7b-multi_P", format="codegen25").engine_config(
        engine_args=spec.engine_args
    )
    return fingerprint(spec.infill_identity(engine, {}, "codegen25", []))


BEGUN = "a63008f688cd"
"""Of a job that began before there was ``stop_at_suffix``, and before there were penalties."""

LATER: dict[str, Any] = {"presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1}
DRAWN: dict[str, Any] = {"top_k": 5, "min_p": 0.1}


def test_options_that_came_later_leave_begun_jobs_what_they_are_until_they_are_used() -> None:
    assert job_fingerprint() == job_fingerprint(stop_at_suffix=False) == BEGUN
    assert job_fingerprint(stop_at_suffix=True) != BEGUN
    assert job_fingerprint(top_k=0, min_p=0.0, repetition_penalty=1.0) == BEGUN
    for name, value in LATER.items():
        assert job_fingerprint(**{name: value}) != BEGUN


@pytest.mark.parametrize("name", DRAWN)
def test_what_narrows_the_draw_changes_a_job_that_draws(name: str) -> None:
    assert job_fingerprint(**{name: DRAWN[name]}) == BEGUN
    assert job_fingerprint(temperature=0.5, **{name: DRAWN[name]}) != job_fingerprint(temperature=0.5)


@pytest.mark.parametrize("name", [knob.name for knob in GRID])
def test_what_tune_tries_lets_a_begun_job_go_on(name: str) -> None:
    assert name in SPEED_ARGUMENTS
    assert job_fingerprint(engine_args={name: 1}) == job_fingerprint()


def test_speculation_is_another_job() -> None:
    """Drafts that are accepted use up a seed's random numbers otherwise, so sampled infills change."""
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    assert job_fingerprint(engine_args={"speculative_config": drafts}) != job_fingerprint()


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 10_000),
        ({"max_tokens": 2_048}, 10_000),
        ({"n": 16}, 10_000),
        ({"rows_per_part": 5}, 5),
        ({"n": 100}, 3_495),
        ({"n": 1_024, "max_tokens": 8}, 910),
        ({"n": 1_024, "max_tokens": 100_000}, 1),
    ],
)
def test_a_unit_has_fewer_rows_where_all_of_their_samples_are_too_much_to_hold(
    options: dict[str, Any], rows: int
) -> None:
    assert JobSpec.parse({"input": "in", "output": "out", "temperature": 1.0} | options).unit_rows == rows


COLUMNS = ["id", "prefix", "suffix"]
SPELLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"limit": 100}, {}),
    ({"limit": 101}, {}),
    ({"columns": {"prefix": "prefix"}}, {}),
    ({"columns": {"suffix": "suffix", "id": "id"}}, {}),
    ({"keep_columns": ("suffix", "prefix", "id")}, {}),
    ({"keep_columns": ("suffix", "id")}, {"keep_columns": ("id", "suffix")}),
    ({"stop": ("b", "a", "b")}, {"stop": ("a", "b")}),
]


@pytest.mark.parametrize(("one", "other"), SPELLINGS)
def test_the_same_job_in_other_words_is_the_same_job(one: dict[str, Any], other: dict[str, Any]) -> None:
    specs = [JobSpec.parse({"input": "in", "output": "out", **options}) for options in (one, other)]
    assert specs[0].in_plain_words(COLUMNS, 100) == specs[1].in_plain_words(COLUMNS, 100)


def test_a_limit_below_the_rows_and_columns_left_out_make_another_job() -> None:
    plain = JobSpec(input="in", output="out").in_plain_words(COLUMNS, 100)
    for options in ({"limit": 99}, {"keep_columns": ("id",)}, {"columns": {"prefix": "suffix"}}, {"stop": ("a",)}):
        spec = JobSpec.parse({"input": "in", "output": "out", **options})
        assert spec.in_plain_words(COLUMNS, 100) != plain
