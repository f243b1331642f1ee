"""From JSONL to the jobs' Parquet, and what is refused on the way."""

import codecs
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.api import lines
from jobs.api.lines import Record, read_records
from jobs.api.order import LineError, Options, Order, Plan, WorkFolder
from jobs.api.translation import plan_of
from tests.jobs.routed import ask, jsonl


@pytest.fixture
def folder(tmp_path: Path) -> WorkFolder:
    return WorkFolder(tmp_path)


def order(folder: WorkFolder, **values: Any) -> Order:
    usual: dict[str, Any] = {"id": "batch_1", "kind": "batch", "tenant": "acme", "app": "none", "model": "demo"}
    usual |= {"format": "codegen25", "context": 2_048, "can_infill": True, "engine": {"model": "demo-codegen25"}}
    usual |= {"source": str(folder.source("batch")), "began": 0, "endpoint": "/v1/completions"}
    return Order(**usual | values)


def translated(folder: WorkFolder, data: bytes, **values: Any) -> Plan:
    folder.source("batch").write_bytes(data)
    return plan_of(order(folder, **values), folder)


def records(folder: WorkFolder) -> list[Record]:
    with folder.lines.open("rb") as stream:
        return list(read_records(stream))


def rows(folder: WorkFolder, group: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder.rows(group)).to_pylist()
    return found


def refusals(folder: WorkFolder) -> dict[str, str]:
    """What is said of the lines that are not run, by their ids."""
    return {
        record.custom_id: record.refused.body["error"]["message"]
        for record in records(folder)
        if record.refused is not None
    }


def error_of(folder: WorkFolder, data: bytes, **values: Any) -> LineError:
    """The one thing that is wrong with a batch."""
    (error,) = translated(folder, data, **values).errors
    return error


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder: WorkFolder) -> None:
    plan = translated(folder, codecs.BOM_UTF8 + jsonl(ask("a", prompt="one"), ask("b", prompt="two")))
    assert (plan.total, plan.asking, plan.errors) == (2, 2, ())


def test_lines_become_rows_by_how_they_are_decoded(folder: WorkFolder) -> None:
    plan = translated(
        folder,
        jsonl(
            ask("a", prompt="one", suffix="!", max_tokens=8, temperature=0),
            ask("b", prompt=["two", "three"], max_tokens=8, temperature=0, top_p=0.5, stop=[]),
            ask("c", prompt="four", suffix="", temperature=0.5, n=2, seed=7, stop="x"),
        ),
    )
    greedy = Options(max_tokens=8, temperature=0, top_p=1, n=1, stop=())
    sampled = Options(max_tokens=16, temperature=0.5, top_p=1, n=2, stop=("x",))
    assert plan == Plan(total=3, asking=3, prompts=4, groups=(greedy, sampled))
    assert [tuple(row.values()) for row in rows(folder)] == [
        ("batch_1 1 0", 1, 0, "one", "!"),
        ("batch_1 2 0", 2, 0, "two", None),
        ("batch_1 2 1", 2, 1, "three", None),
    ]
    assert [tuple(row.values()) for row in rows(folder, 1)] == [("seed 7", 3, 0, "four", "")]
    assert [(record.line, record.custom_id, record.prompts) for record in records(folder)] == [
        *((1, "a", 1), (2, "b", 2), (3, "c", 1))
    ]


