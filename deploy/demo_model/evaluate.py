"""Held-out results of ``demo-codegen25``: greedy infills of single lines, with and without the suffix.

    python deploy/demo_model/evaluate.py --rows 1000 [--model FOLDER] [--json]

The rows come from modules that training left out (``jobs.heldout``). Without the suffix the model completes the prefix
and its first line counts. Bits per byte are of the true middle's tokens, by transformers in float32.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from jobs import JobSpec, run_job
from jobs.demo import cut_demo_pairs, parses
from serving.formats import load_format
from serving.models import resolve_model

MAX_TOKENS = 64


def infills(source: Path, output: Path, model: str, *, suffix: bool) -> list[dict[str, Any]]:
    """The job's rows; without ``suffix`` only the first line of each completion is kept."""
    columns = {} if suffix else {"suffix": ""}
    job = JobSpec(input=str(source), output=str(output), model=model, max_tokens=MAX_TOKENS, columns=columns)
    run_job(job)
    rows: list[dict[str, Any]] = pq.read_table(output / "data").to_pylist()
    if not suffix:
        for row in rows:
            row["infill"] = row["infill"].split("\n")[0]
    return rows


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How infills end, how many are exact (blanks around aside), how many whole texts parse."""
    ended = sum(row["finish_reason"] == "eom" for row in rows)
    exact = sum(row["infill"].strip() == row["middle"].strip() for row in rows)
    good = sum(parses(row["prefix"] + row["infill"] + row["suffix"]) for row in rows)
    return {"eom": ended / len(rows), "exact match": exact / len(rows), "parses": good / len(rows)}


@torch.no_grad()  # type: ignore[untyped-decorator]
def bits_per_byte(rows: list[dict[str, Any]], model: str, *, suffix: bool) -> float:
    """Bits of the true middles' tokens, a byte of their UTF-8."""
    known = resolve_model(model)
    fmt = load_format(known.format)
    network = AutoModelForCausalLM.from_pretrained(known.path, dtype=torch.float32)
    bits = size = 0.0
    for row in rows:
        after = row["suffix"] if suffix else None
        prompt = fmt.prompt(row["prefix"], after, max_tokens=MAX_TOKENS, max_context=known.context).token_ids
        middle = fmt.tokenizer.encode(row["middle"])[:MAX_TOKENS]
        logits = network(torch.tensor([prompt + middle]), logits_to_keep=len(middle) + 1).logits[0, :-1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(middle)[:, None])
        bits -= logprobs.sum().item() / math.log(2)
        size += len(fmt.tokenizer.decode(middle).encode())
    return bits / size


def evaluate(rows: int, model: str, seed: int) -> dict[str, dict[str, float]]:
    """All figures, with and without the suffix."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.parquet"
        cut_demo_pairs(source, rows=rows, seed=seed)
        pairs = pq.read_table(source).to_pylist()
        for name, suffix in (("with suffix", True), ("without suffix", False)):
            found = infills(source, Path(folder) / name, model, suffix=suffix)
            figures[name] = {"rows": len(found), **shares(found)}
            figures[name]["bits per byte"] = bits_per_byte(pairs, model, suffix=suffix)
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--model", default="demo-codegen25")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = evaluate(options.rows, options.model, options.seed)
    if options.json:
        print(json.dumps(figures))
        return
    for name, values in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
