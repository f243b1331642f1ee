"""From a contestant's figures and the measured hardware to its share of the roofline, and the table of all. Pure."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from serving.config import RooflineConfig
from serving.roofline import bound_rows_per_second
from serving.shapes import ModelShape

COLUMNS = (
    *("rows/s", "x vllm", "tokens/s", "start-up s", "prompt", "output", "cached", "ideal"),
    *("running", "share", "roofline", "reached", "uncached"),
)
NOTES = (
    "tokens/s: output; prompt, output: mean tokens of a row; cached, ideal: shares of the prompt tokens",
    "running: sequences at once of the most that fit unshared; roofline: rows/s; uncached: as if no cache held a token",
    "the first start fills vLLM's cache of compiled kernels for the others",
)
BASELINE = "vllm"


def roofline_of(hardware: dict[str, Any], shape: ModelShape, engine_args: dict[str, Any]) -> RooflineConfig:
    """The measured device with this model in bfloat16; the KV cache as the engine arguments have it."""
    kv_bytes = 1 if str(engine_args.get("kv_cache_dtype")).startswith("fp8") else 2
    return RooflineConfig(
        flops_per_second=hardware["flops_per_second"],
        bytes_per_second=hardware["bytes_per_second"],
        parameters=shape.parameters,
        weight_bytes=2 * shape.parameters,
        kv_bytes_per_token=kv_bytes * shape.kv_values_per_token,
    )


def line_of(figures: dict[str, Any], roofline: RooflineConfig) -> dict[str, Any]:
    """The figures with how full the engine was and what share of two bounds was reached.

    One bound is that of the tokens which were computed, the other as if no cache had held any.
    """
    if figures.get("failure"):
        return figures
    means = {"prompt_tokens": figures["mean_prompt_tokens"], "output_tokens": figures["mean_output_tokens"]}
    bound = bound_rows_per_second(roofline, cached_share=figures["cached_share"] or 0.0, **means)
    uncached = bound_rows_per_second(roofline, **means)
    rate = figures["rows_per_second"]
    return figures | {
        "running": running_of(figures["extra"].get("engines", {})),
        "roofline": {
            "rows_per_second": round(bound, 3),
            "share": round(rate / bound, 4),
            "uncached_rows_per_second": round(uncached, 3),
            "uncached_share": round(rate / uncached, 4),
        },
    }


def running_of(engines: dict[str, Any]) -> dict[str, Any]:
    """Sequences at once over the busy time, and the most that fit by ``max_num_seqs`` and the KV cache unshared.

    The manifest tells the share alone, of all the time: the most is what it is a share of.
    """
    if not engines.get("occupancy"):
        return {}
    mean, occupancy = engines["mean_running"] * engines["busy_share"], engines["occupancy"]
    return {"mean": round(mean, 1), "most": round(mean / occupancy), "share": occupancy}


def table(report: dict[str, Any]) -> Table:
    """The report for people."""
    found = Table(title=_title(report), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("rows", "contestant"):
        found.add_column(name, no_wrap=True)
    for name in COLUMNS:
        found.add_column(name, justify="right")
    for name, lines in report["inputs"].items():
        base = lines.get(BASELINE, {}).get("rows_per_second")
        for contestant, line in lines.items():
            label = f"{name}: {line.get('rows', 0):,}"
            found.add_row(label, contestant, *(["failed"] if line.get("failure") else _cells(line, base)))
        found.add_section()
    found.caption = escape("\n".join(_remarks(report)))
    return found


def _title(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    return (
        f"{hardware['name']}: {hardware['bytes_per_second'] / 1e9:,.0f} GB/s and "
        f"{hardware['flops_per_second'] / 1e12:,.1f} TFLOP/s in bfloat16 measured; "
        f"{report['model']['parameters'] / 1e6:,.0f} million random weights"
    )


def _cells(line: dict[str, Any], base: float | None) -> list[str]:
    running, roofline = line["running"], line["roofline"]
    cached = line["cached_share"]
    return [
        f"{line['rows_per_second']:.2f}",
        f"{line['rows_per_second'] / base:.2f}" if base else "",
        f"{line['output_tokens_per_second']:,.0f}",
        f"{line['startup_seconds']:.1f}",
        f"{line['mean_prompt_tokens']:,.0f}",
        f"{line['mean_output_tokens']:.1f}",
        "not told" if cached is None else f"{cached:.3f}",
        f"{line['ideal_share']:.3f}",
        f"{running['mean']:.0f} of {running['most']:,}" if running else "not told",
        f"{running['share']:.3f}" if running else "",
        f"{roofline['rows_per_second']:,.2f}",
        f"{roofline['share']:.4f}",
        f"{roofline['uncached_share']:.4f}",
    ]


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    asked = report["setting"]["max_tokens"]
    for name, lines in report["inputs"].items():
        for contestant, line in lines.items():
            if line.get("failure"):
                yield f"{name}, {contestant}: {line['failure']}"
            elif line["mean_output_tokens"] != asked:
                yield f"{name}, {contestant}: rows ended before their {asked} output tokens"
    if report["setting"]["engine_args"].get("quantization"):
        yield "the roofline is that of bfloat16, although the weights are quantized"
    if report["setting"]["engine_args"].get("speculative_config"):
        yield "the roofline is that of a token a step, although tokens are speculated on"
    yield from NOTES