def test_rows_wait_until_they_are_many_or_their_text_is_much(
    folder: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.api.groups.FLUSH_TEXT", 1_000)
    texts = ["x" * 400, "y", "x" * 400, "z", "y" * 400, "z"]
    lines = [ask(str(n), prompt=["a", "b"], suffix=text, max_tokens=1 + n % 2) for n, text in enumerate(texts)]
    translated(folder, jsonl(*lines))
    for group, written in enumerate(([4, 2], [2, 4])):
        assert [row["suffix"] for row in rows(folder, group)] == [text for text in texts[group::2] for _ in "ab"]
        metadata = pq.read_metadata(folder.rows(group))
        assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == written


def test_a_batch_is_read_once(folder: WorkFolder) -> None:
    plan = translated(folder, jsonl(ask("a")))
    assert translated(folder, b"now something else") == plan


def test_openais_defaults_hold(folder: WorkFolder) -> None:
    plan = translated(folder, jsonl(ask("a")))
    assert plan.groups == (Options(max_tokens=16, temperature=1, top_p=1, n=1, stop=()),)


def test_mistrals_endpoint_has_its_own_fields_and_defaults(folder: WorkFolder) -> None:
    url = "/v1/fim/completions"
    plan = translated(
        folder, jsonl(ask("a", url, suffix="b", random_seed=3), ask("b", url, prompt=["a"])), endpoint=url
    )
    assert plan.groups == (Options(max_tokens=256, temperature=0, top_p=1, n=1, stop=()),)
    assert [row["id"] for row in rows(folder)] == ["seed 3"]
    assert "prompt" in refusals(folder)["b"]


def test_a_model_without_a_place_for_a_suffix_gets_no_such_column(folder: WorkFolder) -> None:
    translated(folder, jsonl(ask("a")), can_infill=False)
    assert list(rows(folder)[0]) == ["id", "line", "prompt", "prefix"]


WRONG: dict[str, dict[str, Any]] = {
    "token": {"prompt": [1, 2]},
    "logprobs": {"logprobs": 1},
    "echo": {"echo": True},
    "stream": {"stream": True},
    "logit_bias": {"logit_bias": {"5": 1}},
    "min_tokens": {"min_tokens": 2},
    "ignore_eos": {"ignore_eos": True},
    "max_tokens": {"max_tokens": 0},
    "n > 1": {"n": 2, "temperature": 0},
    "no room": {"max_tokens": 2_048},
    "temperature": {"temperature": 3},
    "best_of": {"best_of": 5},
    "prompt": {"prompt": 5},
}


def test_what_jobs_do_not_know_fails_its_line_alone_and_says_so(folder: WorkFolder) -> None:
    plan = translated(folder, jsonl(ask("good"), *(ask(words, **body) for words, body in WRONG.items())))
    assert (plan.errors, plan.total, len(plan.groups)) == ((), 1 + len(WRONG), 1)
    told = refusals(folder)
    assert told.keys() == WRONG.keys()
    for words, message in told.items():
        assert words in message, message
    assert {record.refused.status for record in records(folder) if record.refused} == {400}


def test_penalties_and_narrower_sampling_are_the_jobs_too(folder: WorkFolder) -> None:
    """Greedy decoding heeds the penalties and nothing else."""
    chosen: dict[str, Any] = {
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
    }
    lines = [ask("drawn", temperature=0.7, **chosen), ask("greedy", temperature=0, **chosen), ask("plain")]
    plan = translated(folder, jsonl(*lines))
    assert refusals(folder) == {}
    drawn, greedy, plain = plan.groups
    assert {name: getattr(drawn, name) for name in chosen} == chosen
    assert {name: getattr(greedy, name) for name in chosen} == chosen | {"top_k": 0, "min_p": 0.0}
    assert plain == Options(max_tokens=16, temperature=1, top_p=1, n=1, stop=())


def test_what_changes_nothing_is_accepted(folder: WorkFolder) -> None:
    harmless: dict[str, Any] = {"logprobs": None, "echo": False, "stream": False, "logit_bias": {}, "top_k": -1}
    harmless |= {"presence_penalty": 0, "frequency_penalty": 0.0, "user": "ada", "best_of": 1, "cache_salt": "mine"}
    assert not translated(folder, jsonl(ask("a", **harmless))).errors
    assert refusals(folder) == {}


MISSING: dict[str, Any] = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b"[1]", "invalid_parameter", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (b'{"body": ' * 50_000, "invalid_json_line", None),
        (b'{"custom_id": "\\ud800"}', "invalid_json_line", None),
        (jsonl(MISSING), "missing_required_parameter", "custom_id"),
        (jsonl(MISSING | {"custom_id": 5}), "invalid_parameter", "custom_id"),
        (jsonl(MISSING | {"custom_id": ""}), "invalid_parameter", "custom_id"),
        (jsonl(MISSING | {"custom_id": "x" * 513}), "invalid_parameter", "custom_id"),
        (jsonl(MISSING | {"custom_id": "b", "method": "GET"}), "invalid_parameter", "method"),
        (jsonl(MISSING | {"custom_id": "b", "body": []}), "invalid_parameter", "body"),
        (jsonl(ask("a")), "duplicate_custom_id", "custom_id"),
        (jsonl(ask("b", "/v1/chat/completions")), "mismatched_url", "url"),
        (jsonl(ask("b", "/v1/fim/completions")), "mismatched_url", "url"),
        (jsonl(ask("b", model="other")), "mismatched_model", "body.model"),
    ],
)
def test_a_line_that_is_no_part_of_the_batch_is_named(
    folder: WorkFolder, line: bytes, code: str, param: str | None
) -> None:
    error = error_of(folder, jsonl(ask("a")) + b"\n" + line)
    assert (error.code, error.line, error.param) == (code, 3, param)
    assert error.message


