"""OpenAI's ``/v1/files``: what batches and jobs read, and what batches have made."""

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from jobs.api.config import RoutesConfig
from jobs.api.database import new_id
from jobs.api.replies import (
    DOWNLOADED,
    MOST_LISTED,
    After,
    Deleted,
    ExpiresAfter,
    Id,
    Limit,
    Order,
    download,
    page_of,
)
from jobs.api.shelf import Shelf
from jobs.api.upload import FORM_REMEDY, Uploaded, receive, told_bytes
from serving.api.parts import WhoCalls
from serving.api.replies import POSTED, READ, documented
from serving.errors import UsageError
from serving.tenants.caller import Caller
from serving.tenants.tables import FileRow

PURPOSES = ("batch", "job")
Purpose = Literal["batch", "batch_output", "job"]


class FileReply(BaseModel):
    """A file; ``purpose`` is ``batch`` for JSONL of requests, ``job`` for Parquet, ``batch_output`` for results."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    expires_at: int


class Files(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3_600, "maximum": 2_592_000},
                    },
                }
            }
        },
    }
}


def file_reply(file: FileRow) -> FileReply:
    """What is told of a file."""
    return FileReply(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created),
        filename=file.name,
        purpose=cast(Purpose, file.purpose),
        expires_at=int(file.expires),
    )


def _row(uploaded: Uploaded, who: Caller, now: float, kept: float) -> FileRow:
    """The row of what was uploaded; raises ``UsageError`` for a wrong purpose or expiry."""
    purpose = uploaded.fields.get("purpose", "")
    if purpose not in PURPOSES:
        raise UsageError(f"purpose is {purpose!r}, neither batch nor job.", remedy=FORM_REMEDY)
    seconds = min(kept, _seconds(uploaded.fields) or kept)
    return FileRow(
        id=new_id("file-"),
        tenant=who.tenant,
        key=who.key,
        purpose=purpose,
        name=uploaded.name,
        bytes=uploaded.size,
        created=now,
        expires=now + seconds,
    )


def _seconds(fields: dict[str, str]) -> int | None:
    given = {name: fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds")}
    if given == {"anchor": None, "seconds": None}:
        return None
    try:
        return ExpiresAfter.model_validate(given).seconds
    except ValidationError:
        raise UsageError(
            "expires_after is neither absent nor an anchor created_at with 3600 to 2592000 seconds.",
            remedy="Correct it, or leave it out.",
        ) from None


def router(shelf: Shelf, caller: WhoCalls, config: RoutesConfig) -> APIRouter:
    """The routes; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["Files"])
    me = Depends(caller)

    @routes.post("/v1/files", response_model=FileReply, responses=documented(*POSTED), openapi_extra=FORM)
    async def upload(request: Request, who: Annotated[Caller, me]) -> FileReply:
        """Store a file: `file` and `purpose`, `batch` (JSONL) or `job` (Parquet)."""
        told = told_bytes(request)
        size = config.upload_bytes if told is None else min(told, config.upload_bytes)
        with shelf.uploading(who.tenant, size) as earlier, shelf.incoming(who.tenant) as path:
            room = await run_in_threadpool(shelf.room, who.tenant, earlier)
            uploaded = await receive(request, path, min(room, size))
            row = _row(uploaded, who, shelf.clock(), config.kept_seconds)
            return file_reply(await run_in_threadpool(shelf.store, row, path))

    @routes.get("/v1/files", response_model=Files, responses=documented(400, *READ))
    def files(
        who: Annotated[Caller, me],
        after: After = None,
        limit: Limit = MOST_LISTED,
        order: Order = "desc",
        purpose: Annotated[Purpose | None, Query()] = None,
    ) -> Files:
        """The tenant's files, the newest first."""
        found, more = shelf.page(who.tenant, page_of(limit, after, order), purpose)
        data = [file_reply(file) for file in found]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return Files(data=data, first_id=first, last_id=last, has_more=more)

    @routes.get("/v1/files/{file_id}", response_model=FileReply, responses=documented(400, *READ))
    def file(file_id: Id, who: Annotated[Caller, me]) -> FileReply:
        """One file."""
        return file_reply(shelf.find(who.tenant, file_id))

    @routes.get(
        "/v1/files/{file_id}/content",
        response_class=FileResponse,
        responses={**DOWNLOADED, **documented(400, 416, *READ)},
    )
    def content(file_id: Id, who: Annotated[Caller, me]) -> FileResponse:
        """A file's bytes."""
        found = shelf.find(who.tenant, file_id)
        return download(str(shelf.path(found)), found.id)

    @routes.delete("/v1/files/{file_id}", response_model=Deleted, responses=documented(400, *READ))
    def delete(file_id: Id, who: Annotated[Caller, me]) -> Deleted:
        """Delete a file; a batch or job that reads it goes on."""
        return Deleted(id=shelf.delete(who.tenant, file_id).id, object="file")

    return routes
