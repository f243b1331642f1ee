import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from serving.api.ask import Ask, Decoding, Piece, Reason, Token
from serving.api.logprobs import Logprobs, logprobs_of
from serving.errors import EngineDeadError, LimitError, UsageError
from tests.serving.api.scripted import Scripted, client_of, events_of

ASKED = {"model": "demo", "prompt": "def f"}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}
LIMIT = LimitError("The limit is reached.", remedy="Wait a little.", retry_after=1.25)


def complete(service: Scripted, **sent: Any) -> dict[str, Any]:
    answer = client_of(service).post("/v1/completions", json=ASKED | sent)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def chunks_of(service: Scripted, **sent: Any) -> list[dict[str, Any]]:
    answer = client_of(service).post("/v1/completions", json=ASKED | {"stream": True} | sent)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(answer.text)
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("path", ["/v1/completions", "/beta/completions"])
def test_an_infill_is_answered_in_openais_shape(path: str) -> None:
    service = Scripted()
    answer = client_of(service).post(path, json=ASKED | {"suffix": "\n"})
    told = answer.json()
    assert told.pop("id").startswith("cmpl-")
    assert told.pop("created") > 1_700_000_000
    assert told == {
        "object": "text_completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "text": "a = 1\nb",
                "logprobs": None,
                "finish_reason": "stop",
                "spanfill_reason": "eom",
            }
        ],
        "usage": USAGE,
    }
    assert service.asked == [Ask(prefix="def f", suffix="\n", max_tokens=16, decoding=Decoding(temperature=1.0))]
    assert (service.callers[0].key, service.served) == ("ada", ["demo"])


@pytest.mark.parametrize(
    ("sent", "suffix"), [({}, None), ({"suffix": None}, None), ({"suffix": ""}, ""), ({"suffix": "x"}, "x")]
)
def test_a_null_suffix_is_a_causal_completion_and_an_empty_one_an_infill(
    sent: dict[str, Any], suffix: str | None
) -> None:
    service = Scripted()
    complete(service, **sent)
    assert service.asked[0].suffix == suffix


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("a", [("a", None)]),
        (None, [("", None)]),
        (["a", ""], [("a", None), ("", None)]),
        ([1, 2], [("", (1, 2))]),
        ([[1, 2], [3]], [("", (1, 2)), ("", (3,))]),
    ],
)
def test_every_kind_of_prompt(prompt: Any, asked: list[Any]) -> None:
    service = Scripted()
    complete(service, prompt=prompt)
    assert [(ask.prefix, ask.token_ids) for ask in service.asked] == asked


def test_every_field_that_counts_and_those_that_do_not() -> None:
    service = Scripted()
    complete(
        service,
        max_tokens=8,
        n=2,
        best_of=2,
        seed=-42,
        stop="x",
        logprobs=3,
        echo=True,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        min_tokens=3,
        ignore_eos=True,
        logit_bias={"5": -100, "7": 2.5},
        user="ada",
        cache_salt="another tenant's",
        priority=-5,
        guided_json={"deep": [[{}]]},
    )
    assert service.asked == [
        Ask(
            prefix="def f",
            max_tokens=8,
            n=2,
            seed=-42,
            stop=("x",),
            logprobs=3,
            echo=True,
            decoding=Decoding(
                temperature=0.5,
                top_p=0.9,
                top_k=5,
                min_p=0.1,
                presence_penalty=1,
                frequency_penalty=-1,
                repetition_penalty=1.1,
                min_tokens=3,
                ignore_eos=True,
                logit_bias=((5, -100), (7, 2.5)),
            ),
        )
    ]