def test_a_model_that_is_not_served_is_named_once(folder: WorkFolder) -> None:
    error = error_of(folder, jsonl(ask("a", model="other"), ask("b", model="other")))
    assert (error.code, error.line) == ("model_not_found", 1)


def test_no_model_is_the_served_one(folder: WorkFolder) -> None:
    assert not translated(folder, jsonl(ask("a", model=None), ask("b"))).errors


@pytest.mark.parametrize("data", [b"", b"\n\n  \n"])
def test_an_empty_file_is_no_batch(folder: WorkFolder, data: bytes) -> None:
    assert error_of(folder, data).code == "empty_file"


def test_too_many_lines_are_refused(folder: WorkFolder) -> None:
    error = error_of(folder, jsonl(*(ask(str(number)) for number in range(6))), most_lines=4)
    assert (error.code, error.line) == ("too_many_tasks", 5)


def test_a_line_that_is_too_long_ends_the_reading(folder: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("jobs.api.lines", "jobs.api.translation"):
        monkeypatch.setattr(f"{module}.MOST_LINE", 200)
    assert lines.MOST_LINE == 200
    error = error_of(folder, jsonl(ask("a"), ask("b", prompt="x" * 500), ask("a")))
    assert (error.code, error.line) == ("line_too_long", 2)


def test_a_byte_order_mark_hides_no_line_that_is_too_long(folder: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("jobs.api.lines", "jobs.api.translation"):
        monkeypatch.setattr(f"{module}.MOST_LINE", 200)
    error = error_of(folder, codecs.BOM_UTF8 + jsonl(ask("a", prompt="x" * 500), ask("b")))
    assert (error.code, error.line) == ("line_too_long", 1)


def test_a_hundred_wrong_lines_are_enough(folder: WorkFolder) -> None:
    errors = translated(folder, b"{\n" * 500).errors
    assert [error.line for error in errors] == list(range(1, 101))


def test_lines_of_too_many_ways_to_decode_fail_alone(folder: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("groups", "translation"):
        monkeypatch.setattr(f"jobs.api.{module}.MOST_GROUPS", 3)
    asked = [ask(str(place), max_tokens=number) for place, number in enumerate((1, 2, 3, 2, 4, 5))]
    plan = translated(folder, jsonl(*asked))
    assert (plan.errors, plan.asking, [options.max_tokens for options in plan.groups]) == ((), 4, [1, 2, 3])
    assert list(refusals(folder)) == ["4", "5"]
    assert "decoded in 3 ways already" in refusals(folder)["4"]


def test_a_line_that_asks_for_too_many_completions_fails_alone(folder: WorkFolder) -> None:
    many = ask("many", prompt=["a"] * 128, n=9, temperature=1)
    plan = translated(folder, jsonl(ask("one"), many))
    assert (plan.errors, plan.asking) == ((), 1)
    assert "asks for 1,152 completions" in refusals(folder)["many"]


def test_a_line_whose_suffix_is_much_text_for_all_its_prompts_fails_alone(folder: WorkFolder) -> None:
    much = ask("much", prompt=["a"] * 128, suffix="x" * (32 << 10))
    plan = translated(folder, jsonl(ask("one"), much))
    assert (plan.errors, plan.asking, len(rows(folder))) == ((), 1, 1)
    assert "has 4,194,432 characters, its suffix once for each prompt" in refusals(folder)["much"]


def test_a_plan_survives_its_file(folder: WorkFolder) -> None:
    plan = translated(folder, jsonl(ask("a", stop=["b", "a", "b"]), {"custom_id": "x"}))
    assert plan.errors
    assert Plan.model_validate(json.loads(folder.plan.read_text())) == plan
    assert plan.groups[0].stop == ("a", "b")
