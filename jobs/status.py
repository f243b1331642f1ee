"""What a job's folder alone tells of the job: running, interrupted, finished or damaged, and how far it is."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.lease import SILENT_SECONDS, Holder, read_holder
from jobs.ledger import Ledger, Report, read_job, read_manifest
from jobs.plan import Unit
from jobs.store import locate
from jobs.tally import Tally
from serving.errors import DamagedStateError

State = Literal["running", "interrupted", "finished", "damaged"]


@dataclass(frozen=True)
class Status:
    """One reading; ``rows`` counts input rows that need not be generated again, ``eta_seconds`` is None when unknown.

    ``rows_per_second`` is that of the run under way or of the last one. ``heartbeat_age`` is in seconds by this
    machine's clock.
    """

    state: State
    rows: int = 0
    total_rows: int = 0
    parts: int = 0
    total_parts: int = 0
    rows_per_second: float = 0.0
    eta_seconds: float | None = None
    errors: int = 0
    error_codes: dict[str, int] = field(default_factory=dict)
    host: str | None = None
    pid: int | None = None
    heartbeat_age: float | None = None
    problems: tuple[str, ...] = ()


def read_status(folder: str) -> Status:
    """The status of a job's output folder.

    Raises ``OutputError`` when it holds no job, ``VersionError`` when another format's.
    """
    output = locate(folder)
    holder = read_holder(output)
    try:
        ledger = Ledger.of(output, read_job(output))
        units = ledger.planned() if ledger.has_plan or ledger.done() else []
        manifest = read_manifest(output)
        if ledger.has_plan:
            ledger.inputs()
    except DamagedStateError as error:
        return Status("damaged" if not _is_alive(holder) else "running", problems=(error.message,), **_who(holder))
    if manifest is not None:
        return _finished(ledger, manifest, units, holder)
    return _unfinished(ledger, units, holder)


def _finished(ledger: Ledger, manifest: dict[str, Any], units: Sequence[Unit], holder: Holder | None) -> Status:
    sizes, told = ledger.outputs(), manifest["bytes"]
    problems = _misfits(sizes, told) + [f"{name} is not the job's" for name in sizes if name not in told]
    indices = [unit.index for unit in units]
    problems += _without_report(indices, ledger.try_reports(indices))
    rows = sum(unit.rows for unit in units if unit.retries < 0)
    return Status(
        "damaged" if problems else "finished",
        rows=rows,
        total_rows=rows,
        parts=len(units),
        total_parts=len(units),
        rows_per_second=manifest["rows_per_second"],
        eta_seconds=0.0,
        errors=manifest["errors"],
        error_codes=manifest["error_codes"],
        problems=tuple(problems),
        **_who(holder),
    )


def _unfinished(ledger: Ledger, units: Sequence[Unit], holder: Holder | None) -> Status:
    done = ledger.done()
    alive = _is_alive(holder)
    told = holder.told if holder else {}
    rows, codes, problems = told.get("rows", 0), told.get("error_codes", {}), list[str]()
    if not alive:
        reports = dict(zip(sorted(done), ledger.try_reports(sorted(done)), strict=True))
        tally, problems = _done(ledger, units, reports), _damage(ledger, units, reports)
        rows, codes = tally.rows, tally.error_codes
    elif all(unit.retries < 0 for unit in units):  # The runner tells every few seconds, and nothing when it begins.
        rows = max(rows, sum(unit.rows for unit in units if unit.index in done))
    total = sum(unit.rows for unit in units if unit.retries < 0)
    speed = float(told.get("rows_per_second", 0.0))
    return Status(
        "damaged" if problems else "running" if alive else "interrupted",
        rows=rows,
        total_rows=total,
        parts=len(done),
        total_parts=len(units),
        rows_per_second=speed,
        eta_seconds=(total - rows) / speed if alive and speed else None,
        errors=sum(codes.values()),
        error_codes=codes,
        problems=tuple(problems),
        **_who(holder),
    )


def _damage(ledger: Ledger, units: Sequence[Unit], reports: dict[int, Report | None]) -> list[str]:
    """What is wrong with a job that nobody runs: finished parts that are not what their reports say, strangers."""
    sizes = ledger.outputs()
    problems = _without_report(reports, reports.values())
    for report in reports.values():
        problems += _misfits(sizes, report.bytes if report is not None else {})
    own = {f"{folder}/{ledger.part(unit.index).name}" for folder in ("data", "errors") for unit in units}
    return problems + [f"{name} is not the job's" for name in sizes if name not in own]


def _misfits(sizes: dict[str, int], told: dict[str, int]) -> list[str]:
    return [
        f"{name} is missing" if name not in sizes else f"{name} has {sizes[name]} bytes, not {size}"
        for name, size in told.items()
        if sizes.get(name) != size
    ]


def _without_report(indices: Iterable[int], reports: Iterable[Report | None]) -> list[str]:
    return [
        f"part {index} has no readable report" for index, report in zip(indices, reports, strict=True) if report is None
    ]


def _done(ledger: Ledger, units: Sequence[Unit], reports: dict[int, Report | None]) -> Tally:
    """Rows and errors of the finished parts and of the journals of those under way.

    Error rows that are being retried, or were and are not settled yet, count where they are retried alone.
    """
    retried = {unit.retries for unit in units}
    total = Tally()
    for index, report in reports.items():
        if report is not None:
            tally = report.tally
            again = index in retried
            codes = {} if again else tally.error_codes
            total.add(Tally(rows=tally.rows - tally.errors * again, error_codes=codes))
    for unit in units:
        if unit.index not in reports:
            rows, codes = ledger.journal(unit.index).peek()
            total.add(Tally(rows=rows, error_codes=codes))
    return total


def _is_alive(holder: Holder | None) -> bool:
    return holder is not None and not holder.is_gone and time.time() - holder.beat < SILENT_SECONDS


def _who(holder: Holder | None) -> dict[str, Any]:
    if holder is None:
        return {}
    return {"host": holder.host, "pid": holder.pid, "heartbeat_age": round(max(0.0, time.time() - holder.beat), 1)}
