import importlib.metadata
import json
from datetime import datetime
from typing import Any

import pytest

from serving.api.ask import Ask, Decoding, Piece
from serving.errors import EngineDeadError, LimitError
from tests.serving.api.scripted import Scripted, client_of

ASKED = {"model": "demo", "prompt": "def f", "suffix": "\n"}
DEFAULT = Decoding(temperature=0.8, top_k=40, top_p=0.9)


def generate(service: Scripted, **sent: Any) -> dict[str, Any]:
    answer = client_of(service).post("/api/generate", json=ASKED | {"stream": False} | sent)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def ask_for(**sent: Any) -> Ask:
    service = Scripted()
    generate(service, **sent)
    return service.asked[0]


def lines_of(service: Scripted, **sent: Any) -> list[dict[str, Any]]:
    answer = client_of(service).post("/api/generate", json=ASKED | sent)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("}\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_an_infill_is_answered_in_ollamas_shape() -> None:
    told = generate(Scripted())
    assert told.pop("created_at").endswith("Z")
    assert told == {
        "model": "demo",
        "response": "a = 1\nb",
        "done": True,
        "done_reason": "stop",
        "total_duration": 750_000_000,
        "load_duration": 0,
        "prompt_eval_count": 7,
        "prompt_eval_duration": 250_000_000,
        "eval_count": 3,
        "eval_duration": 500_000_000,
    }


def test_it_streams_unless_told_not_to() -> None:
    service = Scripted(Piece(0, "a\u2028"), Piece(0), Piece(0, "b"), Piece(0, reason="length"))
    for sent in ({}, {"stream": True}, {"stream": None}):
        *parts, last = lines_of(service, **sent)
        assert [(part["response"], part["done"]) for part in parts] == [("a\u2028", False), ("b", False)]
        assert all(part.keys() == {"model", "created_at", "response", "done"} for part in parts)
        assert (last["response"], last["done"], last["done_reason"]) == ("", True, "length")
        assert last.keys() == generate(Scripted()).keys()
    assert service.closed == 3


def test_what_is_asked_without_options_is_decoded_as_ollama_would() -> None:
    assert ask_for() == Ask(prefix="def f", suffix="\n", max_tokens=256, decoding=DEFAULT)


def test_options_that_count_and_fields_that_do_not() -> None:
    options = {
        "num_predict": 100,
        "temperature": 0.01,
        "top_p": 0.5,
        "top_k": 20,
        "min_p": 0.1,
        "seed": 42,
        "stop": ["\n", "user:"],
        "repeat_penalty": 1.2,
        "presence_penalty": 1.5,
        "frequency_penalty": 1.0,
        "num_ctx": 1_024,
        "mirostat": 1,
        "penalize_newline": True,
        "num_gpu": "all",
    }
    ask = ask_for(options=options, raw=True, keep_alive="5m", system="x", template="y", images=[], context=[1])
    assert ask == Ask(
        prefix="def f",
        suffix="\n",
        max_tokens=100,
        seed=42,
        stop=("\n", "user:"),
        decoding=Decoding(
            temperature=0.01,
            top_p=0.5,
            top_k=20,
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=1.5,
            frequency_penalty=1.0,
        ),
    )


@pytest.mark.parametrize(("wanted", "tokens"), [(-1, 256), (-2, 256), (0, 256), (None, 256), (7, 7), (9_999, 1_024)])
def test_an_answer_always_has_an_end(wanted: int | None, tokens: int) -> None:
    assert ask_for(options={"num_predict": wanted}).max_tokens == tokens


@pytest.mark.parametrize("seed", [-1, None, 2**32 - 1])
def test_no_seed(seed: int | None) -> None:
    assert ask_for(options={"seed": seed}).seed is None


@pytest.mark.parametrize("suffix", [None, "", "x"])
def test_a_null_suffix_is_a_causal_completion_and_an_empty_one_an_infill(suffix: str | None) -> None:
    assert ask_for(suffix=suffix).suffix == suffix


def test_a_suffix_alone_is_infilled() -> None:
    assert ask_for(prompt=None).prefix == ""


@pytest.mark.parametrize("sent", [{"prompt": "", "suffix": ""}, {"prompt": None, "suffix": None}])
def test_without_a_text_a_model_is_told_to_be_loaded(sent: dict[str, Any]) -> None:
    service = Scripted()
    answer = client_of(service).post("/api/generate", json=ASKED | {"keep_alive": 0} | sent)
    told = answer.json()
    assert told.pop("created_at")
    assert told == {"model": "demo", "response": "", "done": True, "done_reason": "load"}
    assert not service.asked


def test_a_name_may_have_ollamas_tag() -> None:
    service = Scripted()
    assert generate(service, model="demo:latest")["model"] == "demo:latest"
    assert service.served == ["demo"]
    shown = client_of(service).post("/api/show", json={"model": "demo:latest"})
    assert shown.status_code == 200


def test_curls_form_is_json() -> None:
    answer = client_of(Scripted()).post(
        "/api/generate",
        content=json.dumps(ASKED).encode(),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert answer.status_code == 200


def test_tags_list_the_models_that_a_key_may_use() -> None:
    client = client_of(Scripted())
    tags = client.get("/api/tags").json()["models"]
    assert [(tag["name"], tag["model"]) for tag in tags] == [("demo", "demo"), ("org/plain", "org/plain")]
    assert tags[0]["modified_at"] == "2023-11-14T22:13:20Z"
    assert tags[0]["details"]["family"] == "codegen25"
    assert len(tags[0]["digest"]) == 64
    narrow = client.get("/api/tags", headers={"Authorization": "Bearer narrow"}).json()["models"]
    assert [tag["name"] for tag in narrow] == ["demo"]


@pytest.mark.parametrize("sent", [{"model": "demo"}, {"name": "demo", "verbose": True}])
def test_a_model_is_shown(sent: dict[str, Any]) -> None:
    told = client_of(Scripted()).post("/api/show", json=sent).json()
    assert (told["license"], told["notice"]) == ("Apache-2.0", "A toy.")
    assert ".Suffix" in told["template"], "Continue looks for it"
    assert told["parameters"] == "num_ctx 2048"
    assert told["model_info"] == {"general.architecture": "codegen25", "codegen25.context_length": 2_048}
    assert told["capabilities"] == ["completion", "insert"]


def test_a_model_that_cannot_infill_does_not_say_so() -> None:
    told = client_of(Scripted()).post("/api/show", json={"model": "org/plain"}).json()
    assert ".Suffix" not in told["template"]
    assert told["capabilities"] == ["completion"]


def test_the_version_is_spanfills() -> None:
    assert client_of(Scripted()).get("/api/version").json() == {"version": importlib.metadata.version("spanfill")}


def test_times_are_rfc_3339() -> None:
    assert datetime.fromisoformat(generate(Scripted())["created_at"]).utcoffset() is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_its_status_streamed_or_not(stream: bool) -> None:
    limit = LimitError("The limit is reached.", remedy="Wait.", retry_after=2)
    answer = client_of(Scripted(refuse=limit)).post("/api/generate", json=ASKED | {"stream": stream})
    assert (answer.status_code, answer.json()) == (429, {"error": "The limit is reached. Wait."})
    assert answer.headers["retry-after"] == "2"


def test_an_error_in_mid_stream_is_a_line() -> None:
    service = Scripted(fail=EngineDeadError("The engine died.", remedy="Send it again."))
    assert lines_of(service)[-1] == {"error": "The engine died. Send it again."}


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"model": None}, "model"),
        ({"prompt": 5}, "prompt"),
        ({"stream": "no"}, "stream"),
        ({"options": []}, "options"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"temperature": 2.1}}, "options.temperature"),
        ({"options": {"stop": [1]}}, "options.stop"),
        ({"options": {"num_predict": 0.5}}, "options.num_predict"),
        ({"options": {"repeat_penalty": "x"}}, "options.repeat_penalty"),
    ],
)
def test_a_wrong_field_is_named_in_ollamas_shape(sent: dict[str, Any], param: str) -> None:
    answer = client_of(Scripted()).post("/api/generate", json=ASKED | sent)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{param}: ")


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"\xff", rb'{"model": "demo", "prompt": "\ud800"}'])
def test_a_hostile_body_is_refused(body: bytes) -> None:
    answer = client_of(Scripted()).post("/api/generate", content=body)
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


def test_a_model_that_is_not_served_is_404() -> None:
    client = client_of(Scripted())
    for path in ("/api/generate", "/api/show"):
        answer = client.post(path, json=ASKED | {"model": "gone"})
        assert answer.status_code == 404
        assert answer.json()["error"].startswith("The model is not served here.")
