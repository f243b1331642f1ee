import json
from dataclasses import replace
from typing import Any

import pytest

from serving.api.ask import Ask, Decoding, Piece
from serving.errors import EngineDeadError, OverloadedError
from tests.serving.api.scripted import DEMO, Scripted, client_of, events_of

PATH = "/v1/fim/completions"
ASKED = {"model": "demo", "prompt": "def f", "suffix": "\n"}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def ask_for(**sent: Any) -> Ask:
    service = Scripted()
    answer = client_of(service).post(PATH, json=ASKED | sent)
    assert answer.status_code == 200, answer.text
    return service.asked[0]


def chunks_of(service: Scripted) -> list[dict[str, Any]]:
    answer = client_of(service).post(PATH, json=ASKED | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(answer.text)
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def test_an_infill_is_answered_in_mistrals_shape() -> None:
    told = client_of(Scripted()).post(PATH, json=ASKED).json()
    assert told.pop("id").startswith("fim-")
    assert told.pop("created") > 1_700_000_000
    assert told == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a = 1\nb"},
                "finish_reason": "stop",
                "spanfill_reason": "eom",
            }
        ],
        "usage": USAGE,
    }


def test_what_is_asked_without_options_is_greedy_and_ends() -> None:
    assert ask_for() == Ask(prefix="def f", suffix="\n", max_tokens=256)


def test_every_field_that_counts_and_those_that_do_not() -> None:
    ask = ask_for(
        temperature=0.7,
        top_p=0.95,
        max_tokens=64,
        min_tokens=2,
        stop=["\n\n", "def"],
        random_seed=7,
        seed=8,
        metadata={"team": "a"},
        prompt_mode=None,
        stream=False,
    )
    assert ask == Ask(
        prefix="def f",
        suffix="\n",
        max_tokens=64,
        seed=7,
        stop=("\n\n", "def"),
        decoding=Decoding(temperature=0.7, top_p=0.95, min_tokens=2),
    )


@pytest.mark.parametrize("suffix", [None, "", "x"])
def test_a_null_suffix_is_a_causal_completion_and_an_empty_one_an_infill(suffix: str | None) -> None:
    assert ask_for(suffix=suffix).suffix == suffix


def test_one_stop_string_will_do() -> None:
    assert ask_for(stop="def").stop == ("def",)


def test_an_open_end_leaves_half_of_a_small_context() -> None:
    service = Scripted(models=(replace(DEMO, context=100),))
    client_of(service).post(PATH, json=ASKED)
    client_of(service).post(PATH, json=ASKED | {"max_tokens": 99})
    client_of(service).post(PATH, json=ASKED | {"max_tokens": 4_096})
    assert [ask.max_tokens for ask in service.asked] == [50, 99, 50]


def test_every_chunk_has_its_choice_and_the_last_the_usage() -> None:
    service = Scripted(Piece(0, "a"), Piece(0), Piece(0, "b", reason="stop", stop_word="x"))
    chunks = chunks_of(service)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["a", "b", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert [chunk.get("usage") for chunk in chunks] == [None, None, USAGE]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {len(chunk["choices"]) for chunk in chunks} == {1}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert service.closed == 1


def test_an_empty_infill_still_streams_its_end() -> None:
    (chunk,) = chunks_of(Scripted(Piece(0, reason="eom")))
    assert chunk["choices"][0]["finish_reason"] == "stop"
    assert chunk["choices"][0]["spanfill_reason"] == "eom"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_its_status_streamed_or_not(stream: bool) -> None:
    busy = OverloadedError("Too many requests wait.", remedy="Try again.", retry_after=0.02)
    answer = client_of(Scripted(refuse=busy)).post(PATH, json=ASKED | {"stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("1", "20")


def test_an_error_in_mid_stream_is_an_event() -> None:
    service = Scripted(fail=EngineDeadError("The engine died.", remedy="Send it again."))
    answer = client_of(service).post(PATH, json=ASKED | {"stream": True})
    assert json.loads(events_of(answer.text)[-1])["error"]["message"] == "The engine died. Send it again."


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"suffix": 1}, "suffix"),
        ({"random_seed": "x"}, "random_seed"),
        ({"random_seed": 0.5}, "random_seed"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": [[]]}, "stop"),
        ({"stream": 1}, "stream"),
    ],
)
def test_a_wrong_field_is_named(sent: dict[str, Any], param: str) -> None:
    answer = client_of(Scripted()).post(PATH, json=ASKED | sent)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
