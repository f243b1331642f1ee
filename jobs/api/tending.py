"""One work that this gateway has claimed: its process is begun, watched and stopped, its results are delivered."""

import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jobs.api.metered import finished_units
from jobs.api.office import Office
from jobs.api.order import EXIT_HELD, Cut, Mode, Outcome, Plan, Problem, UnitUsage
from jobs.api.parts import part_files
from jobs.api.process import WorkProcess
from jobs.api.queue import Status
from jobs.status import Status as JobState
from jobs.status import read_status
from jobs.store import locate, publish_bytes
from serving.errors import (
    DamagedStateError,
    DatabaseAwayError,
    LeaseLostError,
    ModelNotFoundError,
    SpanfillError,
    VersionError,
)
from serving.tenants.tables import FileRow, WorkRow
from serving.tenants.usage import UsageRecord

BEAT_SECONDS = 2.0
"""How often a claim is renewed and progress told; a cancellation is seen as late."""

POLL_SECONDS = 0.1
HELD_SECONDS = 3.0
"""When to look again for a folder where the process of a dead gateway still works."""

MOST_TRIES = 5
"""Of a job, with no part finished in between, or of a batch that is cut short; others try until their time is over."""

TRY_SECONDS, MOST_TRY_SECONDS = 5.0, 300.0
COUNTED = ("prompt_tokens", "cached_tokens", "completion_tokens")
PROGRESS = ("rows", "total_rows", "parts", "total_parts", "rows_per_second", "eta_seconds", "errors", "error_codes")

logger = logging.getLogger(__name__)


class _Begun(BaseModel):
    """What counts of an earlier order, whatever version of spanfill wrote it."""

    began: int


