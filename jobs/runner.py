"""The visible loop: take the lease, plan, start, feed, watch, commit."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jobs.crew import Crew
from jobs.feeder import Route
from jobs.gather import gather, inputs_of
from jobs.job import Job, begun_spec, feeder_config, prepare_job, provenance, refuse_nested_output
from jobs.lease import Lease
from jobs.ledger import Ledger, read_manifest
from jobs.measured import StartUp, cpu_seconds, occupancy
from jobs.plan import Unit, plan_units
from jobs.preflight import check_cluster, versions, writing_is_possible
from jobs.recheck import Recheck, check_inputs
from jobs.retry import plan_retries, settle_retries
from jobs.score import score_totals
from jobs.signals import Signals, interruptible
from jobs.spec import JobSpec, stored_spec
from jobs.store import locate
from jobs.tally import Tally
from serving import brood, fleet
from serving.app import DEPLOYMENT
from serving.config import ReplicaConfig
from serving.errors import DamagedStateError, TooManyErrorsError
from serving.formats import load_format
from serving.protocol import EngineInfo

ROWS_AHEAD, CACHES_AHEAD = 2, 3
"""Rows in flight for each place in an engine's batch, so that a finished row's successor already waits there."""

LEAST_CALLS = 4
"""Micro-batches of each replica, so that those of a job of few rows have all something to do, and about as much."""

POLL_SECONDS = 1.0
DRAIN_SECONDS = 10.0
"""What is in flight may finish for so long after a signal or a failure: less than the 30 s of a spot pre-emption."""


@dataclass
class Progress:
    """What a progress display shows: ``tally`` sums over this run's rows, those that it replayed included.

    ``resumed_rows`` were finished by earlier runs; ``total`` counts all rows of the job.
    """

    total: int
    tally: Tally = field(default_factory=Tally)
    resumed_rows: int = 0
    seconds: float = 0.0
    stage: str = "starting"
    examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def fresh_rows(self) -> int:
        """Rows that this run generated; none until as many rows are ready as it found in the journal."""
        return max(0, self.tally.rows - self.tally.replayed)


class Watcher:
    """What ``run_job`` tells while it works; override what you want to hear."""

    def say(self, message: str) -> None:
        """One plain line for the user."""

    def update(self, progress: Progress) -> None:
        """Called once a second, and when something is finished."""


@dataclass
class _Run:
    """What the steps of one run share; ``check`` raises what asks it to stop, a signal or a lost lease."""

    job: Job
    ledger: Ledger
    lease: Lease
    check: Callable[[], None]
    watcher: Watcher
    progress: Progress
    recheck: Recheck
    started: StartUp
    alone: bool
    finished: Tally = field(default_factory=Tally)
    ran: float = 0.0
    replica_seconds: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)


def run_job(
    spec: JobSpec, *, watcher: Watcher | None = None, startup: StartUp | None = None, alone: bool = False
) -> dict[str, Any]:
    """Run a job to its end, or go on with an interrupted one; returns the manifest.

    ``startup`` counts from an earlier beginning than this call, that of a command's process. With ``alone`` the job
    joins no fleet, and raises ``ResourceError`` where there is no room for engines of its own.
    Raises a ``UsageError`` before anything is started (``JobHeldError`` when another runner has the folder),
    ``InterruptedJobError`` on SIGINT or SIGTERM, ``TooManyErrorsError`` beyond ``max_error_rate``, ``StorageError``,
    ``InputChangedError`` or ``EngineError`` when it cannot go on. What is finished then stays, and running the same
    spec resumes.
    """
    watcher, startup = watcher or Watcher(), startup or StartUp()
    job = prepare_job(begun_spec(spec, watcher.say))
    refuse_nested_output(job)
    ledger = Ledger(job.output, job.fingerprint)
    with interruptible() as signals:
        with writing_is_possible():
            ledger.refuse_others(job.identity, resume=spec.resume, overwrite=spec.overwrite)
            lease = Lease.take(job.output, say=watcher.say, check=signals.check)
        try:
            return _run(job, ledger, lease, signals, watcher, startup, alone)
        finally:
            lease.release()


def _run(
    job: Job, ledger: Ledger, lease: Lease, signals: Signals, watcher: Watcher, startup: StartUp, alone: bool
) -> dict[str, Any]:
    started = time.monotonic()

    def check() -> None:
        signals.check()
        lease.check()

    job, units, begun = _plan(job, ledger, watcher, check)
    done = ledger.done()
    earlier = [unit for unit in units if unit.index in done]
    left = deque(unit for unit in units if unit.index not in done)
    progress = Progress(job.total_rows, resumed_rows=_rows_done(ledger, earlier, left))
    if begun:
        check_inputs(ledger, units, job, check)
        watcher.say(f"resuming: {len(earlier)} of {len(units)} parts are done")
    if left:
        ledger.withdraw_manifest()
    lease.tell(total=progress.total, rows=progress.resumed_rows, rows_per_second=0.0, error_codes={})
    recheck = Recheck(ledger, earlier)
    startup.reached("plan")
    run = _Run(job, ledger, lease, check, watcher, progress, recheck, startup, alone)
    try:
        while left or _redo(run, left, recheck.wait(run.check)):
            _feed(run, left)
    finally:
        recheck.stop()
    if not run.ran and (before := _manifest_before(job)):
        return before
    manifest = _commit(run, units, time.monotonic() - started)
    if repeated := manifest["tally"]["repeated_ids"]:
        watcher.say(f"{repeated:,} rows repeat an id of their part; rows are told apart by file and row number")
    return manifest


def _manifest_before(job: Job) -> dict[str, Any] | None:
    """The manifest of an earlier run, when this one found nothing to do."""
    try:
        return read_manifest(job.output)
    except DamagedStateError:
        return None


def _rows_done(ledger: Ledger, earlier: Sequence[Unit], left: Iterable[Unit]) -> int:
    """Input rows of finished units, less those that are to be retried."""
    retried = (ledger.read_report(unit.retries) for unit in left if unit.retries >= 0)
    again = sum(report.tally.errors for report in retried if report is not None)
    return sum(unit.rows for unit in earlier if unit.retries < 0) - again


def _plan(job: Job, ledger: Ledger, watcher: Watcher, check: Callable[[], None]) -> tuple[Job, list[Unit], bool]:
    """Take the folder for the job and give the job with the rows that its units count, and whether it had begun."""
    spec = job.spec
    with writing_is_possible():
        begun = ledger.open(job.identity, stored_spec(spec), versions(), resume=spec.resume, overwrite=spec.overwrite)
        ledger.probe()
    if spec.order == "global":
        watcher.say("gathering rows that share a prompt's beginning")
        gather(spec, load_format(job.format_name, tokenizer_of=spec.model), job.inputs, job.output, check=check)
        job = replace(job, inputs=replace(inputs_of(spec, job.output), ignored=job.inputs.ignored))
    with writing_is_possible():
        planned = plan_units(job.inputs.files, rows_per_part=spec.unit_rows, limit=spec.limit)
        units = ledger.plan(job.inputs.files, planned)
        if spec.retry_errors:
            units = plan_retries(ledger, units)
    if begun is not None:
        for name, then in begun["versions"].items():
            if then != versions()[name]:
                watcher.say(f"the job began with {name} {then}, now it is {versions()[name]}: infills may differ")
    if job.inputs.ignored:
        watcher.say(f"not Parquet, left out: {_some(job.inputs.ignored)}")
    return job, units, begun is not None


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _redo(run: _Run, left: deque[Unit], damaged: list[Unit]) -> bool:
    """Queue finished units that were found damaged; whether there are any."""
    for unit in damaged:
        run.watcher.say(f"part {unit.index} is damaged; it was set aside and its rows run again")
        run.progress.resumed_rows -= unit.rows
    left.extend(damaged)
    return bool(damaged)


def _feed(run: _Run, left: deque[Unit]) -> None:
    job, spec = run.job, run.job.spec
    with fleet.connected() as embedded:
        told = feeder_config(job, beginning=run.ledger.beginning, lease=run.lease.number)
        crew = Crew(told, spec.feeders, left, job.inputs.files)
        try:
            crew.fill()
            inputs = [replace(job.inputs.root, path=file.path) for file in job.inputs.files[:1]]
            check_cluster(job.engine, inputs, job.output)
            run.started.reached("ray")
            fleet.start_serve(embedded=embedded)
            run.started.reached("serve")
            _serve(run, crew, left, embedded=embedded)
        finally:
            crew.close()


def _serve(run: _Run, crew: Crew, left: deque[Unit], *, embedded: bool) -> None:
    """Find engines for the feeders and let them work."""
    job, spec, watcher = run.job, run.job.spec, run.watcher
    run.progress.stage = "starting the engine"
    watcher.update(run.progress)
    told = time.monotonic()

    def check() -> None:
        """Meanwhile feeders read what earlier runs kept: whoever goes on with a job is shown that it is there."""
        nonlocal told
        run.check()
        if time.monotonic() - told >= POLL_SECONDS:
            _tell(run, crew)
            told = time.monotonic()

    replicas = ReplicaConfig(replicas=spec.replicas, cores=spec.cores)
    service = fleet.join_or_start(
        job.engine, replicas, embedded=embedded, alone=run.alone, say=watcher.say, check=check
    )
    try:
        brood.remember()
        run.started.reached("engine")
        _tell(run, crew)
        info = service.info
        route, rows = _route(run, crew, left, service)
        before, ran, earlier = service.stats(), run.ran, run.replica_seconds
        crew.attach(DEPLOYMENT, service.name, route, rows=rows)
        run.progress.stage = "running"
        _watch(run, crew, left, service)
        after = service.stats()
        seconds, replica_seconds = run.ran - ran, run.replica_seconds - earlier
        busy = occupancy(service.info, before, after, replica_seconds / service.replicas, run.finished)
        mean = round(replica_seconds / seconds, 2) if seconds else service.replicas
        run.told = {
            "engines": {
                "replicas": service.replicas if mean == service.replicas else mean,
                **busy,
                "settings": info.settings,
            },
            "cpu_seconds": cpu_seconds(crew.report().cpu_seconds, before, after, run.finished),
        }
    finally:
        service.release()


def route_of(
    replicas: int, engine: EngineInfo, spec: JobSpec, *, rows: float = math.inf, units: float = math.inf
) -> tuple[Route, int]:
    """How each feeder calls the replicas, and the rows that it needs under way to keep them busy.

    Micro-batches ask for ``batch_rows`` completions, or fewer where ``rows`` and ``units`` are all that is left to do
    and each replica would get less than ``LEAST_CALLS`` of them. At first all feeders together have ``ROWS_AHEAD``
    times what an engine's batch holds in flight to it, but no more than ``CACHES_AHEAD`` times what its KV cache does;
    as many rows again are prepared meanwhile.
    """
    size = max(1, math.ceil(min(spec.batch_rows / spec.n, rows / replicas / LEAST_CALLS)))
    calls = max(3, math.ceil(ROWS_AHEAD * engine.max_num_seqs / (size * spec.n)))
    feeders = max(1, min(spec.feeders, units))
    window = max(2, math.ceil(calls / feeders))
    room = CACHES_AHEAD * engine.kv_cache_tokens / feeders if engine.kv_cache_tokens else math.inf
    return Route(replicas, window, size, engine.block_size, room), 2 * window * replicas * size


def _route(run: _Run, crew: Crew, left: deque[Unit], service: fleet.Fleet) -> tuple[Route, int]:
    """That of what is left of a job."""
    done = run.progress.resumed_rows + run.progress.tally.rows
    rows, units = run.progress.total - done, crew.units + len(left)
    return route_of(service.replicas, service.info, run.job.spec, rows=rows, units=units)


def _watch(run: _Run, crew: Crew, left: deque[Unit], service: fleet.Fleet) -> None:
    started, before = time.monotonic(), run.ran
    try:
        while crew.units or left:
            crew.fill()
            for tally in crew.gather(POLL_SECONDS):
                run.finished.add(tally)
            ran, run.ran = run.ran, before + time.monotonic() - started
            run.replica_seconds += (run.ran - ran) * service.replicas
            _tell(run, crew)
            _redo(run, left, run.recheck.damaged())
            service.watch(run.progress.fresh_rows, run.watcher.say)
            if service.has_grown():
                run.watcher.say(f"the fleet has {service.replicas} replicas now")
                crew.widen(*_route(run, crew, left, service))
            run.check()
            _check_errors(run.job.spec, run.progress.tally)
    except BaseException:
        run.progress.stage = "stopping: what is in flight may finish"
        run.watcher.update(run.progress)
        crew.stop(DRAIN_SECONDS)
        for message in crew.report().said:  # Nothing else: units that have drained are no longer counted there.
            run.watcher.say(message)
        raise


def _tell(run: _Run, crew: Crew) -> None:
    """Bring the progress up to date and show it; the lease carries it to whoever asks for the job's status."""
    report, progress = crew.report(), run.progress
    tally = Tally().add(run.finished)
    for part in report.units.values():
        tally.add(part)
    if tally.rows > tally.replayed + tally.refused:
        run.started.reached("first rows")
    progress.tally, progress.seconds = tally, run.ran
    seen = {example["row"]: example for example in progress.examples + report.examples}
    progress.examples = list(seen.values())[:3]
    for message in report.said:
        run.watcher.say(message)
    run.watcher.update(progress)
    run.lease.tell(
        total=progress.total,
        rows=progress.resumed_rows + tally.rows,
        rows_per_second=round(progress.fresh_rows / run.ran, 3) if run.ran else 0.0,
        error_codes=tally.error_codes,
    )