def test_null_is_as_good_as_absent() -> None:
    service = Scripted()
    fields = ("suffix", "max_tokens", "n", "best_of", "stop", "temperature", "top_p", "top_k", "logprobs", "echo")
    complete(
        service, **dict.fromkeys((*fields, "stream", "stream_options", "logit_bias", "seed", "min_tokens", "model"))
    )
    complete(service)
    assert service.asked[0] == service.asked[1]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"top_p": 0}, Decoding(temperature=0.0, top_p=1.0)),
        ({"top_k": -1}, Decoding(temperature=1.0, top_k=0)),
        ({"temperature": 0}, Decoding(temperature=0.0)),
        ({"min_tokens": 99}, Decoding(temperature=1.0, min_tokens=16)),
    ],
)
def test_what_decoding_makes_of_the_edges(sent: dict[str, Any], expected: Decoding) -> None:
    service = Scripted()
    complete(service, **sent)
    assert service.asked[0].decoding == expected


def test_a_whole_number_may_be_written_with_a_point_and_an_empty_stop_ends_nothing() -> None:
    service = Scripted()
    complete(service, max_tokens=8.0, stop=["", "y"])
    assert (service.asked[0].max_tokens, service.asked[0].stop) == (8, ("y",))


def test_scoring_asks_for_no_token_and_the_prompts_logprobs() -> None:
    service = Scripted(Piece(0, "def f", (Token(1, "def"), Token(2, " f", 3, -0.5)), "length"))
    told = complete(service, max_tokens=0, echo=True, logprobs=0)
    assert (service.asked[0].max_tokens, service.asked[0].echo, service.asked[0].logprobs) == (0, True, 0)
    assert told["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]


TOKENS = (
    Token(1, "a"),
    Token(2, " b", 1, -0.5, ((" b", -0.5), (" c", -1.5))),
    Token(3, "\ufffd", 3, -math.inf, (("\ufffd", -0.1), ("\ufffd", -math.inf))),
)
LOGPROBS = {
    "tokens": ["a", " b", "\ufffd"],
    "token_logprobs": [None, -0.5, -9_999.0],
    "top_logprobs": [None, {" b": -0.5, " c": -1.5}, {"\ufffd": -0.1}],
    "text_offset": [0, 1, 3],
}


def test_logprobs_have_the_legacy_shape_whole_and_streamed() -> None:
    service = Scripted(Piece(0, "a b\ufffd", TOKENS, "length"))
    assert complete(service, logprobs=2)["choices"][0]["logprobs"] == LOGPROBS
    assert chunks_of(service, logprobs=2)[0]["choices"][0]["logprobs"] == LOGPROBS
    assert complete(service)["choices"][0]["logprobs"] is None


def test_an_answer_with_logprobs_is_encoded_beside_the_loop_and_is_otherwise_as_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def beside_the_loop(tokens: Sequence[Token]) -> Logprobs:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return logprobs_of(tokens)

    monkeypatch.setattr("serving.api.openai.logprobs_of", beside_the_loop)
    odd = 'é\u2028"choices":[]'
    service = Scripted(Piece(0, "a b\ufffd", TOKENS, "length"), Piece(1, odd, (Token(4, odd, 0, -0.25),), "eom"))
    answer = client_of(service).post("/v1/completions", json=ASKED | {"logprobs": 2})
    told, plain = answer.json(), complete(service)
    assert answer.headers["content-type"] == "application/json"
    assert [choice.pop("logprobs") for choice in told["choices"]] == [
        LOGPROBS,
        {"tokens": [odd], "token_logprobs": [-0.25], "top_logprobs": [None], "text_offset": [0]},
    ]
    assert [choice.pop("logprobs") for choice in plain["choices"]] == [None, None]
    assert told | {"id": "", "created": 0} == plain | {"id": "", "created": 0}
    assert list(told) == list(plain)


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("eom", "stop"), ("eos", "stop"), ("stop", "stop"), ("length", "length"), ("time", "length")],
)
def test_the_finer_reason_stands_beside_openais(reason: Reason, finish: str) -> None:
    service = Scripted(Piece(0, "a", reason=reason))
    choice = complete(service)["choices"][0]
    assert (choice["finish_reason"], choice["spanfill_reason"]) == (finish, reason)


