"""An echo's logprobs over HTTP (``echo``, ``logprobs``, ``max_tokens`` 0) are those of transformers in float32."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.formats import load_format
from tests.server import Server, running_server

pytestmark = pytest.mark.engine
FORMAT = load_format("codegen25")
ENCODE = FORMAT.tokenizer.encode
BEGIN = FORMAT.tokenizer.special_id("<|endoftext|>")
CODE = "def area(r):\n    return 3.14 * r * r  # größe π 漢字\n\n\nprint(area(2))\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, safe_checkpoint: Path) -> Iterator[Server]:
    """One on the small checkpoint in float32."""
    arguments = ("--model", str(safe_checkpoint), "--format", "codegen25", "--dtype", "float32")
    with running_server(tmp_path_factory.mktemp("echo"), *arguments, "--max-model-len", "256") as server:
        yield server


def expected(checkpoint: Path, prompt: Sequence[int]) -> tuple[list[float], list[float]]:
    """Of each token but the first its natural logarithm, and that of the likeliest token there."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        steps = model(torch.tensor([list(prompt)])).logits[0].double().log_softmax(-1)[:-1]
    return [steps[at, token].item() for at, token in enumerate(prompt[1:])], steps.max(-1).values.tolist()


@pytest.mark.parametrize(
    ("asked", "prompt"),
    [
        ({"prompt": [BEGIN, *ENCODE(CODE)]}, [BEGIN, *ENCODE(CODE)]),
        ({"prompt": CODE}, FORMAT.prompt(CODE, None, max_tokens=1).token_ids),
    ],
    ids=["token ids", "text"],
)
def test_logprobs_of_an_echo_are_those_of_transformers(
    server: Server, safe_checkpoint: Path, asked: dict[str, Any], prompt: Sequence[int]
) -> None:
    body = asked | {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0.7}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    told = answer.json()["choices"][0]["logprobs"]
    logprobs, likeliest = expected(safe_checkpoint, prompt)
    assert told["token_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(logprobs, abs=1e-3)
    assert answer.json()["usage"]["completion_tokens"] == 0
    best = [max(top.values()) for top in told["top_logprobs"][1:]]
    assert best == pytest.approx(likeliest, abs=1e-3)
