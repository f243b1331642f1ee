"""The visible loop: plan, start, feed, watch, commit."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from jobs.feeder import Feeder
from jobs.job import Job, feeder_config, prepare_job, provenance
from jobs.ledger import Ledger, Tally
from jobs.plan import InputFile, Unit, plan_units
from jobs.preflight import check_cluster, writing_is_possible
from jobs.signals import Signals, interruptible
from jobs.spec import JobSpec
from jobs.store import Location
from serving import fleet
from serving.app import DEPLOYMENT
from serving.config import ReplicaConfig
from serving.errors import SpanfillError, TooManyErrorsError

UNITS_AHEAD = 3
"""Units that a feeder has under way: while one drains, the next is read and tokenised."""

ROWS_AHEAD = 2
"""Rows in flight for each place in an engine's batch, so that a finished row's successor already waits there."""

MIN_ROWS_FOR_ERROR_RATE = 100
POLL_SECONDS = 0.2


@dataclass
class Progress:
    """What a progress display shows; ``rows`` counts finished input rows, of ``total``."""

    total: int
    tally: Tally = field(default_factory=Tally)
    resumed_rows: int = 0
    seconds: float = 0.0
    stage: str = "starting"
    examples: list[dict[str, str]] = field(default_factory=list)


class Watcher:
    """What ``run_job`` tells while it works; override what you want to hear."""

    def say(self, message: str) -> None:
        """One plain line for the user."""

    def update(self, progress: Progress) -> None:
        """Called several times a second."""


def run_job(spec: JobSpec, *, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run a job to its end, or go on with an interrupted one; returns the manifest.

    Raises a ``UsageError`` before anything is started, ``InterruptedJobError`` on SIGINT or SIGTERM,
    ``TooManyErrorsError`` beyond ``max_error_rate``, ``StorageError`` or ``EngineError`` when it cannot go on. What is
    finished then stays, and running the same spec resumes.
    """
    watcher = watcher or Watcher()
    job = prepare_job(spec)
    ledger = Ledger(job.output, job.fingerprint)
    with writing_is_possible():
        resumed = ledger.open(job.identity, spec.model_dump(mode="json"), resume=spec.resume, overwrite=spec.overwrite)
        ledger.probe()
    planned = plan_units(job.inputs.files, rows_per_part=spec.rows_per_part, limit=spec.limit)
    units = ledger.plan(job.inputs.files, planned)
    done = ledger.done()
    left = deque(unit for unit in units if unit.index not in done)
    progress = Progress(job.total_rows, resumed_rows=sum(u.rows for u in units if u.index in done))
    if job.inputs.ignored:
        watcher.say(f"not Parquet, left out: {_some(job.inputs.ignored)}")
    if resumed:
        watcher.say(f"resuming: {len(done)} of {len(units)} parts are done")
    started = time.monotonic()
    if left:
        with interruptible() as signals:
            _feed(job, ledger, left, progress, watcher, signals)
    manifest = _commit(job, ledger, units, time.monotonic() - started, progress)
    if repeated := manifest["tally"]["repeated_ids"]:
        watcher.say(f"{repeated:,} rows repeat an id of their part; rows are told apart by file and row number")
    return manifest


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _feed(job: Job, ledger: Ledger, left: deque[Unit], progress: Progress, watcher: Watcher, signals: Signals) -> None:
    spec = job.spec
    with fleet.connected() as embedded:
        feeders = _start_feeders(job)
        running: dict[Any, Any] = {}
        _top_up(feeders, running, left, job.inputs.files)
        check_cluster(job.engine, [Location(job.inputs.root.uri, f.path) for f in job.inputs.files[:1]], job.output)
        progress.stage = "starting the engine"
        watcher.update(progress)
        replicas = ReplicaConfig(replicas=spec.replicas, cores=spec.cores)
        service = fleet.join_or_start(job.engine, replicas, embedded=embedded, say=watcher.say, check=signals.check)
        try:
            _attach(feeders, service, spec)
            progress.stage = "running"
            _watch(job, feeders, running, left, progress, watcher, signals, service)
        finally:
            service.release()


