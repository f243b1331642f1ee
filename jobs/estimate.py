"""``spanfill plan``: what a job would take on GPUs it has not been given yet, from a sample of its input."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.calibration import Calibration, calibrate, observe, stop_share
from jobs.ledger import read_manifest
from jobs.sample import Sample, read_sample
from jobs.spec import JobSpec
from jobs.store import locate
from serving.config import RooflineConfig
from serving.errors import ConfigError, ModelError, OutputError
from serving.gpus import GPUS, PRECISIONS, Gpu, Precision, find_gpu, replica_roofline
from serving.models import model_shape, resolve_model
from serving.roofline import bound_rows_per_second
from serving.shapes import ModelShape
from serving.steady import Load, batch_size, steady_rows_per_second

DEFAULT_FRACTION = 0.6
"""Of the bound that is expected: an assumption, until a job has run on such a GPU."""

DEFAULT_SAMPLE = 2_000


@dataclass(frozen=True)
class Wish:
    """What is asked beside the job itself: GPUs, precisions, dollars a GPU-hour by GPU, the fraction to expect.

    ``output_tokens`` is the mean of a row without its stop token, as a job counts them.
    """

    gpus: Sequence[Gpu] = tuple(GPUS.values())
    precisions: Sequence[Precision] = PRECISIONS
    prices: Mapping[str, float] | None = None
    fraction: float = DEFAULT_FRACTION
    max_num_seqs: int | None = None
    sample: int = DEFAULT_SAMPLE
    output_tokens: float | None = None
    like: str | None = None
    calibrate: Sequence[str] = ()


@dataclass(frozen=True)
class Line:
    """One GPU at one precision, or machine that jobs were calibrated on (``gpu`` names them then).

    Rates are rows/s of one GPU, or of one replica of a calibrated machine, a row with all its completions; ``bound`` is
    the roofline's, ``steady`` that of a full batch on it, ``predicted`` the fraction of ``bound`` that is expected,
    ``steady`` at most. Hours are of all rows on all replicas, ``cost`` is in dollars. What does not fit has no figures
    but ``why``.
    """

    gpu: str
    precision: str
    fits: bool
    why: str = ""
    batch: int | None = None
    bound_rows_per_second: float | None = None
    steady_rows_per_second: float | None = None
    predicted_rows_per_second: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Plan:
    """A job's plan: the sample, what a completion weighs, and a line for each GPU and calibrated machine."""

    spec: JobSpec
    wish: Wish
    sample: Sample
    load: Load
    output_tokens_from: str
    shape: ModelShape
    lines: tuple[Line, ...]
    calibration: Calibration | None
    calibrated: Line | None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        costs = asdict(self.calibration) if self.calibration else None
        return {
            "model": self.spec.model,
            "parameters": self.shape.parameters,
            **asdict(self.sample),
            "order": self.spec.order,
            "output_tokens": self.load.output_tokens,
            "output_tokens_from": self.output_tokens_from,
            "stop_share": self.load.stop_share,
            "fraction": self.wish.fraction,
            "replicas": self.spec.replicas,
            "tensor_parallel_size": self.spec.tensor_parallel_size,
            "gpus": [asdict(line) for line in self.lines],
            "calibration": costs,
            "calibrated": asdict(self.calibrated) if self.calibrated else None,
        }


def plan_job(spec: JobSpec, wish: Wish) -> Plan:
    """Plan a job from a sample of its input; no engine is started, nothing fetched or written.

    Rates come from ``serving.roofline`` and ``serving.steady``. Raises a ``UsageError`` for a model, input, finished
    job or option that cannot be used.
    """
    _check(wish)
    model = resolve_model(spec.model, format=spec.format, revision=spec.revision, weights=False)
    shape, context = model_shape(model), spec.max_model_len or model.context
    if shape.heads % spec.tensor_parallel_size:
        raise ConfigError(
            f"--tensor-parallel-size {spec.tensor_parallel_size} does not divide the model's {shape.heads} heads.",
            remedy="Choose a divisor of them.",
        )
    observed = [observe(folder) for folder in wish.calibrate]
    for job in observed:
        if job.manifest["model"] != spec.model:
            raise ConfigError(
                f"{job.name} ran {job.manifest['model']}, not {spec.model}.",
                remedy="Calibrate with jobs of the model that is planned.",
            )
    calibration = calibrate(observed, shape) if observed else None
    output_tokens, stops, source = _output_tokens(spec, wish)
    sample = read_sample(spec, sample=wish.sample)
    load = Load(
        sample.prompt_tokens_mean,
        output_tokens,
        cached_share=_cached_share(spec, sample, on_cpu=False),
        varied=output_tokens < spec.max_tokens,
        stop_share=min(stops, spec.max_tokens - output_tokens),
        n=sample.n,
        shared_share=sample.shared_share,
    )
    task = _Task(spec, sample, load, shape, context)
    lines = [_gpu_line(task, wish, gpu, precision) for gpu in wish.gpus for precision in wish.precisions]
    calibrated = _calibrated_line(spec, sample, load, calibration) if calibration else None
    return Plan(spec, wish, sample, load, source, shape, tuple(lines), calibration, calibrated)


