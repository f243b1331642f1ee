"""Parts of what the routes of files, batches and jobs take and answer."""

import os
from typing import Annotated, Any, Literal

from fastapi import HTTPException, Path, Query
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from jobs.api.database import Page
from serving.api.fields import Text
from serving.errors import NotFoundError, UsageError

MOST_LISTED = 100
MOST_PAIRS = 16
HOUR, MONTH = 3_600, 2_592_000

Id = Annotated[str, Path(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED)]
After = Annotated[str | None, Query(max_length=256, description="The id behind which the page begins.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By the time of creation.")]

Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=MOST_PAIRS),
]
"""What a client likes to remember: 16 pairs of 64 and 512 characters."""


class ExpiresAfter(BaseModel):
    """For how many seconds a file is kept."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=HOUR, le=MONTH)]


class ErrorOf(BaseModel):
    """Why a batch or job failed as a whole."""

    code: str
    message: str


class Deleted(BaseModel):
    """Something that is gone."""

    id: str
    object: str
    deleted: Literal[True] = True


def page_of(limit: int, after: str | None, order: str = "desc") -> Page:
    """The page that a client asks for."""
    return Page(limit, after, ascending=order == "asc")


def seconds_of(told: dict[str, JsonValue], name: str) -> int | None:
    """A time among what is told of a work, in whole seconds since 1970."""
    value = told.get(name)
    return int(value) if isinstance(value, int | float) else None


class Download(FileResponse):
    """A file: that it is gone, or that it has no such range, is told as all errors are, unlike what Starlette says.

    Of other units than bytes the whole file is sent (RFC 9110, 14.2).
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; raises ``NotFoundError``, and ``UsageError`` and FastAPI's own error for a range that is none."""

        async def told(message: Message) -> None:
            status = message.get("status")
            if status == 416:
                size = Headers(raw=message["headers"])["content-range"]
                raise HTTPException(416, "The file has no such range", headers={"Content-Range": size})
            if status == 400:
                raise UsageError("The Range header is none.", remedy="Send Range: bytes=FROM-TO, or leave it out.")
            await send(message)

        known = [(name, value) for name, value in scope["headers"] if name != b"range" or not _has_other_unit(value)]
        try:
            self.stat_result = await run_in_threadpool(os.stat, self.path)
        except FileNotFoundError:
            raise NotFoundError("It was deleted meanwhile.", remedy="List what there is.") from None
        self.set_stat_headers(self.stat_result)
        await super().__call__({**scope, "headers": known}, receive, told)


def _has_other_unit(wanted: bytes) -> bool:
    unit, equals, _ = wanted.partition(b"=")
    return bool(equals) and unit.strip().lower() != b"bytes"


def download(path: str, name: str) -> FileResponse:
    """A file's bytes, which no browser shall take for a page; ``name`` is one of ours."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "X-Content-Type-Options": "nosniff"}
    return Download(path, media_type="application/octet-stream", headers=headers)


DOWNLOADED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The bytes."},
    206: {"content": {"application/octet-stream": {}}, "description": "The range of them that was asked for."},
}
"""OpenAPI's description of a download."""
