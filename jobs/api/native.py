"""``/v1/jobs``: Parquet of prefix/suffix pairs in, Parquet of infills out, as ``spanfill run`` does it."""

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from jobs.api.admins import OfTenant, ended_tenant, seen_tenant
from jobs.api.config import RoutesConfig
from jobs.api.inputs import check_address
from jobs.api.options import JobOptions
from jobs.api.parts import find_part, part_files
from jobs.api.queue import Queue
from jobs.api.replies import DOWNLOADED, After, Deleted, ErrorOf, Id, Limit, Metadata, download, page_of, seconds_of
from jobs.api.shelf import Shelf
from jobs.api.submission import new_work, submit
from serving.api.ask import Service
from serving.api.fields import Name
from serving.api.parts import WhoCalls
from serving.api.replies import POSTED, READ, documented
from serving.errors import UsageError
from serving.tenants.caller import Caller
from serving.tenants.tables import FileRow, WorkRow

JobStatus = Literal["queued", "in_progress", "cancelling", "cancelled", "completed", "failed"]
Folder = Literal["data", "errors"]
LISTED = 20
MOST_ADDRESS = 1_024


class JobRequest(BaseModel):
    """A job: the id of an uploaded file of purpose `job`, or an address that the operator allows, and options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Annotated[str, Field(min_length=1, max_length=MOST_ADDRESS)]
    model: Name | None = None
    options: JobOptions = JobOptions()
    metadata: Metadata | None = None


class JobProgress(BaseModel):
    """How far a job is, as `spanfill status` tells it; ``eta_seconds`` is null when unknown."""

    rows: int = 0
    total_rows: int = 0
    parts: int = 0
    total_parts: int = 0
    rows_per_second: float = 0.0
    eta_seconds: float | None = None
    errors: int = 0
    error_codes: dict[str, int] = Field(default_factory=dict)


class JobUsage(BaseModel):
    """Tokens of the parts that are out; of a job that ended early, also of the rows that were answered without one."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Job(BaseModel):
    """A job; times are seconds since 1970, ``expires_at`` is when its results are deleted."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    model: str
    input: str
    options: dict[str, Any]
    metadata: dict[str, str] | None
    progress: JobProgress
    usage: JobUsage
    error: ErrorOf | None
    created_at: int
    started_at: int | None
    ended_at: int | None
    expires_at: int | None


class Jobs(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Part(BaseModel):
    """A Parquet file: `data` holds infills, `errors` the rows that could not be done."""

    object: Literal["part"] = "part"
    folder: Folder
    name: str
    bytes: int


class Parts(BaseModel):
    """What a job has finished so far."""

    object: Literal["list"] = "list"
    data: list[Part]


def job_reply(work: WorkRow, kept: float) -> Job:
    """What is told of a job."""
    told = work.told
    return Job(
        id=work.id,
        status=cast(JobStatus, work.status),
        model=work.model,
        input=work.source,
        options=work.details["options"],
        metadata=work.details["metadata"],
        progress=JobProgress(**told.get("progress", {})),
        usage=JobUsage(**told.get("usage", {})),
        error=ErrorOf(**told["problem"]) if told.get("problem") else None,
        created_at=int(work.created),
        started_at=seconds_of(told, "in_progress_at"),
        ended_at=None if work.ended is None else int(work.ended),
        expires_at=None if work.ended is None else int(work.ended + kept),
    )


def _submit(sent: JobRequest, who: Caller, model: str, shelf: Shelf, queue: Queue, config: RoutesConfig) -> WorkRow:
    """A new job in the queue; raises ``NotFoundError``, ``UsageError``, ``ForbiddenError``, ``LimitError``."""
    file: FileRow | None = None
    if "://" in sent.input or "/" in sent.input:
        check_address(sent.input, config.input_prefixes)
    else:
        file = shelf.find(who.tenant, sent.input)
        if file.purpose != "job":
            raise UsageError(f"The file's purpose is {file.purpose}.", remedy="Upload it with the purpose job.")
    shelf.room(who.tenant)
    details = {"options": sent.options.chosen(), "metadata": sent.metadata}
    work = new_work("job", who, model, sent.input, details, queue.clock())
    return submit(work, file, who.weight, shelf, queue)


def router(service: Service, shelf: Shelf, queue: Queue, caller: WhoCalls, config: RoutesConfig) -> APIRouter:
    """The routes; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["Jobs"])
    me = Depends(caller)
    kept = config.kept_seconds

    @routes.post("/v1/jobs", response_model=Job, responses=documented(*POSTED))
    def create(sent: JobRequest, who: Annotated[Caller, me]) -> Job:
        """Infill or score every row of a Parquet file."""
        model = service.model(sent.model, who).name
        return job_reply(_submit(sent, who, model, shelf, queue, config), kept)

    @routes.get("/v1/jobs", response_model=Jobs, responses=documented(400, *READ))
    def jobs(who: Annotated[Caller, me], after: After = None, limit: Limit = LISTED, tenant: OfTenant = None) -> Jobs:
        """The tenant's jobs, the newest first; for an admin any tenant's."""
        found, more = queue.page(seen_tenant(who, tenant), "job", page_of(limit, after))
        data = [job_reply(work, kept) for work in found]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return Jobs(data=data, first_id=first, last_id=last, has_more=more)

    @routes.get("/v1/jobs/{job_id}", response_model=Job, responses=documented(400, *READ))
    def job(job_id: Id, who: Annotated[Caller, me]) -> Job:
        """One job, and how far it is."""
        return job_reply(queue.find(who.tenant, "job", job_id), kept)

    @routes.post("/v1/jobs/{job_id}/cancel", response_model=Job, responses=documented(400, *READ))
    def cancel(job_id: Id, who: Annotated[Caller, me]) -> Job:
        """End a job; the parts that are out stay. An admin may end any tenant's."""
        return job_reply(queue.cancel(ended_tenant(who), "job", job_id), kept)

    @routes.delete("/v1/jobs/{job_id}", response_model=Deleted, responses=documented(400, *READ))
    def delete(job_id: Id, who: Annotated[Caller, me]) -> Deleted:
        """Delete a job that has ended, and its results."""
        work = queue.delete(who.tenant, "job", job_id)
        shelf.remove(shelf.work_folder(who.tenant, work.id))
        return Deleted(id=work.id, object="job")

    @routes.get("/v1/jobs/{job_id}/results", response_model=Parts, responses=documented(400, *READ))
    def results(job_id: Id, who: Annotated[Caller, me]) -> Parts:
        """The parts that are out, while the job runs too."""
        work = queue.find(who.tenant, "job", job_id)
        found = part_files(shelf.work_folder(who.tenant, work.id))
        data = [Part(folder=cast(Folder, part.folder), name=part.name, bytes=part.size) for part in found]
        return Parts(data=data)

    @routes.get(
        "/v1/jobs/{job_id}/results/{folder}/{name}",
        response_class=FileResponse,
        responses={**DOWNLOADED, **documented(400, 416, *READ)},
    )
    def result(job_id: Id, folder: Id, name: Id, who: Annotated[Caller, me]) -> FileResponse:
        """A part's bytes: Parquet."""
        work = queue.find(who.tenant, "job", job_id)
        part = find_part(shelf.work_folder(who.tenant, work.id), folder, name)
        return download(str(part.path), part.name)

    return routes
