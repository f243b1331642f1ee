"""A file that comes as ``multipart/form-data``: to the disk as Serve hands it on, and no more than it may hold."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from serving.errors import UsageError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

ENVELOPE_BYTES = 64 << 10
"""What a body may hold besides the file."""

FIELD_BYTES = 1 << 10
MOST_FIELDS = 16
MOST_NAME_CHARS = 255
FORM_REMEDY = "Send multipart/form-data with the fields file and purpose."


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What came: the file's name as its sender calls it, printable and no path here; its bytes; the other fields."""

    name: str
    size: int
    fields: dict[str, str]


def told_bytes(request: Request) -> int | None:
    """The length of a body as its head tells it; None where it comes in chunks."""
    told = request.headers.get("content-length", "")
    return int(told) if told.isdecimal() else None


async def receive(request: Request, target: Path, most: int) -> Uploaded:
    """Write the body's file to ``target``.

    Raises ``HTTPException`` with 413 as soon as it is known to have more than ``most`` bytes, ``UsageError`` for what
    is no form with one file.
    """
    told = told_bytes(request)
    if told is not None and told > most + ENVELOPE_BYTES:
        raise _too_large(most)
    upload = await asyncio.to_thread(Upload, request.headers.get("content-type", ""), target, most)
    try:
        async for chunk in request.stream():
            await asyncio.to_thread(upload.feed, chunk)
        return await asyncio.to_thread(upload.finish)
    finally:
        upload.close()


class Upload:
    """A body that comes in chunks, written to ``target``."""

    def __init__(self, content_type: str, target: Path, most: int) -> None:
        self._parser = self._parser_of(content_type)
        self._most = most
        self._seen = self._size = 0
        self._name: str | None = None
        self._fields: dict[str, str] = {}
        self._header, self._value, self._disposition = b"", b"", b""
        self._field: str | None = None
        self._text = b""
        self._is_whole = False
        self._file = target.open("xb")

    def _parser_of(self, content_type: str) -> MultipartParser:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise _no_form("The body is no form")
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._begin_content,
            "on_part_data": self._content,
            "on_part_end": self._end,
            "on_end": self._whole,
        }
        try:
            return MultipartParser(options[b"boundary"], callbacks)
        except FormParserError as error:
            raise _no_form(f"The form is malformed: {error}") from None

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk."""
        self._seen += len(chunk)
        if self._seen > self._most + ENVELOPE_BYTES:
            raise _too_large(self._most)
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _no_form(f"The form is malformed: {error}") from None
        if self._seen - self._size > ENVELOPE_BYTES:
            raise _no_form(f"The form holds more than {ENVELOPE_BYTES:,} bytes besides its file")

    def finish(self) -> Uploaded:
        """What came, on the disk."""
        if not self._is_whole:
            raise _no_form("The form ends before its end")
        if self._name is None:
            raise _no_form("The form has no file")
        self._file.flush()
        os.fsync(self._file.fileno())
        return Uploaded(self._name, self._size, self._fields)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _begin(self) -> None:
        self._disposition, self._field, self._text = b"", None, b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode(errors="replace")
        if field == "file":
            if self._name is not None:
                raise _no_form("The form has two files")
            self._name = _printable(options.get(b"filename", b"file"))
        elif b"filename" in options or len(self._fields) == MOST_FIELDS:
            raise _no_form(f"The form has a part {field[:MOST_NAME_CHARS]!r} that does not belong there")
        else:
            self._field = field

    def _content(self, data: bytes, start: int, end: int) -> None:
        if self._field is not None:
            self._text += data[start:end]
            if len(self._text) > FIELD_BYTES:
                raise _no_form("The form has a field that is too long")
            return
        self._size += end - start
        if self._size > self._most:
            raise _too_large(self._most)
        self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        if self._field is not None:
            self._fields[self._field] = self._text.decode(errors="replace")

    def _whole(self) -> None:
        self._is_whole = True


def _printable(name: bytes) -> str:
    text = name.decode(errors="replace")[:MOST_NAME_CHARS]
    return "".join(char if char.isprintable() else "\ufffd" for char in text) or "file"


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"The file is larger than {most:,} bytes")


def _no_form(what: str) -> UsageError:
    return UsageError(f"{what}.", remedy=FORM_REMEDY)
