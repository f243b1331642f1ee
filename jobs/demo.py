"""``spanfill demo``: real pairs from the standard library through the main job, with a table of what came out."""

import ast
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.heldout import held_out
from jobs.pairs import STANDARD_LIBRARY_EXCLUDES, PairsSpec, cut_pairs, standard_library
from jobs.show import infill_rows


def cut_demo_pairs(output: Path, *, rows: int, seed: int) -> int:
    """Cut single-line pairs from the modules that the demo model has not seen; returns how many."""
    spec = PairsSpec(
        sources=(str(standard_library()),),
        output=str(output),
        mode="line",
        limit=rows,
        seed=seed,
        exclude=STANDARD_LIBRARY_EXCLUDES,
    )
    return cut_pairs(spec, keep=held_out).pairs


def judge(output: str) -> tuple[int, int, int]:
    """Rows, exact matches with the true middle (blanks around aside), and rows whose whole text still parses."""
    rows = exact = good = 0
    for values in infill_rows(output, limit=1 << 60):
        rows += 1
        exact += values["infill"].strip() == values["middle"].strip()
        good += parses(values["prefix"] + values["infill"] + values["suffix"])
    return rows, exact, good


def parses(text: str) -> bool:
    """Whether a text is a Python module."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def table(manifest: dict[str, Any], output: str) -> Table:
    """The demo's result."""
    rows, exact, good = judge(output)
    shown = Table(title=f"{manifest['model']} on {manifest['engine']}", show_header=False)
    shown.add_row("rows", f"{manifest['rows']:,}")
    shown.add_row("failures", f"{manifest['errors']:,}")
    shown.add_row("rows/s", f"{manifest['rows_per_second']:,.1f}")
    shown.add_row("output tokens/s", f"{manifest['output_tokens_per_second']:,.0f}")
    shown.add_row("prefix-cache hit share", f"{manifest['prefix_cache_hit_share']:.1%}")
    shown.add_row("exact matches", f"{exact / rows:.1%}" if rows else "-")
    shown.add_row("files that parse", f"{good / rows:.1%}" if rows else "-")
    return shown