def _start_feeders(job: Job) -> list[Any]:
    actor = ray.remote(Feeder).options(num_cpus=0, max_concurrency=64)
    config = feeder_config(job)
    return [actor.remote(config) for _ in range(job.spec.feeders)]


def _attach(feeders: list[Any], service: fleet.Fleet, spec: JobSpec) -> None:
    """Let the feeders call; together they keep ``ROWS_AHEAD`` times what the engines' batches hold in flight."""
    calls = max(3, math.ceil(ROWS_AHEAD * service.info.max_num_seqs / spec.batch_rows))
    window = max(2, math.ceil(calls * spec.replicas / len(feeders)))
    ray.get([feeder.attach.remote(DEPLOYMENT, service.name, window) for feeder in feeders])


def _top_up(feeders: list[Any], running: dict[Any, Any], left: deque[Unit], files: tuple[InputFile, ...]) -> None:
    for feeder in feeders:
        while left and sum(f is feeder for f, _ in running.values()) < UNITS_AHEAD:
            unit = left.popleft()
            file = files[unit.file] if files else InputFile("", "", 0, 0, 0, "")
            running[feeder.run.remote(unit, file)] = (feeder, unit)


def _watch(
    job: Job,
    feeders: list[Any],
    running: dict[Any, Any],
    left: deque[Unit],
    progress: Progress,
    watcher: Watcher,
    signals: Signals,
    service: fleet.Fleet,
) -> None:
    started = time.monotonic()
    try:
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for reference in ready:
                ray.get(reference)
                del running[reference]
            _top_up(feeders, running, left, job.inputs.files)
            _collect(feeders, progress, watcher)
            progress.seconds = time.monotonic() - started
            watcher.update(progress)
            service.beat()
            signals.check()
            _check_errors(job.spec, progress.tally)
    except (SpanfillError, KeyboardInterrupt, ray.exceptions.RayTaskError) as error:
        progress.stage = "stopping"
        watcher.update(progress)
        ray.get([feeder.stop.remote() for feeder in feeders], timeout=20)
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
        if isinstance(cause, SpanfillError):
            raise cause from None
        raise


def _collect(feeders: list[Any], progress: Progress, watcher: Watcher) -> None:
    tally = Tally()
    examples: list[dict[str, str]] = []
    for part, shown, said in ray.get([feeder.progress.remote() for feeder in feeders]):
        tally.add(part)
        examples += shown
        for message in said:
            watcher.say(message)
    progress.tally, progress.examples = tally, examples[:3]


def _check_errors(spec: JobSpec, tally: Tally) -> None:
    if tally.rows >= MIN_ROWS_FOR_ERROR_RATE and tally.errors > spec.max_error_rate * tally.rows:
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(tally.error_codes.items()))
        raise TooManyErrorsError(
            f"{tally.errors} of {tally.rows} rows failed ({codes}), beyond --max-error-rate {spec.max_error_rate:g}.",
            remedy="Mend the cause and run again to resume, or raise --max-error-rate.",
        )


def _commit(job: Job, ledger: Ledger, units: list[Unit], seconds: float, progress: Progress) -> dict[str, Any]:
    """Add up the parts' reports; speeds are of this run's rows over the seconds in which its engines ran."""
    total, digests = Tally(), {}
    fresh, running = progress.tally, progress.seconds
    for tally, parts in ledger.read_reports(unit.index for unit in units):
        total.add(tally)
        digests.update(parts)
    manifest = {
        **provenance(job),
        "input": str(job.inputs.root),
        "input_rows": job.total_rows,
        "rows": total.samples,
        "errors": total.errors,
        "error_codes": total.error_codes,
        "seconds": round(seconds, 3),
        "running_seconds": round(running, 3),
        "rows_per_second": round(fresh.rows / running, 3) if running else 0.0,
        "output_tokens_per_second": round(fresh.completion_tokens / running, 3) if running else 0.0,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "cached_tokens": total.cached_tokens,
        "prefix_cache_hit_share": round(total.cached_tokens / total.prompt_tokens, 4) if total.prompt_tokens else 0.0,
        "finish_reasons": total.finish_reasons,
        "truncated": total.truncated,
        "empty": total.empty,
        "replicas": total.replicas,
        "parts": digests,
        "tally": asdict(total),
    }
    ledger.write_manifest(manifest)
    return manifest
