import json
import re
from typing import Any

import pytest

from serving.api.ask import Ask, Decoding, End, Piece, Reason, Usage
from serving.errors import EngineDeadError, LimitError, ModelNotFoundError
from tests.serving.api.scripted import Scripted, client_of, events_of

ASKED = {"input_prefix": "def f():\n", "input_suffix": "\n", "prompt": "    ret"}

VIM = {
    "id_slot": 0,
    "input_prefix": "def f():\n",
    "input_suffix": "\n",
    "input_extra": [{"text": "import os\n", "time": 12.5, "filename": "a.py"}, {"text": "x = 1\n"}],
    "prompt": "    ret",
    "n_predict": 128,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.90,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1_000,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "tokens_cached", "gone/by"],
    "model": "",
}


def infill(service: Scripted, **sent: Any) -> dict[str, Any]:
    answer = client_of(service).post("/infill", json=ASKED | sent)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def ask_for(**sent: Any) -> Ask:
    service = Scripted()
    infill(service, **sent)
    return service.asked[0]


def test_the_vim_plug_ins_request() -> None:
    service = Scripted()
    answer = client_of(service).post("/infill", json=VIM)
    assert service.asked == [
        Ask(
            prefix="\n\n--- snippet ---\n\nimport os\n\n\n--- snippet ---\n\nx = 1\ndef f():\n",
            suffix="\n",
            behind="    ret",
            max_tokens=128,
            decoding=Decoding(top_k=40, top_p=0.90),
            seconds=1.0,
            indent=4,
            reported=True,
        )
    ]
    assert answer.json() == {
        "content": "a = 1\n",
        "timings/prompt_n": 3,
        "timings/predicted_ms": 500.0,
        "truncated": False,
        "tokens_cached": 4,
    }
    assert service.served == ["demo"]


def test_the_answer_is_one_line_that_the_vim_plug_in_recognises() -> None:
    for sent in (ASKED, VIM):
        body = client_of(Scripted()).post("/infill", json=sent).text
        assert len(body.splitlines()) == 1
        assert re.search(r'"content"\s*:"', body)


