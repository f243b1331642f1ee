"""A plan for human eyes."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from jobs.estimate import Line, Plan

SCATTERED = (
    "A sample of stretches under-estimates sharing when the input rows of one source file are scattered over the whole "
    "input: rows that would share a prefix are then not in one stretch."
)
RATIO_ASSUMED = (
    "The finished jobs tell the scale alone; how an output token compares with a prompt token is assumed from a "
    "roofline. Rates predicted from one job missed by 2 to 103 % on two CPU cores: take them for a rough guess. Give "
    "--calibrate two jobs of different shapes (long outputs, short outputs) to measure both."
)
FORMULA = (
    "bound: 1 / (FLOPs / peak + KV bytes / bandwidth), shared prompt tokens computed once (roofline, Williams et al. "
    "2009). steady: the same clock when the batch is full and each step reads the weights."
)
GATHERED = (
    "--order global lets all rows of the input share, a sample shows only what sampled rows share: the share over the "
    "whole sample, which the rates use, is a lower bound."
)
UNORDERED = (
    "With --order input rows are not sorted: how much they share depends on the input. The shares and rates above are "
    "those of --order prefix, an upper bound."
)
NO_FIGURE = "-"


def rendered(plan: Plan) -> Iterator[RenderableType]:
    """What a console prints of a plan, piece by piece."""
    yield from _facts(plan)
    yield _table(plan)
    yield from _notes(plan)


def _facts(plan: Plan) -> Iterator[str]:
    s, load = plan.sample, plan.load
    yield f"input: {s.rows:,} rows, {s.sampled_rows:,} of them sampled in {s.stretches:,} stretches"
    yield (
        f"prompt tokens: mean {s.prompt_tokens_mean:,.0f}, p50 {s.prompt_tokens_p50:,}, p90 {s.prompt_tokens_p90:,}, "
        f"p99 {s.prompt_tokens_p99:,}, most {s.prompt_tokens_max:,}; truncated {s.truncated_share:.1%}, "
        f"error rows {s.error_share:.1%}"
    )
    if s.n > 1:
        yield f"completions: {s.n} a row, of which all but the first share their prompt"
    if s.twin_share:
        yield f"equal prompts: {s.twin_share:.1%} of the rows take another's answer where nothing is sampled"
    yield (
        f"shared by prefix, at best: {s.cached_share:.1%} of the prompt tokens inside units of "
        f"{plan.spec.unit_rows:,} rows, {s.cached_share_all:.1%} over the whole sample (blocks of {s.block_size})"
    )
    stops = f", and a stop token of {load.stop_share:.0%} of them" if load.stop_share else ""
    each = "completion" if s.n > 1 else "row"
    yield f"output tokens: {load.output_tokens:,.1f} a {each} ({plan.output_tokens_from}){stops}"
    yield f"model: {plan.spec.model}, {plan.shape.parameters / 1e9:,.3g} billion parameters"


def _table(plan: Plan) -> Table:
    size = plan.spec.tensor_parallel_size
    each = f", {size} GPUs each" if size > 1 else ""
    predicted = f"predicted = {plan.wish.fraction:g} of bound, steady at most"
    title = f"rows/s of one GPU; {plan.spec.replicas:,} replica(s){each}; {predicted}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("GPU", overflow="fold", min_width=6)
    shown.add_column("", no_wrap=True)
    for name in ("batch", "bound", "steady", "predicted", "hours", "GPU-h", "cost"):
        shown.add_column(name, justify="right", no_wrap=True)
    for line in (*plan.lines, *([plan.calibrated] if plan.calibrated else [])):
        shown.add_row(line.gpu, line.precision, *(_figures(line) if line.fits else ["-", "does not fit"]))
    return shown


def _figures(line: Line) -> list[str]:
    rates = (line.bound_rows_per_second, line.steady_rows_per_second, line.predicted_rows_per_second)
    hours = (line.hours, line.gpu_hours)
    return [
        NO_FIGURE if line.batch is None else f"{line.batch:,}",
        *(NO_FIGURE if rate is None else f"{rate:,.{_decimals(rate)}f}" for rate in rates),
        *(NO_FIGURE if figure is None else _hours(figure) for figure in hours),
        NO_FIGURE if line.cost is None else f"${line.cost:,.2f}",
    ]


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours:.3f}" if hours >= 0.001 else "<0.001"
    return f"{hours:,.{_decimals(hours)}f}"


def _decimals(figure: float) -> int:
    return 0 if figure >= 1_000 else 1 if figure >= 100 else 2


def _notes(plan: Plan) -> Iterator[str]:
    yield FORMULA
    if plan.sample.sampled_rows < plan.sample.rows:
        yield GATHERED if plan.spec.order == "global" else SCATTERED
    if plan.spec.order == "input":
        yield UNORDERED
    if plan.calibration:
        yield (
            f"calibrated: {plan.calibration.prompt_seconds * 1e3:.3g} ms a computed prompt token, "
            f"{plan.calibration.output_seconds * 1e3:.3g} ms an output token of one replica"
        )
        if plan.calibration.ratio_assumed:
            yield RATIO_ASSUMED
    for why in dict.fromkeys(line.why for line in plan.lines if line.why):
        yield f"does not fit: {why}"
