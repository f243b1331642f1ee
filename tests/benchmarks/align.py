"""What ``--prefix-align`` is worth: prefix sharing and speed against quality, on the demo model's held-out modules.

    spanfill bench align [--spans 20 100] [--align 1 64 256 512] [--rows 520] [--json FILE] [--plot FILE.svg]

Rows are single lines of the held-out modules of 8,000 characters or more, so that most prompts are cut; at each
alignment the same rows go through ``run_job`` on the real engine. Quality: exact matches and ``<eom>`` of greedy
infills, and bits per byte of the true line by transformers in float32, given the very prompts. Differences of bits
are taken row by row against alignment 1 and stand with their standard error.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from jobs import JobSpec, run_job
from jobs.heldout import HELD_OUT
from jobs.pairs import draw_spans, standard_library
from serving.formats import load_format
from serving.models import resolve_model

MODEL = "demo-codegen25"
MAX_TOKENS = 48
FEWEST_CHARS = 8_000
COLUMNS = ("rows/s", "ideal", "reached", "prompt tokens", "exact match", "eom", "bits/byte", "against 1")


def cut_rows(spans: int, most: int) -> list[dict[str, str]]:
    """Up to ``spans`` lines of each long held-out module, shuffled."""
    draw = random.Random(spans)
    rows = []
    for name in sorted(HELD_OUT):
        text = (standard_library() / name).read_text(encoding="utf-8")
        if len(text) >= FEWEST_CHARS:
            for start, stop, _ in draw_spans(text, "python", "line", spans, draw):
                rows.append({"prefix": text[:start], "middle": text[start:stop], "suffix": text[stop:]})
    draw.shuffle(rows)
    return rows[:most]


def bits(rows: list[dict[str, str]], align: int) -> list[tuple[float, int]]:
    """Of each row the bits of its true line and ``<eom>`` is left out, and the line's bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    known, fmt = resolve_model(MODEL), load_format("codegen25")
    network = AutoModelForCausalLM.from_pretrained(known.path, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for row in rows:
            middle = fmt.tokenizer.encode(row["middle"])
            room = {"max_tokens": max(MAX_TOKENS, len(middle)), "max_context": known.context}
            prompt = fmt.prompt(row["prefix"], row["suffix"], prefix_align=align, **room).token_ids
            logits = network(torch.tensor([[*prompt, *middle]]), logits_to_keep=len(middle) + 1).logits[0, :-1]
            told = logits.log_softmax(-1).gather(1, torch.tensor(middle)[:, None]).sum().item()
            found.append((-told / math.log(2), len(row["middle"].encode())))
    return found


def measure(rows: list[dict[str, str]], align: int) -> dict[str, Any]:
    """One line of the table, and each row's bits."""
    with tempfile.TemporaryDirectory(prefix="spanfill-align-") as folder:
        source, output = Path(folder, "rows.parquet"), Path(folder, "out")
        pq.write_table(pa.Table.from_pylist(rows), source)
        spec = JobSpec(input=str(source), output=str(output), model=MODEL, max_tokens=MAX_TOKENS, prefix_align=align)
        manifest = run_job(spec)
        table = pq.read_table(output / "data").to_pylist()
    exact = sum(row["infill"].strip() == row["middle"].strip() for row in table)
    own = bits(rows, align)
    return {
        "align": align,
        "rows": len(rows),
        "rows/s": manifest["rows_per_second"],
        "ideal": manifest["ideal_hit_share"],
        "reached": manifest["prefix_cache_hit_share"],
        "prompt tokens": manifest["prompt_tokens"] / manifest["rows"],
        "truncated": manifest["truncated"] / manifest["rows"],
        "exact match": exact / len(table),
        "eom": manifest["finish_reasons"].get("eom", 0) / manifest["rows"],
        "bits/byte": sum(b for b, _ in own) / sum(size for _, size in own),
        "bits": [b for b, _ in own],
        "bytes": [size for _, size in own],
    }


def against(line: dict[str, Any], first: dict[str, Any]) -> tuple[float, float]:
    """How many bits per byte more than at the first alignment, and the standard error of that."""
    differences = [b - a for a, b in zip(first["bits"], line["bits"], strict=True)]
    size = statistics.mean(first["bytes"])
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.mean(differences) / size, error / size


def plot(tables: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Ideal and reached share, and bits per byte with its error, over the alignment."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for spans, lines in tables.items():
        names = [str(line["align"]) for line in lines]
        left.plot(names, [line["ideal"] for line in lines], "--", label=f"{spans} spans a file, ideal")
        left.plot(names, [line["reached"] for line in lines], label=f"{spans} spans a file, reached")
        gaps = [against(line, lines[0]) for line in lines]
        right.errorbar(names, [g for g, _ in gaps], [e for _, e in gaps], capsize=3, label=f"{spans} spans a file")
    left.set(xlabel="prefix_align", ylabel="cached share of prompt tokens")
    right.set(xlabel="prefix_align", ylabel="bits per byte more than at 1")
    for axes in (left, right):
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def shown(spans: int, lines: list[dict[str, Any]]) -> Table:
    """One table for people."""
    table = Table("align", *COLUMNS, title=f"{spans} spans a file, {lines[0]['rows']} rows")
    for line in lines:
        gap, error = against(line, lines[0])
        values = [f"{line[name]:.3f}" for name in ("ideal", "reached")]
        rest = [f"{line['prompt tokens']:.0f}", f"{line['exact match']:.3f}", f"{line['eom']:.3f}"]
        told = f"{gap:+.4f} ± {error:.4f}"
        table.add_row(str(line["align"]), f"{line['rows/s']:.1f}", *values, *rest, f"{line['bits/byte']:.3f}", told)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--align", type=int, nargs="+", default=[1, 64, 256, 512])
    parser.add_argument("--rows", type=int, default=520)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    tables = {}
    for spans in asked.spans:
        rows = cut_rows(spans, asked.rows)
        tables[spans] = [measure(rows, align) for align in asked.align]
        Console().print(shown(spans, tables[spans]))
    if asked.json:
        kept = {s: [{k: v for k, v in x.items() if k not in ("bits", "bytes")} for x in t] for s, t in tables.items()}
        asked.json.write_text(json.dumps({"command": sys.argv, "tables": kept}, indent=1))
    if asked.plot:
        plot(tables, asked.plot)


if __name__ == "__main__":
    main()
