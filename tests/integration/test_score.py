"""Likelihoods of a real vLLM engine in float32, told by jobs and by an echo over HTTP, are those of transformers."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import verify
from serving.formats import load_format
from tests.server import Server, running_server

pytestmark = pytest.mark.engine
CONTEXT = 256
FORMAT = load_format("codegen25")
ENCODE = FORMAT.tokenizer.encode
BEGIN = FORMAT.tokenizer.special_id("<|endoftext|>")
AREA = "def area(r):\n    return 3.14 * r * r  # größe π 漢字\n\n\nprint(area(2))\n"
CODE = "".join(f"def f{i}(x, y):\n    return x * {i} + y\n\n\n" for i in range(40))
TRIPLES: list[tuple[str, str | None, str]] = [
    ("def area(r):\n    ", "\n\nprint(area(2))\n", "return 3.14 * r * r"),
    ("def area(r):\n    ", "\n\nprint(area(2))\n", ""),
    ("def area(r):\n    ", None, "return 3.14 * r * r"),
    ("def area(r):\n    ", "", "return 3.14 * r * r\n"),
    ("", None, "import os\n"),
    ("größe = 'ä", "' # 漢字 🙂\n", "öüß — π 漢字 🙂"),
    ("x = ", "\n", "'<mask_1><|endoftext|>'"),
    (CODE, CODE, "    return x - y\n"),
    (CODE, None, "    return x - y\n"),
    (CODE, CODE, CODE[:300]),
]
TEXTS = ["import os\n\n\ndef f():\n    return 1\n", "x", "", "Größe: π, 漢字 und 🙂.\n", "<|endoftext|> is text", CODE]


@pytest.fixture(scope="module")
def model(safe_checkpoint: Path) -> tuple[str, ...]:
    """The options that name the model: with the same ones a job joins the server."""
    options = ("--model", str(safe_checkpoint), "--format", "codegen25", "--dtype", "float32")
    return (*options, "--max-model-len", str(CONTEXT))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: tuple[str, ...]) -> Iterator[Server]:
    """One engine for all jobs here, and for HTTP."""
    with running_server(tmp_path_factory.mktemp("score"), *model) as server:
        yield server


class Scores:
    """``spanfill score`` in an environment."""

    def __init__(self, environment: Mapping[str, str], model: tuple[str, ...], folder: Path) -> None:
        self._environment = environment
        self._model = model
        self._folder = folder
        self.told = ""

    def of(self, table: pa.Table, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The manifest and the rows of a table's scores."""
        source, output = self._folder / "rows.parquet", self._folder / "out"
        pq.write_table(table, source)
        command = [sys.executable, "-m", "jobs.cli", "score", "--input", str(source), "--output", str(output)]
        command += [*self._model, "--batch-rows", "4", "--json", *options]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.told = " ".join(done.stderr.split())
        assert verify(str(output)).problems == []
        rows: list[dict[str, Any]] = pq.read_table(output / "data").to_pylist()
        return json.loads(done.stdout), rows


@pytest.fixture
def scores(server: Server, model: tuple[str, ...], tmp_path: Path) -> Iterator[Scores]:
    """Beside the server."""
    found = Scores(server.job_environment, model, tmp_path)
    yield found
    assert "joined the running application spanfill" in found.told


