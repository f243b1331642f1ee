"""The process of one work: it reads a batch, runs its jobs and writes its results, or it runs one job, or it counts.

``python -m jobs.api.worker FOLDER MODE PARENT``. It knows its folder alone. It ends with 0 when there is an outcome,
with ``EXIT_HELD`` while another process works in the folder, and as the job runner does when it is interrupted.
"""

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ray import serve

from jobs.api.delivery import deliver
from jobs.api.groups import group_spec
from jobs.api.order import EXIT_HELD, GRACE_SECONDS, Mode, Order, Outcome, Problem, WorkFolder
from jobs.api.partial import partial_usage
from jobs.api.sizes import check_sizes
from jobs.api.translation import plan_of
from jobs.ledger import read_manifest
from jobs.runner import Watcher, run_job
from jobs.spec import JobSpec
from jobs.store import locate, publish_bytes
from serving.errors import (
    InputChangedError,
    InterruptedJobError,
    JobHeldError,
    OtherJobError,
    SpanfillError,
    TooManyErrorsError,
    UsageError,
)
from serving.fleet import connected

PARENT_SECONDS = 1.0
"""How often to look whether the gateway lives that started this process: without it nobody would renew its claim."""

APP_SECONDS = 600.0
"""How long to wait for the application, which may be starting: beside it there may be no room for other engines."""

OF_ENGINES = ("engine.", "weights", "format")
"""What the fields of a job's identity that are its engines' begin with."""

FOR_GOOD = (UsageError, InputChangedError, TooManyErrorsError)
"""What another try does not mend."""


class _Log(Watcher):
    """Prints what the job runner says."""

    def say(self, message: str) -> None:
        """One line."""
        print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    folder, mode, parent = WorkFolder(Path(sys.argv[1])), cast(Mode, sys.argv[2]), int(sys.argv[3])
    threading.Thread(target=_end_without, args=(parent,), daemon=True).start()
    with _alone(folder) as is_alone:
        sys.exit(_work(folder, mode) if is_alone else EXIT_HELD)


def _end_without(parent: int) -> None:
    """Stop this process once its parent is gone, as the parent would have: another could not work in the folder."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _alone(folder: WorkFolder) -> Iterator[bool]:
    """Hold the folder, unless a process that an earlier gateway left behind has not let go of it yet."""
    with folder.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _work(folder: WorkFolder, mode: Mode) -> int:
    order = Order.model_validate_json(folder.order.read_bytes())
    try:
        outcome = _outcome(order, folder, mode)
    except InterruptedJobError as error:
        return error.exit_code
    except SpanfillError as error:
        _Log().say(f"{error.code}: {error}")
        outcome = Outcome(problem=_problem(error, folder))
    publish_bytes(locate(str(folder.outcome)), outcome.model_dump_json().encode())
    return 0


def _outcome(order: Order, folder: WorkFolder, mode: Mode) -> Outcome:
    if mode == "count":
        return Outcome(partial=tuple(partial_usage(order, folder)))
    return _batch(order, folder, mode) if order.kind == "batch" else _job(order, folder)


def _problem(error: SpanfillError, folder: WorkFolder) -> Problem:
    """An error as the tenant may read it: without the place of the server's files."""
    may_pass = isinstance(error, JobHeldError) or not isinstance(error, FOR_GOOD)
    return Problem(code=error.code, message=str(error).replace(f"{folder.path}/", ""), may_pass=may_pass)


def _batch(order: Order, folder: WorkFolder, mode: Mode) -> Outcome:
    plan = plan_of(order, folder)
    if plan.errors:
        return Outcome(errors=plan.errors)
    if mode == "run":
        with _beside(order.app):
            for group, options in enumerate(plan.groups):
                _run(group_spec(order, folder, group, options))
    folder.finalizing.touch()
    return deliver(order, folder, plan, mode)


def _job(order: Order, folder: WorkFolder) -> Outcome:
    spec = order.spec(order.source, folder.results(), dict(order.options))
    check_sizes(spec)
    with _beside(order.app):
        manifest = _run(spec)
    return Outcome(completed=manifest["input_rows"] - manifest["errors"], failed=manifest["errors"])


def _run(spec: JobSpec) -> dict[str, Any]:
    """Run a job or go on with it; returns the manifest.

    One that engines of another kind have begun (other weights, another dtype) and not finished is begun anew, so that
    one kind makes all of it.
    """
    try:
        return run_job(spec, watcher=_Log())
    except OtherJobError as error:
        if not all(name.startswith(OF_ENGINES) for name in error.differing):
            raise
        if (finished := read_manifest(locate(spec.output))) is not None:
            return finished
        _Log().say(f"begun anew: {error.message}")
        return run_job(spec.model_copy(update={"overwrite": True}), watcher=_Log())


@contextmanager
def _beside(app: str) -> Iterator[None]:
    """Be in the application's cluster, once it runs; where no cluster is named every job finds its own way."""
    if not os.environ.get("RAY_ADDRESS"):
        yield
        return
    with connected():
        _wait_for(app)
        yield


def _wait_for(app: str) -> None:
    patience = time.monotonic() + APP_SECONDS
    while (found := serve.status().applications.get(app)) is not None and found.status != "RUNNING":
        if time.monotonic() > patience:
            return
        time.sleep(1.0)


if __name__ == "__main__":
    main()