def _check_errors(spec: JobSpec, tally: Tally) -> None:
    if tally.error_share > spec.max_error_rate:
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(tally.error_codes.items()))
        raise TooManyErrorsError(
            f"{tally.error_share:.1%} of the rows fail ({codes}), beyond --max-error-rate {spec.max_error_rate:g}.",
            remedy="Mend the cause and run again to resume, or raise --max-error-rate.",
        )


def _commit(run: _Run, units: list[Unit], seconds: float) -> dict[str, Any]:
    """Add up the parts' reports; speeds are of this run's rows over the seconds in which its engines ran."""
    job, ledger, fresh, running = run.job, run.ledger, run.finished, run.ran
    share = _fresh_share(fresh)
    run.lease.renew()
    settle_retries(ledger, units)
    total, digests, sizes = Tally(), dict[str, str](), dict[str, int]()
    for report in ledger.read_reports(unit.index for unit in units):
        total.add(report.tally)
        digests |= report.sha256
        sizes |= report.bytes
    for stray in ledger.set_strays_aside(digests):
        run.watcher.say(f"{stray} is not this job's; it was set aside")
    manifest = {
        **provenance(job),
        "input": str(locate(job.spec.input)),
        "input_rows": job.total_rows,
        "rows": total.samples,
        "errors": total.errors,
        "error_codes": total.error_codes,
        "seconds": round(seconds, 3),
        "running_seconds": round(running, 3),
        "rows_per_second": round((fresh.rows - fresh.replayed) / running, 3) if running else 0.0,
        "output_tokens_per_second": round(fresh.completion_tokens * share / running, 3) if running else 0.0,
        "startup_seconds": run.started.seconds,
        **run.told,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "cached_tokens": total.cached_tokens,
        "prefix_cache_hit_share": round(total.cached_tokens / total.prompt_tokens, 4) if total.prompt_tokens else 0.0,
        "ideal_hit_share": round(total.ideal_tokens / total.prompt_tokens, 4) if total.prompt_tokens else 0.0,
        "finish_reasons": total.finish_reasons,
        "truncated": total.truncated,
        "empty": total.empty,
        "replicas": total.replicas,
        "parts": digests,
        "bytes": sizes,
        "tally": asdict(total),
    }
    if job.spec.task == "score":
        speed = round(fresh.scored_tokens * share / running, 3) if running else 0.0
        manifest |= {"scored_tokens_per_second": speed, **score_totals(total)}
    ledger.write_manifest(manifest)
    return manifest


def _fresh_share(tally: Tally) -> float:
    """The share of a tally's rows, and as far as that tells of their tokens, that was not replayed."""
    return (tally.rows - tally.replayed) / tally.rows if tally.rows else 0.0