@pytest.mark.parametrize("fields", [{}, {"response_fields": [""]}])
def test_the_plug_ins_warm_the_cache_with_empty_texts(fields: dict[str, Any]) -> None:
    service = Scripted(Piece(0, reason="length"), end=End(Usage(7, 0, 4)))
    warming = {"input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "samplers": [], "input_extra": []}
    answer = client_of(service).post("/infill", json=warming | {"t_max_predict_ms": 1} | fields)
    assert answer.status_code == 200
    assert service.asked == [Ask(suffix="", max_tokens=0, seconds=0.001, reported=True)]
    assert answer.json() == {} if fields else answer.json()["content"] == ""


def test_the_whole_answer_has_every_field_that_clients_read() -> None:
    service = Scripted(Piece(0, "a = 1\nb"), Piece(0, reason="stop", stop_word="def"))
    assert infill(service, seed=3, stop=["def"]) == {
        "index": 0,
        "content": "a = 1\nb",
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": "demo",
        "tokens_predicted": 3,
        "tokens_evaluated": 7,
        "generation_settings": {
            "n_predict": 256,
            "seed": 3,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repeat_penalty": 1.0,
            "stop": ["def"],
        },
        "prompt": "<prompt>",
        "has_new_line": True,
        "truncated": False,
        "stop_type": "word",
        "stopping_word": "def",
        "tokens_cached": 4,
        "timings": {
            "cache_n": 4,
            "prompt_n": 3,
            "prompt_ms": 250.0,
            "prompt_per_token_ms": 250.0 / 3,
            "prompt_per_second": 12.0,
            "predicted_n": 3,
            "predicted_ms": 500.0,
            "predicted_per_token_ms": 500.0 / 3,
            "predicted_per_second": 6.0,
        },
    }


@pytest.mark.parametrize(
    ("reason", "stop_type"),
    [("eom", "eos"), ("eos", "eos"), ("stop", "word"), ("length", "limit"), ("time", "limit")],
)
def test_stop_types(reason: Reason, stop_type: str) -> None:
    told = infill(Scripted(Piece(0, "a", reason=reason)))
    assert (told["stop_type"], told["has_new_line"]) == (stop_type, False)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_where_it_leaves_its_block(stream: bool) -> None:
    service = Scripted(Piece(0, "x\n    y"), Piece(0, "\n"), Piece(0, "z\n"), Piece(0, "w", reason="eom"))
    answer = client_of(service).post("/infill", json=ASKED | {"n_indent": 4, "stream": stream})
    told = [json.loads(event) for event in events_of(answer.text)] if stream else [answer.json()]
    assert "".join(each["content"] for each in told) == "x\n    y\n"
    assert (told[-1]["stop_type"], told[-1]["stopping_word"]) == ("limit", "")


@pytest.mark.parametrize(
    ("sent", "tokens"),
    [
        ({}, 256),
        ({"n_predict": None}, 256),
        ({"n_predict": -1}, 256),
        ({"n_predict": -2}, 256),
        ({"n_predict": 5}, 5),
        ({"n_predict": 0}, 0),
        ({"n_predict": 1_000_000}, 1_024),
        ({"n_predict": 2**40}, 1_024),
    ],
)
def test_an_answer_always_has_an_end_that_leaves_room_for_its_prompt(sent: dict[str, Any], tokens: int) -> None:
    assert ask_for(**sent).max_tokens == tokens


@pytest.mark.parametrize(("sent", "seconds"), [({}, None), ({"t_max_predict_ms": 250}, 0.25)])
@pytest.mark.parametrize("other", [{}, {"t_max_prompt_ms": 1}])
def test_a_time_limit(sent: dict[str, Any], seconds: float | None, other: dict[str, Any]) -> None:
    assert ask_for(**sent, **other).seconds == seconds
    assert ask_for(t_max_predict_ms=0).seconds is None
    assert ask_for(t_max_predict_ms=-1).seconds is None


def test_sampling_as_llama_cpp_spells_it() -> None:
    ask = ask_for(temperature=0.2, top_k=-1, min_p=0.05, repeat_penalty=1.2, seed=-1, stop="x", ignore_eos=True)
    assert ask.decoding == Decoding(temperature=0.2, top_k=0, min_p=0.05, repetition_penalty=1.2)
    assert (ask.seed, ask.stop) == (None, ("x",))
    assert ask_for(seed=2**32 - 1).seed is None
    assert ask_for(seed=5).seed == 5


def test_unknown_fields_are_accepted_whatever_they_are() -> None:
    strange = {"lora": [{"id": 0, "scale": 0.5}], "samplers": "edkypmxt", "id_slot": "x", "cache_prompt": 7}
    assert ask_for(**strange, unheard_of={"a": [[]]}) == ask_for()


def test_a_stream_ends_with_all_that_a_whole_answer_has() -> None:
    service = Scripted()
    answer = client_of(service).post("/infill", json=ASKED | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *told, last = [json.loads(event) for event in events_of(answer.text)]
    assert [(each["content"], each["stop"]) for each in told] == [("a = 1\n", False), ("b", False)]
    assert (last["content"], last["stop"], last["has_new_line"], last["stop_type"]) == ("", True, True, "eos")
    assert last.keys() == infill(Scripted()).keys()
    assert service.closed == 1


def test_a_streams_last_event_has_the_fields_that_were_asked_for() -> None:
    asked = ASKED | {"stream": True, "response_fields": ["stop_type", "timings/prompt_n"]}
    *_, last = events_of(client_of(Scripted()).post("/infill", json=asked).text)
    assert json.loads(last).keys() == {"stop_type", "timings/prompt_n"}


def test_a_body_is_json_whatever_its_type_says() -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = client_of(Scripted()).post(
            "/infill", content=json.dumps(ASKED).encode(), headers={"Content-Type": kind}
        )
        assert answer.status_code == 200


@pytest.mark.parametrize("missing", ["input_prefix", "input_suffix"])
def test_both_sides_must_be_sent(missing: str) -> None:
    sent = {key: value for key, value in ASKED.items() if key != missing}
    answer = client_of(Scripted()).post("/infill", json=sent)
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {"code": 400, "message": f"{missing}: field required. Send it.", "type": "invalid_request_error"}
    }


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"prompt": ["a"]}, "prompt"),
        ({"input_suffix": None}, "input_suffix"),
        ({"input_extra": {"text": "a"}}, "input_extra"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ({"input_extra": [{"text": "a"}, 7]}, "input_extra[1]"),
        ({"input_extra": [{"text": "a"}] * 1_025}, "input_extra"),
        ({"n_predict": "many"}, "n_predict"),
        ({"n_predict": 10**30}, "n_predict"),
        ({"n_indent": 1.5}, "n_indent"),
        ({"t_max_predict_ms": "1"}, "t_max_predict_ms"),
        ({"repeat_penalty": -1}, "repeat_penalty"),
        ({"response_fields": "content"}, "response_fields"),
        ({"response_fields": [1]}, "response_fields[0]"),
    ],
)
def test_a_wrong_field_is_named(sent: dict[str, Any], param: str) -> None:
    answer = client_of(Scripted()).post("/infill", json=ASKED | sent)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body", [rb'{"input_prefix": "\ud800", "input_suffix": ""}', b"{", b"", b"[[", b"\xff", b"[" * 100_000]
)
def test_a_hostile_body_is_refused_in_llama_cpps_shape(body: bytes) -> None:
    answer = client_of(Scripted()).post("/infill", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"code", "message", "type"}


def test_a_model_that_cannot_infill_is_501() -> None:
    service = Scripted()
    answer = client_of(service).post("/infill", json=ASKED | {"model": "org/plain"})
    assert answer.status_code == 501
    assert answer.json()["error"]["type"] == "not_supported_error"
    assert "org/plain cannot infill. " in answer.json()["error"]["message"]
    assert not service.asked


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_their_status_and_type(stream: bool) -> None:
    limit = LimitError("The limit is reached.", remedy="Wait.", retry_after=2)
    answer = client_of(Scripted(refuse=limit)).post("/infill", json=ASKED | {"stream": stream})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert answer.headers["retry-after"] == "2"
    gone = ModelNotFoundError("There is no such model.", remedy="Name another.")
    answer = client_of(Scripted(refuse=gone)).post("/infill", json=ASKED | {"stream": stream})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_an_error_in_mid_stream_is_an_event() -> None:
    service = Scripted(fail=EngineDeadError("The engine died.", remedy="Send it again."))
    answer = client_of(service).post("/infill", json=ASKED | {"stream": True})
    assert json.loads(events_of(answer.text)[-1]) == {
        "error": {"code": 503, "message": "The engine died. Send it again.", "type": "unavailable_error"}
    }
