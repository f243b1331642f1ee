"""Held-out results of ``demo-codegen25``: greedy infills of single lines, with and without the suffix.

    python deploy/demo_model/evaluate.py --rows 1000 [--model FOLDER] [--json]

The rows come from modules that training left out (``jobs.heldout``), and are asked in three ways:

- with suffix: prefix and suffix, as an infill;
- without suffix: the prefix as a plain completion, whose first line that is not blank counts. Its prompt ends before
  the line's indentation, which the model writes itself: the encoding joins the last blank with the word behind it, so
  a prompt that ends in that blank asks for what the model never saw;
- empty suffix: the prefix as an infill at the end of the text.

Bits per byte are of the whole true line without its indentation, by transformers in float32, and count the same bytes
with and without suffix: both are told the indentation, and that a character that is not blank follows it.
"""

import argparse
import functools
import json
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from jobs import JobSpec, run_job
from jobs.demo import cut_demo_pairs, parses
from serving.formats import load_format
from serving.models import resolve_model
from serving.tokenizer import VOCAB_SIZE, codegen25

MAX_TOKENS = 64
FIRST_RUN = 50_256
"""From this id on there are control tokens, runs of blanks and ids without a text."""
WAYS = ("with suffix", "without suffix", "empty suffix")

Row = dict[str, Any]


def split_indentation(prefix: str) -> tuple[str, str]:
    """The prefix up to its last line's indentation, and the indentation."""
    before = prefix.rstrip(" \t")
    return before, prefix[len(before) :]


def asked(pair: Row, way: str) -> Row:
    """The row that asks for a pair's middle in a way."""
    if way == "without suffix":
        prefix, suffix = split_indentation(pair["prefix"])[0], None
    else:
        prefix, suffix = pair["prefix"], pair["suffix"] if way == "with suffix" else ""
    return {"prefix": prefix, "suffix": suffix, "after": pair["suffix"], "middle": pair["middle"], "way": way}


def infills(pairs: list[Row], folder: Path, model: str) -> list[Row]:
    """One job over all pairs, asked in all ways; of a plain completion one line is kept."""
    source = folder / "asked.parquet"
    pq.write_table(pa.Table.from_pylist([asked(pair, way) for way in WAYS for pair in pairs]), source)
    run_job(JobSpec(input=str(source), output=str(folder / "out"), model=model, max_tokens=MAX_TOKENS))
    rows: list[Row] = pq.read_table(folder / "out" / "data").to_pylist()
    for row in rows:
        if row["suffix"] is None:
            row["infill"] = next((line for line in row["infill"].split("\n") if line.strip()), "")
    return rows


def shares(rows: list[Row]) -> dict[str, float]:
    """How infills end, how many are exact (blanks around aside), how many whole texts parse."""
    ended = sum(row["finish_reason"] == "eom" for row in rows)
    exact = sum(row["infill"].strip() == row["middle"].strip() for row in rows)
    good = sum(parses(row["prefix"] + row["infill"] + row["after"]) for row in rows)
    return {"eom": ended / len(rows), "exact match": exact / len(rows), "parses": good / len(rows)}


@functools.cache
def openings(lead: bytes) -> torch.Tensor:
    """Which ids begin with ``lead`` and then a character that is not blank."""
    spelled = [codegen25().decode_bytes([i]) if i < FIRST_RUN else b"" for i in range(VOCAB_SIZE)]
    return torch.tensor([text.startswith(lead) and bool(text[len(lead) :][:1].strip()) for text in spelled])


def told_and_counted(indentation: str, line: str) -> tuple[list[int], list[int], bytes]:
    """The ids of an indented line: those told, those counted, the indentation's rest in the first one counted."""
    tokenizer = codegen25()
    ids = tokenizer.encode(indentation + line)
    left, told = indentation.encode(), 0
    while left and len(text := tokenizer.decode_bytes([ids[told]])) <= len(left):
        left, told = left[len(text) :], told + 1
    return ids[:told], ids[told:], left


@torch.no_grad()  # type: ignore[untyped-decorator]
def bits_per_byte(pairs: list[Row], model: str, way: str) -> float:
    """Bits of the true lines, a byte of their UTF-8."""
    known = resolve_model(model)
    fmt = load_format(known.format)
    network = AutoModelForCausalLM.from_pretrained(known.path, dtype=torch.float32)
    # The model is so small that threads wait for each other longer than they work.
    torch.set_num_threads(1)
    bits = size = 0.0
    for pair in pairs:
        row = asked(pair, way)
        indentation = split_indentation(pair["prefix"])[1] if row["suffix"] is None else ""
        told, counted, lead = told_and_counted(indentation, row["middle"])
        room = max(MAX_TOKENS, len(told) + len(counted))
        prompt = fmt.prompt(row["prefix"], row["suffix"], max_tokens=room, max_context=known.context).token_ids
        ids = torch.tensor([[*prompt, *told, *counted]])
        logprobs = network(ids, logits_to_keep=len(counted) + 1).logits[0, :-1].log_softmax(-1)
        bits -= logprobs.gather(1, torch.tensor(counted)[:, None]).sum().item() / math.log(2)
        bits += logprobs[0, openings(lead)].logsumexp(-1).item() / math.log(2)
        size += len(row["middle"].encode())
    return bits / size


def evaluate(rows: int, model: str, seed: int) -> dict[str, dict[str, float]]:
    """All figures, of each way."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.parquet"
        cut_demo_pairs(source, rows=rows, seed=seed)
        pairs = pq.read_table(source).to_pylist()
        with ThreadPoolExecutor(1) as beside:
            bits = {way: beside.submit(bits_per_byte, pairs, model, way) for way in WAYS[:2]}
            found = infills(pairs, Path(folder), model)
            figures: dict[str, dict[str, float]] = {way: {"bits per byte": bits[way].result()} for way in bits}
    for way in WAYS:
        own = [row for row in found if row["way"] == way]
        figures[way] = {"rows": len(own), **shares(own), **figures.get(way, {})}
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
    for way, values in figures.items():
        print(f"{way}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