class Reference:
    """The same checkpoint in transformers."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def logprobs(self, ids: Sequence[int]) -> Any:
        """A row of natural logarithms for each token but the first: those of all tokens that might stand there."""
        import torch

        with torch.no_grad():
            logits = self._model(torch.tensor([list(ids)])).logits[0]
        return logits.double().log_softmax(-1)[:-1]

    def logprob(self, prompt: Sequence[int], scored: Sequence[int]) -> float:
        """The natural logarithm of the likelihood of ``scored`` behind ``prompt``."""
        steps = self.logprobs([*prompt, *scored])[len(prompt) - 1 :]
        return math.fsum(steps[at, token].item() for at, token in enumerate(scored))


@pytest.fixture(scope="module")
def reference(safe_checkpoint: Path) -> Reference:
    """The checkpoint that the engines load."""
    return Reference(safe_checkpoint)


def assert_figures(row: dict[str, Any], text: str, tokens: int, logprob: float) -> None:
    assert row["tokens"] == tokens
    # Thousands of nats are as exact as float32's logits are.
    assert row["sum_logprob"] == pytest.approx(logprob, abs=1e-3, rel=1e-6)
    assert row["mean_logprob"] == (pytest.approx(logprob / tokens, abs=1e-3) if tokens else None)
    size = len(text.encode())
    assert row["bits_per_byte"] == (pytest.approx(-logprob / math.log(2) / size, abs=1e-3) if size else None)


def test_the_end_of_the_infill_is_scored_when_that_is_asked_for(
    model: tuple[str, ...], reference: Reference, tmp_path: Path
) -> None:
    """By an engine of the job's own: the first test here, since the server's engine takes all cores."""
    prefix, suffix, middle = TRIPLES[0]
    table = pa.table({"prefix": [prefix], "suffix": [suffix], "middle": [middle]})
    _, (row,) = Scores(os.environ, model, tmp_path).of(table, "--score-end")
    ids = [*ENCODE(middle), FORMAT.tokenizer.special_id("<eom>")]
    assert_figures(row, middle, len(ids), reference.logprob(FORMAT.prompt(prefix, suffix, max_tokens=1).token_ids, ids))


def test_middles_are_scored_as_transformers_scores_them(scores: Scores, reference: Reference) -> None:
    prefixes, suffixes, middles = zip(*TRIPLES, strict=True)
    table = pa.table({"prefix": prefixes, "suffix": suffixes, "middle": middles})
    manifest, rows = scores.of(table, "--with", "truncated")
    assert [row["truncated"] for row in rows] == [False] * 7 + [True] * 3
    total = 0.0
    for row, (prefix, suffix, middle) in zip(rows, TRIPLES, strict=True):
        ids = ENCODE(middle)
        prompt = FORMAT.prompt(prefix, suffix, max_tokens=len(ids) + 1, max_context=CONTEXT).token_ids
        logprob = reference.logprob(prompt, ids)
        assert_figures(row, middle, len(ids), logprob)
        total += logprob
    size = sum(len(middle.encode()) for middle in middles)
    assert manifest["bits_per_byte"] == pytest.approx(-total / math.log(2) / size, abs=1e-3)
    assert (manifest["rows"], manifest["errors"], manifest["engine"]) == (len(TRIPLES), 0, "vllm")
    assert manifest["cached_tokens"] == 0, "vLLM reads no prefix cache for prompts that are scored"


def test_texts_are_scored_whole_and_long_ones_in_windows(scores: Scores, reference: Reference) -> None:
    manifest, rows = scores.of(pa.table({"text": TEXTS}))
    room = CONTEXT - 2
    assert len(ENCODE(CODE)) > 2 * room
    for row, text in zip(rows, TEXTS, strict=True):
        ids = ENCODE(text)
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
        assert_figures(row, text, len(ids), math.fsum(reference.logprob([BEGIN], piece) for piece in pieces))
    assert manifest["scored_tokens"] == sum(len(ENCODE(text)) for text in TEXTS)


@pytest.mark.parametrize(
    ("asked", "prompt"),
    [
        ({"prompt": [BEGIN, *ENCODE(AREA)]}, [BEGIN, *ENCODE(AREA)]),
        ({"prompt": AREA}, FORMAT.prompt(AREA, None, max_tokens=1).token_ids),
    ],
    ids=["token ids", "text"],
)
def test_logprobs_of_an_echo_are_those_of_transformers(
    server: Server, reference: Reference, asked: dict[str, Any], prompt: Sequence[int]
) -> None:
    body = asked | {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0.7}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    told = answer.json()["choices"][0]["logprobs"]
    steps = reference.logprobs(prompt)
    assert told["token_logprobs"][0] is None
    expected = [steps[at, token].item() for at, token in enumerate(prompt[1:])]
    assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    assert answer.json()["usage"]["completion_tokens"] == 0
    best = [max(top.values()) for top in told["top_logprobs"][1:]]
    assert best == pytest.approx(steps.max(-1).values.tolist(), abs=1e-3)
