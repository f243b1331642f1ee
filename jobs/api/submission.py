"""From a request to a work in the queue, with what it reads beside it."""

import shutil
from typing import Any

from jobs.api.database import new_id
from jobs.api.order import Kind
from jobs.api.queue import Queue, kind_of
from jobs.api.shelf import Shelf, place
from serving.errors import DatabaseAwayError, NotFoundError
from serving.tenants.caller import Caller
from serving.tenants.tables import FileRow, WorkRow


def new_work(
    kind: Kind, who: Caller, model: str, source: str, details: dict[str, Any], now: float, seconds: float | None = None
) -> WorkRow:
    """A work that begins to wait ``now``; after ``seconds``, where they are given, it ends however far it is."""
    return WorkRow(
        id=new_id(f"{kind}_"),
        kind=kind,
        tenant=who.tenant,
        key=who.key,
        model=model,
        status="queued",
        source=source,
        details=details,
        told={},
        bytes=0,
        created=now,
        expires=None if seconds is None else now + seconds,
        ended=None,
        ready=now,
        tries=0,
        holder=None,
        held_until=None,
    )


def submit(work: WorkRow, file: FileRow | None, weight: float, shelf: Shelf, queue: Queue) -> WorkRow:
    """Queue a work that reads ``file``, which may be deleted from then on.

    Raises ``NotFoundError`` when it was deleted before, ``LimitError`` when the tenant has too many unfinished works.
    """
    folder = shelf.work_folder(work.tenant, work.id)
    folder.path.mkdir(mode=0o700, parents=True)
    try:
        if file is not None:
            place(shelf.path(file), folder.source(kind_of(work)))
            work.bytes = file.bytes
        work.details = {**work.details, "weight": weight}
        return queue.submit(work, weight=weight)
    except DatabaseAwayError:
        raise  # Only the answer may be lost, and then the work is there: the sweep removes what none knows of.
    except BaseException as error:
        shutil.rmtree(folder.path, ignore_errors=True)
        if isinstance(error, FileNotFoundError):
            raise NotFoundError("The file was deleted.", remedy="Upload it again.") from None
        raise
