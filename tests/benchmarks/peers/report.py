"""From rounds to medians, ratios, a table and a plot."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

BASELINE = "vllm"
MEDIANS = (
    "startup_seconds",
    "busy_seconds",
    "rows_per_second",
    "output_tokens_per_second",
    "mean_prompt_tokens",
    "mean_output_tokens",
    "cached_tokens",
    "cached_share",
    "ideal_share",
)

PARTS = (
    ("alignment", "vllm-aligned", "vllm"),
    ("order", "vllm-sorted", "vllm-aligned"),
    ("everything else", "spanfill", "vllm-sorted"),
    ("all", "spanfill", "vllm"),
    ("same prompts", "spanfill-1", "vllm"),
    ("beside Ray Data LLM", "spanfill", "raydata"),
)
"""What a part is worth: the rate of the second over that of the third."""


def summarise(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians with the lowest and highest rate of each contestant, and what alignment and order are worth."""
    results = {name: _summary(figures) for name, figures in rounds.items() if figures}
    medians = {name: found["median"] for name, found in results.items() if found["median"]}
    ratios = {
        part: {"of": of, "to": to} | _ratio(medians[of], medians[to])
        for part, of, to in PARTS
        if of in medians and to in medians
    }
    return {"results": results, "ratios": ratios}


def _ratio(of: dict[str, Any], to: dict[str, Any]) -> dict[str, Any]:
    """How many times the rate, beside how many prompt tokens a row either worked on."""
    tokens = {"of": of["mean_prompt_tokens"], "to": to["mean_prompt_tokens"]}
    return {"rows_per_second": round(of["rows_per_second"] / to["rows_per_second"], 3), "mean_prompt_tokens": tokens}


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    good = [figures for figures in rounds if not figures.get("failure")]
    failures = dict.fromkeys(figures["failure"] for figures in rounds if figures.get("failure"))
    told = {"counted": len(good), "failure": "; ".join(failures), "rounds": rounds}
    if not good:
        return {"median": {}} | told
    rates = [figures["rows_per_second"] for figures in good]
    median = {key: _median([figures[key] for figures in good]) for key in MEDIANS}
    spread = {"lowest": min(rates), "highest": max(rates)}
    return {"median": median, "rows_per_second": spread, "note": good[-1]["note"]} | told


def _median(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return round(statistics.median(told), 4) if told else None


def table(report: dict[str, Any]) -> Table:
    """The report for people; notes, failures and the machine's load stand in the caption."""
    shown = Table(title=f"{report['input']}: {report['rows']:,} rows, medians of {report['rounds']} rounds")
    for name in ("contestant", "rows/s", "lowest-highest", "x vllm", "busy s", "start-up s", "output tokens/s"):
        shown.add_column(name, justify="left" if name == "contestant" else "right")
    for name in ("prompt tokens", "cached", "ideal", "of ideal"):
        shown.add_column(name, justify="right")
    results = report["results"]
    base = results.get(BASELINE, {}).get("median", {}).get("rows_per_second")
    for name, found in results.items():
        shown.add_row(name, *(_cells(found, base) if found["median"] else ["failed"]))
    shown.caption = escape("\n".join(_remarks(results)))
    return shown


def _remarks(results: dict[str, Any]) -> Iterator[str]:
    for name, found in results.items():
        counted, rounds = found["counted"], len(found["rounds"])
        medians = f"medians of {counted} of {rounds} rounds" if 0 < counted < rounds else ""
        if said := "; ".join(filter(None, (medians, found["failure"], found.get("note")))):
            yield f"{name}: {said}"
    loads = [figures["load_before"][0] for found in results.values() for figures in found["rounds"]]
    yield f"highest load average before an attempt: {max(loads):.2f}"


def ratio_lines(report: dict[str, Any]) -> Iterator[str]:
    """What each part is worth, a line each."""
    for part, ratio in report["ratios"].items():
        tokens = ratio["mean_prompt_tokens"]
        yield (
            f"{part}: {ratio['of']} / {ratio['to']} = {ratio['rows_per_second']:.2f}"
            f" (mean prompt tokens {tokens['of']:,.0f} / {tokens['to']:,.0f})"
        )


def _cells(found: dict[str, Any], base: float | None) -> list[str]:
    median, spread = found["median"], found["rows_per_second"]
    cached, ideal = median["cached_share"], median["ideal_share"]
    return [
        f"{median['rows_per_second']:.2f}",
        f"{spread['lowest']:.2f}-{spread['highest']:.2f}",
        f"{median['rows_per_second'] / base:.2f}" if base else "",
        f"{median['busy_seconds']:.1f}",
        f"{median['startup_seconds']:.1f}",
        f"{median['output_tokens_per_second']:.1f}",
        f"{median['mean_prompt_tokens']:.0f}",
        "not told" if cached is None else f"{cached:.3f}",
        f"{ideal:.3f}",
        f"{cached / ideal:.2f}" if cached is not None and ideal else "",
    ]


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the median rates with whiskers from the lowest to the highest round."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    results = {name: found for name, found in report["results"].items() if found["median"]}
    rates = [found["median"]["rows_per_second"] for found in results.values()]
    low = [rate - found["rows_per_second"]["lowest"] for rate, found in zip(rates, results.values(), strict=True)]
    high = [found["rows_per_second"]["highest"] - rate for rate, found in zip(rates, results.values(), strict=True)]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(results) + 1.5), layout="constrained")
    bars = axes.barh(list(results), rates, xerr=[low, high], capsize=4, color=[_colour(name) for name in results])
    axes.bar_label(bars, fmt="%.2f", padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("rows/s over the busy time (median, lowest and highest round)")
    axes.set_title(f"{report['input']}, {report['rows']:,} rows, {report['setting']['dtype']}")
    figure.savefig(path)
    pyplot.close(figure)


def _colour(name: str) -> str:
    return "#1b6ca8" if name.startswith("spanfill") else "#9aa5b1"
