"""OpenAI's ``/v1/batches``: many requests in a file, answered beside those that people wait for."""

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from jobs.api.admins import OfTenant, ended_tenant, seen_tenant
from jobs.api.config import RoutesConfig
from jobs.api.queue import Queue
from jobs.api.replies import After, ExpiresAfter, Id, Limit, Metadata, page_of, seconds_of
from jobs.api.shelf import Shelf
from jobs.api.submission import new_work, submit
from serving.api.ask import Service
from serving.api.parts import WhoCalls
from serving.api.replies import POSTED, READ, documented
from serving.errors import UsageError
from serving.tenants.caller import Caller
from serving.tenants.tables import WorkRow

Endpoint = Literal["/v1/completions", "/v1/fim/completions"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
LISTED = 20
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class BatchRequest(BaseModel):
    """A batch: an uploaded JSONL file, and where each of its lines would be sent."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    input_file_id: Annotated[str, Field(max_length=256)]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(BaseModel):
    """What is wrong with a line, or with all of the batch."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """Why a batch has failed."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Lines; while the batch runs, as many as the share of its prompts that are done."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(BaseModel):
    """Of the input tokens, those found in the prefix cache."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Of the output tokens, those of no text: none."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of a batch."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Batch(BaseModel):
    """A batch; times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    model: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None


class Batches(BaseModel):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_reply(work: WorkRow) -> Batch:
    """What is told of a batch."""
    told, details = work.told, work.details
    values: dict[str, Any] = {f"{name}_at": seconds_of(told, f"{name}_at") for name in TIMES}
    return Batch(
        id=work.id,
        endpoint=details["endpoint"],
        model=work.model,
        errors=BatchErrors(data=told["errors"]) if told.get("errors") else None,
        input_file_id=work.source,
        status=cast(BatchStatus, "validating" if work.status == "queued" else work.status),
        output_file_id=told.get("output_file_id"),
        error_file_id=told.get("error_file_id"),
        created_at=int(work.created),
        expires_at=None if work.expires is None else int(work.expires),
        request_counts=RequestCounts(**told.get("counts", {})),
        usage=_usage(told.get("usage")),
        metadata=details["metadata"],
        **values,
    )


def _usage(told: dict[str, int] | None) -> BatchUsage | None:
    if told is None:
        return None
    prompt, completion = told["prompt_tokens"], told["completion_tokens"]
    return BatchUsage(
        input_tokens=prompt,
        input_tokens_details=InputDetails(cached_tokens=told["cached_tokens"]),
        output_tokens=completion,
        total_tokens=prompt + completion,
    )


def _submit(sent: BatchRequest, who: Caller, model: str, shelf: Shelf, queue: Queue, config: RoutesConfig) -> WorkRow:
    """A new batch in the queue, its input beside it; raises ``NotFoundError``, ``UsageError``, ``LimitError``."""
    file = shelf.find(who.tenant, sent.input_file_id)
    if file.purpose != "batch":
        raise UsageError(f"The file's purpose is {file.purpose}.", remedy="Upload it with the purpose batch.")
    if file.bytes > config.batch_bytes:
        raise UsageError(f"The file has more than {config.batch_bytes:,} bytes.", remedy="Split it.")
    shelf.room(who.tenant)
    kept = sent.output_expires_after.seconds if sent.output_expires_after else config.kept_seconds
    details = {"endpoint": sent.endpoint, "metadata": sent.metadata, "kept": min(kept, config.kept_seconds)}
    work = new_work("batch", who, model, file.id, details, queue.clock(), config.window_seconds)
    return submit(work, file, who.weight, shelf, queue)


def router(service: Service, shelf: Shelf, queue: Queue, caller: WhoCalls, config: RoutesConfig) -> APIRouter:
    """The routes; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["Batches"])
    me = Depends(caller)

    @routes.post("/v1/batches", response_model=Batch, responses=documented(*POSTED))
    def create(sent: BatchRequest, who: Annotated[Caller, me]) -> Batch:
        """Run the requests of an uploaded file within 24 hours."""
        model = service.model(None, who).name
        return batch_reply(_submit(sent, who, model, shelf, queue, config))

    @routes.get("/v1/batches", response_model=Batches, responses=documented(400, *READ))
    def batches(
        who: Annotated[Caller, me], after: After = None, limit: Limit = LISTED, tenant: OfTenant = None
    ) -> Batches:
        """The tenant's batches, the newest first; for an admin any tenant's."""
        found, more = queue.page(seen_tenant(who, tenant), "batch", page_of(limit, after))
        data = [batch_reply(work) for work in found]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return Batches(data=data, first_id=first, last_id=last, has_more=more)

    @routes.get("/v1/batches/{batch_id}", response_model=Batch, responses=documented(400, *READ))
    def batch(batch_id: Id, who: Annotated[Caller, me]) -> Batch:
        """One batch."""
        return batch_reply(queue.find(who.tenant, "batch", batch_id))

    @routes.post("/v1/batches/{batch_id}/cancel", response_model=Batch, responses=documented(400, *READ))
    def cancel(batch_id: Id, who: Annotated[Caller, me]) -> Batch:
        """End a batch; what is done by then is delivered. An admin may end any tenant's."""
        return batch_reply(queue.cancel(ended_tenant(who), "batch", batch_id))

    return routes