def test_choices_keep_their_numbers() -> None:
    service = Scripted(Piece(1, "b", reason="eos"), Piece(0, "a"), Piece(0, reason="length"))
    told = complete(service, n=2)
    assert [(choice["index"], choice["text"]) for choice in told["choices"]] == [(0, "a"), (1, "b")]
    streamed = [chunk["choices"][0] for chunk in chunks_of(service, n=2)]
    assert [(each["index"], each["text"], each["finish_reason"]) for each in streamed] == [
        (1, "b", "stop"),
        (0, "a", None),
        (0, "", "length"),
    ]


def test_a_stream_ends_with_its_reason_and_has_no_chunk_without_a_choice() -> None:
    service = Scripted(Piece(0, "a"), Piece(0), Piece(0, "b"), Piece(0, reason="eom"))
    chunks = chunks_of(service)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert chunks[-1]["choices"][0]["spanfill_reason"] == "eom"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)
    assert service.closed == 1


def test_the_usage_comes_last_where_it_is_asked_for() -> None:
    *chunks, last = chunks_of(Scripted(), stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]
    assert (last["choices"], last["usage"]) == ([], USAGE)


def test_no_character_of_an_answer_can_break_a_stream_into_lines() -> None:
    service = Scripted(Piece(0, "\u2028\x85é\r\n\n"), Piece(0, reason="eom"))
    answer = client_of(service).post("/v1/completions", json=ASKED | {"stream": True})
    assert answer.text.isascii()
    assert json.loads(events_of(answer.text)[0])["choices"][0]["text"] == "\u2028\x85é\r\n\n"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_its_status_streamed_or_not(stream: bool) -> None:
    answer = client_of(Scripted(refuse=LIMIT)).post("/v1/completions", json=ASKED | {"stream": stream})
    assert answer.status_code == 429
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1250")
    assert answer.json() == {
        "error": {
            "message": "The limit is reached. Wait a little.",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }
    }


def test_what_the_engine_cannot_do_is_the_callers_error() -> None:
    refused = UsageError("The prompt is too long.", remedy="Send less of it.")
    answer = client_of(Scripted(refuse=refused)).post("/v1/completions", json=ASKED)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert answer.json()["error"]["message"] == "The prompt is too long. Send less of it."


def test_an_error_in_mid_stream_is_an_event_and_nothing_says_that_all_is_done() -> None:
    service = Scripted(fail=EngineDeadError("The engine died.", remedy="Send it again."))
    answer = client_of(service).post("/v1/completions", json=ASKED | {"stream": True})
    *_, last = events_of(answer.text)
    assert json.loads(last)["error"] == {
        "message": "The engine died. Send it again.",
        "type": "server_error",
        "param": None,
        "code": "engine_dead",
    }
    assert "[DONE]" not in answer.text
    assert service.closed == 1


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": {}}}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": {"a": {"b": []}}}, "prompt"),
        ({"suffix": 5}, "suffix"),
        ({"suffix": ["a"]}, "suffix"),
        ({"prompt": [1], "suffix": ""}, "suffix"),
        ({"prompt": [[1]], "suffix": "a"}, "suffix"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"model": 3}, "model"),
        ({"model": "x" * 257}, "model"),
    ],
)
def test_a_wrong_field_is_named_with_what_to_do(sent: dict[str, Any], param: str) -> None:
    service = Scripted()
    answer = client_of(service).post("/v1/completions", json=ASKED | sent)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"], error["code"]) == (param, "invalid_request_error", "bad_field")
    assert error["message"].startswith(f"{param}: ")
    assert " should " in error["message"]
    assert error["message"].endswith("Correct it, or leave it out where it is optional.")
    assert not service.asked


