"""Likelihoods of a real vLLM engine in float32 are those of transformers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.verify import verify
from serving.formats import load_format

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]
CONTEXT = 256
FORMAT = load_format("codegen25")
ENCODE = FORMAT.tokenizer.encode
BEGIN = FORMAT.tokenizer.special_id("<|endoftext|>")
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


def score(source: Path, output: Path, checkpoint: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    values: dict[str, Any] = {"input": str(source), "output": str(output), "model": str(checkpoint)}
    values |= {"task": "score"} | {"dtype": "float32", "max_model_len": CONTEXT, "batch_rows": 4}
    manifest = run_job(JobSpec.parse(values | options))
    assert verify(str(output)).problems == []
    rows: list[dict[str, Any]] = pq.read_table(output / "data").to_pylist()
    return manifest, rows


class Reference:
    """The same checkpoint in transformers."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def logprob(self, prompt: Sequence[int], scored: Sequence[int]) -> float:
        """The natural logarithm of the likelihood of ``scored`` behind ``prompt``."""
        import torch

        with torch.no_grad():
            logits = self._model(torch.tensor([[*prompt, *scored]])).logits[0]
        steps = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
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


def test_middles_are_scored_as_transformers_scores_them(
    tmp_path: Path, safe_checkpoint: Path, reference: Reference
) -> None:
    prefixes, suffixes, middles = zip(*TRIPLES, strict=True)
    source = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prefix": prefixes, "suffix": suffixes, "middle": middles}), source)
    manifest, rows = score(source, tmp_path / "out", safe_checkpoint, extra_columns=["truncated"])
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


def test_the_end_of_the_infill_is_scored_when_that_is_asked_for(
    tmp_path: Path, safe_checkpoint: Path, reference: Reference
) -> None:
    prefix, suffix, middle = TRIPLES[0]
    source = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prefix": [prefix], "suffix": [suffix], "middle": [middle]}), source)
    _, (row,) = score(source, tmp_path / "out", safe_checkpoint, score_end=True)
    ids = [*ENCODE(middle), FORMAT.tokenizer.special_id("<eom>")]
    assert_figures(row, middle, len(ids), reference.logprob(FORMAT.prompt(prefix, suffix, max_tokens=1).token_ids, ids))


def test_texts_are_scored_whole_and_long_ones_in_windows(
    tmp_path: Path, safe_checkpoint: Path, reference: Reference
) -> None:
    source = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": TEXTS}), source)
    manifest, rows = score(source, tmp_path / "out", safe_checkpoint)
    room = CONTEXT - 2
    assert len(ENCODE(CODE)) > 2 * room
    for row, text in zip(rows, TEXTS, strict=True):
        ids = ENCODE(text)
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
        assert_figures(row, text, len(ids), math.fsum(reference.logprob([BEGIN], piece) for piece in pieces))
    assert manifest["scored_tokens"] == sum(len(ENCODE(text)) for text in TEXTS)
