"""Real clients against a real server: Ray Serve, its HTTP proxy, two gateways, the demo model on vLLM."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mistralai.client import Mistral
from mistralai.client.errors import SDKError
from openai import APIError, AuthenticationError, BadRequestError, NotFoundError

from tests.api import INFILL, MODEL, PREFIX, SUFFIX, Api

pytestmark = pytest.mark.engine
LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": PREFIX.partition("\n")[0] + "\n",
    "input_suffix": SUFFIX,
    "input_extra": [],
    "prompt": PREFIX.partition("\n")[2],
    "n_predict": 24,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 60_000,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_ms", "tokens_cached", "truncated", "nothing"],
}
"""What the plug-in sends at a cursor behind ``PREFIX``, with more patience."""

WARMS = LLAMA_VIM | {
    "input_prefix": "",
    "input_suffix": "",
    "prompt": "",
    "n_predict": 0,
    "samplers": [],
    "input_extra": [{"text": "x = 1\n" * 40, "time": [1, 2], "filename": "a.py"}],
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}


BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""``vllm bench serve`` without ``vllm``: vLLM's CPU package has another name, so that command does not find itself."""


def curl(api: Api, path: str, body: dict[str, Any], *options: str) -> str:
    """What curl prints, called as llama.vim calls it."""
    command = ["curl", "--silent", "--no-buffer", "--request", "POST", "--url", f"{api.url}{path}", "--data", "@-"]
    command += ["--header", f"Authorization: Bearer {api.acme}", *options]
    return subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True).stdout


def test_openais_package_infills(api: Api, expected: str) -> None:
    done = api.openai().completions.create(**INFILL)
    assert done.choices[0].text == expected
    assert done.usage is not None
    assert done.usage.prompt_tokens > 20
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_openais_package_streams(api: Api, expected: str) -> None:
    asked = INFILL | {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(api.openai().completions.create(**asked))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] in ("stop", "length")
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_openais_package_samples_stops_and_asks_by_lists(api: Api) -> None:
    done = api.openai().completions.create(model=MODEL, prompt=["a = ", "b = "], n=2, max_tokens=4, seed=7)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    ids = api.openai().completions.create(model=MODEL, prompt=[600, 751, 7], max_tokens=3, temperature=0)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    whole = api.openai().completions.create(model=MODEL, prompt="import ", max_tokens=12, temperature=0).choices[0]
    word = whole.text[2:4]
    cut = api.openai().completions.create(model=MODEL, prompt="import ", max_tokens=12, temperature=0, stop=word)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole.text.partition(word)[0], "stop")


def test_openais_package_lists_models(api: Api) -> None:
    (model,) = api.openai().models.list().data
    assert model.id == MODEL
    assert model.model_extra is not None
    assert model.model_extra["context_length"] == 1_024
    assert model.model_extra["licence"].startswith("Apache-2.0")


def test_openais_package_scores(api: Api) -> None:
    text = "x = 1\ny = 2\n"
    done = api.openai().completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=1)
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert done.choices[0].text == text
    assert done.usage is not None
    assert len(logprobs.token_logprobs) == done.usage.prompt_tokens
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


def test_openais_package_knows_the_errors(api: Api) -> None:
    with pytest.raises(AuthenticationError, match="key"):
        api.openai("sf_wrong").completions.create(model=MODEL, prompt="x", max_tokens=1)
    with pytest.raises(NotFoundError, match="There is: demo-codegen25"):
        api.openai().completions.create(model="gpt-5", prompt="x", max_tokens=1)
    with pytest.raises(BadRequestError, match="max_tokens"):
        api.openai().completions.create(model=MODEL, prompt="x", max_tokens=100_000)
    with pytest.raises(APIError, match="larger than"):
        api.openai().completions.create(model=MODEL, prompt="x" * (5 << 20), max_tokens=1)


def test_mistrals_package_infills_and_streams(api: Api, expected: str) -> None:
    with Mistral(api_key=api.acme, server_url=api.url) as client:
        done = client.fim.complete(**INFILL)
        assert done.choices[0].message is not None
        assert done.choices[0].message.content == expected
        events = list(client.fim.stream(**INFILL))
    assert all(event.data.choices for event in events)  # Continue breaks on a chunk without one.
    assert "".join(str(event.data.choices[0].delta.content or "") for event in events) == expected
    assert events[-1].data.choices[0].finish_reason in ("stop", "length")
    with Mistral(api_key="sf_wrong", server_url=api.url) as stranger, pytest.raises(SDKError, match="401"):
        stranger.fim.complete(**INFILL)


def test_litellm_completes_and_streams(api: Api, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # Else its import asks the network.
    import litellm

    asked = INFILL | {"model": f"text-completion-openai/{MODEL}", "api_base": f"{api.url}/v1", "api_key": api.acme}
    assert litellm.text_completion(**asked).choices[0].text == expected
    chunks = litellm.text_completion(**asked, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == expected


def test_curl_infills_as_llama_vim_does(api: Api) -> None:
    told = curl(api, "/infill", LLAMA_VIM, "--header", "Content-Type: application/json")
    assert '"content":' in told
    assert "\n" not in told
    answer = json.loads(told)
    assert set(answer) == {"content", "timings/prompt_n", "timings/predicted_ms", "tokens_cached", "truncated"}
    assert (type(answer["content"]), answer["truncated"]) == (str, False)
    assert json.loads(curl(api, "/infill", WARMS)) == {}


def test_curl_streams_an_infill(api: Api) -> None:
    asked = {key: value for key, value in LLAMA_VIM.items() if key != "response_fields"} | {"stream": True}
    events = [line.removeprefix("data: ") for line in curl(api, "/infill", asked).splitlines() if line]
    parts = [json.loads(event) for event in events]
    whole = json.loads(curl(api, "/infill", LLAMA_VIM))
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]


def test_an_ollama_client_gets_lines(api: Api, expected: str) -> None:
    options = {"temperature": 0, "num_predict": 24}
    told = curl(api, "/api/generate", {"model": MODEL, "prompt": PREFIX, "suffix": SUFFIX, "options": options})
    lines = [json.loads(line) for line in told.splitlines()]
    assert "".join(line["response"] for line in lines) == expected
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["eval_count"] > 0


def test_vllms_benchmark_loads_it(api: Api, tmp_path: Path) -> None:
    """Its tokenizer is not used: no published class loads this one."""
    prompts = [{"prompt": f"def f{number}(x):\n    return "} for number in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    command = [sys.executable, "-c", BENCH_SERVE, "--backend", "openai"]
    command += ["--base-url", api.url, "--model", MODEL, "--header", f"Authorization=Bearer {api.acme}"]
    command += ["--dataset-name", "custom", "--dataset-path", str(tmp_path / "prompts.jsonl"), "--skip-tokenizer-init"]
    command += ["--num-prompts", "24", "--max-concurrency", "12", "--temperature", "0", "--disable-tqdm"]
    command += ["--extra-body", json.dumps({"max_tokens": 8, "ignore_eos": True, "suffix": SUFFIX})]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (24, 0, 24 * 8)