def _check(wish: Wish) -> None:
    if not 0 < wish.fraction <= 1:
        raise ConfigError(f"--fraction {wish.fraction:g} is no share.", remedy="Give more than 0, 1 at most.")
    if wish.output_tokens is not None and wish.like is not None:
        raise ConfigError("--output-tokens and --like exclude each other.", remedy="Give one of them.")


def _cached_share(spec: JobSpec, sample: Sample, *, on_cpu: bool) -> float:
    """The share that the job's order lets rows have: of their unit's rows or, gathered, of all."""
    if spec.order == "global":
        return sample.cached_share_all_cpu if on_cpu else sample.cached_share_all
    return sample.cached_share_cpu if on_cpu else sample.cached_share


def _output_tokens(spec: JobSpec, wish: Wish) -> tuple[float, float, str]:
    """The mean output tokens of a row to expect, the share of rows with a stop token behind them, and who says so."""
    if wish.like is not None:
        manifest = read_manifest(locate(wish.like))
        if manifest is None:
            raise OutputError(f"{wish.like} is no finished job.", remedy="Give --like the output folder of one.")
        if manifest["engine"] == "instant" or not manifest["finish_reasons"]:
            raise ConfigError(f"{wish.like} has no infills of a model.", remedy="Give --like a job that has some.")
        mean = manifest["completion_tokens"] / manifest["rows"]
        return min(float(spec.max_tokens), mean), stop_share(manifest), wish.like
    if wish.output_tokens is None:
        return float(spec.max_tokens), 0.0, "max_tokens, the worst case"
    if not 1 <= wish.output_tokens <= spec.max_tokens:
        raise ConfigError(
            f"--output-tokens {wish.output_tokens:g} is not from 1 to --max-tokens {spec.max_tokens}.",
            remedy="Give the mean that you expect.",
        )
    return wish.output_tokens, 1.0, "--output-tokens"


@dataclass(frozen=True)
class _Task:
    """What there is to do, whatever does it."""

    spec: JobSpec
    sample: Sample
    load: Load
    shape: ModelShape
    context: int


def _gpu_line(task: _Task, wish: Wish, gpu: Gpu, precision: Precision) -> Line:
    spec, sample, load, size = task.spec, task.sample, task.load, task.spec.tensor_parallel_size
    try:
        roofline = replica_roofline(
            gpu, task.shape, precision,
            tensor_parallel_size=size,
            max_model_len=task.context,
            max_num_seqs=wish.max_num_seqs,
        )  # fmt: skip
    except ModelError as error:
        return Line(gpu.name, precision, fits=False, why=error.message)
    bound, steady = _bound(roofline, load), steady_rows_per_second(roofline, load)
    predicted, parts = min(wish.fraction * bound, steady), size * sample.n
    line = Line(
        gpu.name,
        precision,
        fits=True,
        batch=batch_size(roofline, load),
        bound_rows_per_second=bound / parts,
        steady_rows_per_second=steady / parts,
        predicted_rows_per_second=predicted / parts,
    )
    price = (wish.prices or {}).get(gpu.name)
    return _with_hours(line, sample, rate=predicted * spec.replicas, gpus=spec.replicas * size, price=price)


def _bound(roofline: RooflineConfig, load: Load) -> float:
    return bound_rows_per_second(
        roofline,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.steps,
        cached_share=load.cached_share,
    )


def _calibrated_line(spec: JobSpec, sample: Sample, load: Load, calibration: Calibration) -> Line:
    """What this machine would do, by its own jobs: a measured rate, of which no fraction is taken."""
    computed = replace(load, cached_share=_cached_share(spec, sample, on_cpu=calibration.on_cpu)).computed
    rate = calibration.rows_per_second(computed_tokens=computed, output_tokens=load.steps)
    line = Line(" + ".join(calibration.names), "as run", fits=True, predicted_rows_per_second=rate / sample.n)
    return _with_hours(line, sample, rate=rate * spec.replicas, gpus=spec.replicas * spec.tensor_parallel_size)


def _with_hours(line: Line, sample: Sample, *, rate: float, gpus: int, price: float | None = None) -> Line:
    """With the time at ``rate`` completions a second."""
    hours = sample.completions / rate / 3600
    cost = None if price is None else hours * gpus * price
    return replace(line, hours=hours, gpu_hours=hours * gpus, cost=cost)


def parse_prices(texts: Sequence[str], gpus: Sequence[Gpu]) -> dict[str, float] | None:
    """Dollars a GPU-hour by GPU, from ``PRICE`` (for all) and ``NAME=PRICE`` texts; raises ``ConfigError``."""
    if not texts:
        return None
    named = {find_gpu(name).name: _price(text) for name, _, text in (t.rpartition("=") for t in texts) if name}
    if unused := sorted(named.keys() - {gpu.name for gpu in gpus}):
        raise ConfigError(f"--price {unused[0]} is of a GPU that is not shown.", remedy=f"Add --gpu {unused[0]}.")
    common = [_price(text) for text in texts if "=" not in text]
    if len(common) > 1:
        raise ConfigError("--price is given twice for all GPUs.", remedy="Write --price NAME=PRICE for each GPU.")
    return {gpu.name: price for gpu in gpus for price in common} | named


def _price(text: str) -> float:
    try:
        price = float(text.removeprefix("$"))
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise ConfigError(
            f"--price {text} is no price.", remedy="Write dollars a GPU-hour, for instance --price 2.5 or H100=2.5."
        )
    return price