class Tending:
    """Takes a claimed work as far as it goes."""

    def __init__(self, office: Office, work: WorkRow) -> None:
        self._office = office
        self._work = work
        self._is_batch = work.kind == "batch"
        self._folder = office.shelf.work_folder(work.tenant, work.id)
        self._metered: set[str] = set()
        self._earlier: int | None = None
        self._makes_way = self._is_beyond = False
        self._used = dict.fromkeys(COUNTED, 0)

    def run(self) -> None:
        """Run the work to its end, or to that of this gateway; raises ``LeaseLostError``, ``DatabaseAwayError``."""
        try:
            self._run()
        except ValidationError as error:  # What another version of spanfill has written of it.
            logger.warning("%s cannot be read: %s", self._work.id, error)
            told = {
                "code": "version_mismatch",
                "message": "It was begun by another version of spanfill. Send it again.",
            }
            self._leave("failed", **_problem(told, is_batch=self._is_batch))

    def _run(self) -> None:
        if self._cut_short() is None:
            self._prepare()
            code = self._watch("run")
            if self._cut_short() is None:
                self._ran(code, "completed")
                return
        if self._office.stopping.is_set():
            self._release(0.0)
        else:
            self._close()

    def _prepare(self) -> None:
        """Write the order, anew where the server has other engines than when the work began: those are to do it."""
        order = self._office.order(self._work, self._folder)
        if self._folder.order.exists():
            began = _Begun.model_validate_json(self._folder.order.read_bytes()).began
            order = order.model_copy(update={"began": began})
        publish_bytes(locate(str(self._folder.order)), order.model_dump_json().encode())

    def _is_prepared(self) -> bool:
        """Whether there is an order; there is none for a model that was never begun here and is served no more."""
        with suppress(ModelNotFoundError):
            if not self._folder.order.exists():
                self._prepare()
        return self._folder.order.exists()

    def _cut_short(self) -> Cut | None:
        """Why the work is to end however far it is, if it is."""
        if self._work.status == "cancelling":
            return "cancelled"
        expires = self._work.expires
        return "expired" if expires is not None and expires <= self._office.queue.clock() else None

    def _watch(self, mode: Mode) -> int:
        """Run a process; returns its exit code."""
        process, renewed, began = WorkProcess(self._folder, mode), 0.0, time.monotonic()
        try:
            while (code := process.poll()) is None:
                if time.monotonic() - renewed >= BEAT_SECONDS:
                    self._beat()
                    renewed = time.monotonic()
                    if mode == "run" and renewed - began >= self._office.config.turn_seconds:
                        self._makes_way = self._makes_way or self._is_due_to_make_way()
                if self._office.stopping.is_set() or (mode == "run" and self._ends_early()):
                    process.stop()
                time.sleep(POLL_SECONDS)
            return code
        finally:
            process.end()

    def _ends_early(self) -> bool:
        return self._makes_way or self._is_beyond or self._cut_short() is not None

    def _beat(self) -> None:
        """Renew the claim and tell how far the work is; while the database is away the process goes on."""
        try:
            self._meter()
            status, told = self._progress()
            size = None if self._is_batch else self._job_bytes()
            self._work = self._office.queue.renew(self._work.id, self._office.holder, status, size=size, **told)
            if not self._is_batch:
                more = _bytes_below(self._folder.path) - self._work.bytes
                self._is_beyond = self._is_beyond or self._office.shelf.is_beyond(self._work.tenant, more)
        except LeaseLostError:
            raise
        except (SpanfillError, OSError) as error:
            logger.warning("%s goes on, how far it is cannot be told: %s", self._work.id, error)

    def _is_due_to_make_way(self) -> bool:
        """Whether another's turn has come; nobody knows while the database is away."""
        with suppress(DatabaseAwayError):
            return self._office.queue.makes_way(self._work.id, self._office.models)
        return False

    def _job_bytes(self) -> int:
        """Bytes of what a job reads here and of the parts that are out."""
        return _size(self._folder.source("job")) + sum(part.size for part in part_files(self._folder))

    def _progress(self) -> tuple[Status | None, dict[str, Any]]:
        states = [state for _, path in self._folder.begun() if (state := _state(path)) is not None]
        if not self._is_batch:
            progress = {name: getattr(states[0], name) for name in PROGRESS} if states else {}
            return None, {"progress": progress, "usage": self._used}
        if not self._folder.plan.exists():
            return None, {}
        plan = Plan.model_validate_json(self._folder.plan.read_bytes())
        if plan.errors:
            return None, {}
        # Lines have one prompt or more: while they are done, a share of the prompts is told as that share of the lines.
        done, errors = sum(state.rows for state in states), sum(state.errors for state in states)
        failed = plan.asking * errors // max(1, plan.prompts)
        completed = plan.asking * min(done, plan.prompts) // max(1, plan.prompts) - failed
        refused = plan.total - plan.asking
        counts = {"total": plan.total, "completed": max(0, completed), "failed": refused + failed}
        return "finalizing" if self._folder.finalizing.exists() else "in_progress", {"counts": counts}

    def _meter(self, partial: Sequence[UnitUsage] = ()) -> None:
        """Count what units used that have been finished since the last time, and ``partial``."""
        work = self._work
        for unit in [*self._finished_units(), *partial]:
            used = {name: getattr(unit, name) for name in COUNTED}
            now = self._office.queue.clock()
            record = UsageRecord(work.tenant, work.key, work.model, at=now, job=work.id, requests=unit.rows, **used)
            self._office.add_usage(f"{work.id}/{unit.name}", [(1, record)])
            self._metered.add(unit.name)
            self._used = {name: self._used[name] + used[name] for name in COUNTED}
        if self._earlier is None:
            self._earlier = len(self._metered)

    def _finished_units(self) -> list[UnitUsage]:
        try:
            return list(finished_units(self._folder, self._metered))
        except (DamagedStateError, VersionError) as error:  # The work fails by it; that it does must not fail.
            logger.warning("not all that %s used can be counted: %s", self._work.id, error)
            return []

    def _ran(self, code: int, status: Status) -> None:
        """See what a process has come to that was to bring the work to this status."""
        if code == 0:
            self._settle(status)
        elif code == EXIT_HELD or self._office.stopping.is_set():
            self._release(HELD_SECONDS if code == EXIT_HELD else 0.0)
        elif self._is_beyond:
            self._meter()
            self._failed(Problem(code="no_room", message=str(self._office.shelf.full()), may_pass=False))
        elif self._makes_way:
            self._meter()
            self._release(0.0, is_last=True)
        else:
            self._meter()
            message = f"Its process ended with exit code {code}. The server's log tells more."
            self._failed(Problem(code="failed", message=message, may_pass=True))

    def _close(self) -> None:
        """End a work that is cut short; what is done of a batch is delivered, parts of a job stay."""
        cut = self._cut_short()
        assert cut is not None
        if not self._is_batch or not self._is_prepared():
            self._end_undone(cut)
        else:
            self._ran(self._watch(cut), cut)

    def _settle(self, status: Status) -> None:
        outcome = Outcome.model_validate_json(self._folder.outcome.read_bytes())
        self._meter(outcome.partial)
        if outcome.problem is not None:
            self._failed(outcome.problem)
        elif outcome.errors:
            self._end("failed", errors=[error.model_dump() for error in outcome.errors])
        elif self._is_batch:
            self._deliver(outcome, status)
        else:
            self._end(status)

    def _deliver(self, outcome: Outcome, status: Status) -> None:
        completed, failed = outcome.completed, outcome.failed
        told: dict[str, Any] = {"counts": {"total": completed + failed, "completed": completed, "failed": failed}}
        for name, path in (("output", self._folder.output), ("error", self._folder.errors)):
            if path.stat().st_size:
                told[f"{name}_file_id"] = self._keep(name, path)
        self._end(status, **told)

    def _keep(self, name: str, path: Path) -> str:
        """Make a file of the tenant's of a result; the same one whenever the work is settled again."""
        work, now = self._work, self._office.queue.clock()
        file = FileRow(
            id=f"file-{hashlib.blake2b(f'{work.id} {name}'.encode(), digest_size=16).hexdigest()}",
            tenant=work.tenant,
            key=work.key,
            purpose="batch_output",
            name=f"{work.id}_{name}.jsonl",
            bytes=path.stat().st_size,
            created=now,
            expires=now + work.details["kept"],
        )
        file_id = file.id
        self._office.shelf.keep(file, path)
        return file_id

    def _failed(self, problem: Problem) -> None:
        has_progressed = self._earlier is not None and len(self._metered) > self._earlier
        tries = 1 if has_progressed else self._work.tries + 1
        has_time = self._is_batch and self._cut_short() is None
        if problem.may_pass and (has_time or tries < MOST_TRIES):
            logger.warning("%s is tried again: %s", self._work.id, problem.message)
            self._release(min(MOST_TRY_SECONDS, TRY_SECONDS * 2 ** min(tries, 10)), tries=tries)
            return
        told = {"code": problem.code, "message": problem.message}
        self._end_undone("failed", **_problem(told, is_batch=self._is_batch))

    def _release(self, seconds: float, *, tries: int | None = None, is_last: bool = False) -> None:
        self._office.queue.release(self._work.id, self._office.holder, seconds, tries=tries, is_last=is_last)

    def _end_undone(self, status: Status, **told: Any) -> None:
        """End a work that is not completed, once what its unfinished units used is counted, if that can be."""
        code = self._watch("count") if self._folder.begun() else None
        if code == EXIT_HELD or (code and self._office.stopping.is_set()):
            self._release(HELD_SECONDS if code == EXIT_HELD else 0.0)
            return
        if code is not None:
            self._meter(self._partial(code))
        self._end(status, **told)

    def _partial(self, code: int) -> Sequence[UnitUsage]:
        why = f"exit code {code}"
        if code == 0:
            outcome = Outcome.model_validate_json(self._folder.outcome.read_bytes())
            if outcome.problem is None:
                return outcome.partial
            why = outcome.problem.message
        logger.warning("what unfinished units of %s used cannot be counted: %s", self._work.id, why)
        return ()

    def _end(self, status: Status, **told: Any) -> None:
        self._meter()
        if not self._is_batch:
            told |= self._progress()[1]
        self._leave(status, **told)

    def _leave(self, status: Status, **told: Any) -> None:
        """Say that the work has ended, of which a batch leaves nothing here and a job all that it made."""
        source = self._folder.source("job")
        size = 0 if self._is_batch else _bytes_below(self._folder.path) - _size(source)
        told["usage"] = self._used
        self._office.queue.end(self._work.id, self._office.holder, status, size, **told)
        if self._is_batch:
            self._office.shelf.remove(self._folder)
        else:
            source.unlink(missing_ok=True)


def _problem(told: dict[str, str], *, is_batch: bool) -> dict[str, Any]:
    """Why all of a work failed, as batches and jobs tell it."""
    return {"errors": [{**told, "line": None, "param": None}]} if is_batch else {"problem": told}


def _bytes_below(folder: Path) -> int:
    """Of all files there, those that are being written too."""
    return sum(map(_size, folder.rglob("*")))


def _size(path: Path) -> int:
    """Bytes of a file; a folder, and what is gone meanwhile, have none."""
    with suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def _state(path: Path) -> JobState | None:
    """How far a job is, once it has begun."""
    with suppress(SpanfillError):
        return read_status(str(path))
    return None
