"""A batch's input, line by line: whose answer is wanted, and what is asked. Pure but for reading the stream."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.api.order import LineError
from serving.api.edge import MOST_BODY
from serving.api.fields import Text
from serving.config import Frozen

MOST_LINE = MOST_BODY
"""Bytes of a line: what the body of one request may have."""

MOST_CUSTOM_ID = 512

CODES = {"json_invalid": "invalid_json_line", "missing": "missing_required_parameter"}
"""OpenAI's names for what is wrong with a line, by pydantic's; others are ``invalid_parameter``."""


class BatchLine(BaseModel):
    """One request: the answer to ``body`` goes out under ``custom_id``; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    custom_id: Annotated[Text, Field(min_length=1, max_length=MOST_CUSTOM_ID)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]

    @property
    def model(self) -> Any:
        """The model that the body names, whatever it is."""
        return self.body.get("model")


class Refused(Frozen):
    """What one line is answered instead of an infill, as its request would have been: status and body."""

    status: int
    body: dict[str, Any]


class Record(Frozen):
    """What is kept of a line: how many ``prompts`` it has, or why none is run."""

    line: int
    custom_id: str
    prompts: int = 0
    refused: Refused | None = None


def numbered(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1; no more than ``MOST_LINE`` bytes of one, and one.

    A byte order mark, with which some editors begin a file, is no part of the first; ``stream`` is at its beginning.
    """
    number = 0
    if stream.read(len(BOM_UTF8)) != BOM_UTF8:
        stream.seek(0)
    while raw := stream.readline(MOST_LINE + 1):
        number += 1
        if raw.strip():
            yield number, raw


def parse_line(number: int, raw: bytes) -> BatchLine | LineError:
    """A line, or what is wrong with it."""
    if len(raw) > MOST_LINE:
        message = f"The line is longer than {MOST_LINE:,} bytes. Send less text."
        return LineError(code="line_too_long", message=message, line=number)
    try:
        return BatchLine.model_validate_json(raw)
    except ValidationError as error:
        return _wrong(number, error)


def _wrong(number: int, error: ValidationError) -> LineError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"])) or None
    told = first["msg"] if param is None else f"{param}: {first['msg']}"
    return LineError(code=CODES.get(first["type"], "invalid_parameter"), message=f"{told}.", line=number, param=param)


def read_records(stream: IO[bytes]) -> Iterator[Record]:
    """The records of a batch's lines, in their order."""
    for raw in stream:
        yield Record.model_validate_json(raw)
