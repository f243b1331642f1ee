"""What finished jobs tell of this machine: seconds a computed prompt token, seconds an output token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.ledger import read_job, read_manifest
from jobs.store import locate
from serving.config import RooflineConfig
from serving.engine_args import CPU_DEFAULTS
from serving.errors import ConfigError, OutputError
from serving.gpus import GPUS, Gpu, replica_roofline
from serving.roofline import step_seconds
from serving.shapes import ModelShape

CPU = Gpu("CPU", 5e11, None, 20e9, 1e13)
"""Two cores of a server with AMX, where vLLM took 0.2 ms a prompt token of a model of 50 million parameters; the
bandwidth to the order of magnitude. Only the ratio of the figures is used."""

SOME_GPU = replace(GPUS["H100"], memory_bytes=1e13)
"""As vast, since what has run has fitted."""

CPU_STEP_SECONDS = 0.005
"""What a step costs vLLM's CPU build beside the model: scheduling, copying, sampling."""


STOP_REASONS = ("eom", "eos")
"""Finish reasons of rows that a stop token ended."""


@dataclass(frozen=True)
class Observed:
    """A finished job's means a row, stop tokens among its output, and the seconds that one replica took for one.

    A manifest tells the rate of its last run and the tokens of all runs: rows are taken to weigh the same in each.
    """

    name: str
    prompt_tokens: float
    computed_tokens: float
    output_tokens: float
    seconds: float
    replicas: float
    manifest: dict[str, Any]
    engine_args: dict[str, Any]

    @property
    def on_cpu(self) -> bool:
        """Whether vLLM's build for CPUs ran it."""
        return bool(self.manifest["engine"] == "vllm" and self.manifest["versions"].get("torch", "").endswith("+cpu"))


@dataclass(frozen=True)
class Calibration:
    """Seconds a row of one replica = ``prompt_seconds`` * computed prompt tokens + ``output_seconds`` * output tokens.

    Stop tokens are output tokens: an engine takes a step for them too.
    ``ratio_assumed`` says that the jobs told only the scale, and a roofline the ratio of the two. ``on_cpu`` tells
    which block size the prefix cache has.
    """

    names: tuple[str, ...]
    prompt_seconds: float
    output_seconds: float
    ratio_assumed: bool
    on_cpu: bool = False

    def rows_per_second(self, *, computed_tokens: float, output_tokens: float, replicas: int = 1) -> float:
        """Rows a second of ``replicas`` replicas like those of the jobs."""
        return replicas / (self.prompt_seconds * computed_tokens + self.output_seconds * output_tokens)


def observe(folder: str) -> Observed:
    """What a finished job's folder tells; raises ``OutputError`` or ``ConfigError`` when it tells no speed."""
    output = locate(folder)
    job, manifest = read_job(output), read_manifest(output)
    if manifest is None:
        raise OutputError(f"{folder} is a job that is not finished.", remedy="Run it to its end first.")
    rate, samples, rows = manifest["rows_per_second"], manifest["rows"], manifest["tally"]["rows"]
    generated = samples * (1 - manifest["tally"].get("twins", 0) / max(1, rows))
    replicas = manifest.get("engines", {}).get("replicas", 0)
    if manifest["engine"] == "instant" or not rate or not samples or not replicas:
        raise ConfigError(f"{folder} tells no speed of an engine.", remedy="Calibrate with a job that ran one.")
    return Observed(
        name=folder,
        prompt_tokens=manifest["prompt_tokens"] / samples,
        computed_tokens=(manifest["prompt_tokens"] - manifest["cached_tokens"]) / generated,
        output_tokens=manifest["completion_tokens"] / samples + stop_share(manifest),
        seconds=replicas / (rate * generated / rows),
        replicas=replicas,
        manifest=manifest,
        engine_args=job["spec"]["engine_args"],
    )


def stop_share(manifest: dict[str, Any]) -> float:
    """The share of a finished job's rows that ended by a stop token, which their completion tokens leave out."""
    reasons: dict[str, int] = manifest["finish_reasons"]
    rows: int = manifest["rows"]
    return sum(reasons.get(reason, 0) for reason in STOP_REASONS) / rows


def calibrate(jobs: Sequence[Observed], shape: ModelShape) -> Calibration:
    """Fit the two costs to finished jobs of one model.

    Two jobs or more: least squares of relative errors, neither cost below 0. One job: it fixes the scale alone, and
    the ratio of the costs is that of a decoding step to a prompt token in ``roofline_of``. Raises ``ConfigError`` when
    the jobs' models or engines differ.
    """
    for job in jobs[1:]:
        for key in ("model", "engine"):
            if job.manifest[key] != jobs[0].manifest[key]:
                raise ConfigError(
                    f"{job.name} and {jobs[0].name} differ in their {key}: "
                    f"{job.manifest[key]} and {jobs[0].manifest[key]}.",
                    remedy="Calibrate with jobs of one model and engine.",
                )
    names = tuple(job.name for job in jobs)
    fitted = _fit([(j.computed_tokens / j.seconds, j.output_tokens / j.seconds) for j in jobs]) if jobs[1:] else None
    if fitted is not None:
        return Calibration(names, *fitted, ratio_assumed=False, on_cpu=jobs[0].on_cpu)
    ratio = sum(_ratio(job, shape) for job in jobs) / len(jobs)
    scale = sum(job.seconds / (job.computed_tokens + ratio * job.output_tokens) for job in jobs) / len(jobs)
    return Calibration(names, scale, scale * ratio, ratio_assumed=True, on_cpu=jobs[0].on_cpu)


def _fit(rows: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Non-negative a, b that bring every x * a + y * b nearest to 1; None when the rows tell them not apart."""
    xx, xy, yy = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = xx * yy - xy * xy
    if determinant < 1e-3 * xx * yy:
        return None
    a, b = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
    if a >= 0 and b >= 0:
        return a, b
    return (0.0, y / yy) if a < 0 else (x / xx, 0.0)


def _ratio(job: Observed, shape: ModelShape) -> float:
    """Seconds of an output token over seconds of a computed prompt token, by a roofline of the job's kind of engine."""
    roofline = roofline_of(job, shape)
    places = roofline.max_num_seqs
    context = places * (job.prompt_tokens + job.output_tokens / 2)
    step = step_seconds(roofline, tokens=places, kv_tokens_read=context)
    return step / places / (2 * roofline.parameters / roofline.flops_per_second / roofline.efficiency)


def roofline_of(job: Observed, shape: ModelShape) -> RooflineConfig:
    """The roofline whose ratio a job is given: its own when it was simulated, else a CPU's or an H100's."""
    if job.manifest["engine"] == "simulated":
        return RooflineConfig.parse(job.engine_args, where=f"{job.name}: engine_args")
    asked = job.engine_args.get("max_num_seqs") or (CPU_DEFAULTS["max_num_seqs"] if job.on_cpu else None)
    places = None if asked is None else int(asked)
    roofline = replica_roofline(CPU if job.on_cpu else SOME_GPU, shape, "bf16", max_num_seqs=places)
    return roofline.model_copy(update={"step_overhead_seconds": CPU_STEP_SECONDS}) if job.on_cpu else roofline