def test_a_field_that_is_missing_is_named() -> None:
    error = client_of(Scripted()).post("/v1/completions", json={"model": "demo"}).json()["error"]
    assert (error["param"], error["message"]) == ("prompt", "prompt: field required. Send it.")


def test_several_wrong_fields_are_told_at_once() -> None:
    sent = ASKED | {"n": 0, "echo": 1, "seed": "a", "top_p": 2, "stop": 1}
    message = client_of(Scripted()).post("/v1/completions", json=sent).json()["error"]["message"]
    assert message.count(": input should ") == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"prompt": "a", "temperature": NaN}', "temperature"),
        (rb'{"prompt": "a", "temperature": -Infinity}', "temperature"),
        (rb'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (rb'{"prompt": "a", "n": 1e999}', "n"),
        (rb'{"prompt": "\ud800"}', "prompt"),
        (rb'{"prompt": ["a", "\udfffb"]}', "prompt"),
        (rb'{"prompt": "a", "suffix": "\ud800x"}', "suffix"),
        (rb'{"prompt": "a", "stop": "\ud800"}', "stop"),
        (rb'{"prompt": "a", "model": "\ud800"}', "model"),
        (rb'{"prompt": "a", "logit_bias": {"\ud800": 1}}', "logit_bias"),
        (b'"text"', None),
        (b"[]", None),
        (b"7", None),
        (b"null", None),
        (b"", None),
        (b'{"prompt": "a"', None),
        (b"\xff\xfe\x00", None),
        (b'{"prompt": "\xff"}', None),
        (b"[" * 100_000, None),
        (b'{"prompt": "a", "n": ' + b"1" * 5_000 + b"}", None),
    ],
)
def test_a_hostile_body_is_refused(body: bytes, param: str | None) -> None:
    service = Scripted()
    answer = client_of(service).post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not service.asked


def test_whole_pairs_of_surrogates_are_characters_and_what_is_ignored_may_be_anything() -> None:
    service = Scripted()
    nested = b"[" * 100 + b"]" * 100
    body = rb'{"prompt": "\ud83d\ude00", "\ud800": "\udfff", "x": ' + nested + b"}"
    answer = client_of(service).post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert service.asked[0].prefix == "\U0001f600"


def test_a_body_of_another_type_is_told_which_it_should_be() -> None:
    answer = client_of(Scripted()).post(
        "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_models_have_a_licence_and_a_context() -> None:
    client = client_of(Scripted())
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["demo", "org/plain"]
    assert listed["data"][0] == client.get("/v1/models/demo").json()
    assert listed["data"][0] == {
        "id": "demo",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "spanfill",
        "max_model_len": 2_048,
        "context_length": 2_048,
        "format": "codegen25",
        "infill": True,
        "licence": "Apache-2.0",
        "notice": "A toy.",
    }


def test_a_models_name_may_hold_a_slash() -> None:
    client = client_of(Scripted())
    assert client.get("/v1/models/org/plain").json()["id"] == "org/plain"
    assert client.get("/v1/models/org%2Fplain").json()["id"] == "org/plain"


def test_a_key_sees_its_own_models_alone() -> None:
    client = client_of(Scripted())
    narrow = {"Authorization": "Bearer narrow"}
    assert [model["id"] for model in client.get("/v1/models", headers=narrow).json()["data"]] == ["demo"]
    refused = [
        client.get("/v1/models/org/plain", headers=narrow),
        client.get("/v1/models/gone"),
        client.post("/v1/completions", headers=narrow, json=ASKED | {"model": "org/plain"}),
    ]
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_without_a_valid_key_nothing_is_told() -> None:
    client = client_of(Scripted())
    unknown = {"Authorization": "Bearer nobody"}
    refused = [
        client.get("/v1/models", headers=unknown),
        client.get("/v1/models/demo", headers=unknown),
        client.post("/v1/completions", headers=unknown, json=ASKED | {"n": 0}),
    ]
    for answer in refused:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
