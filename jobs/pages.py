"""What the pages of a Parquet file have in memory, by their headers: what is allocated, whatever the footer says.

Twenty kilobytes may hold a page of a gigabyte, or a million rows that all name one long text of a dictionary.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import InputError

HEADER_BYTES = (1 << 10, 64 << 10, 16 << 20)
"""How much to read for a header, which may hold statistics; Arrow reads none that is longer."""

DICTIONARY_PAGE = 2
ABOUT = {0: (5, 2), DICTIONARY_PAGE: (7, 2), 3: (8, 4)}
"""By a page's type: the field of its header that tells of its values, and which field there is their encoding."""

I32 = 5
MOST_FIELD = (1 << 15) - 1
DELTA_BYTE_ARRAY = 7
"""The encoding of a page whose every value may repeat the one before, as page headers name it."""

MOST_DELTA_PAGE = 16 << 20
"""Bytes of such a page at most that ``row_bytes`` takes to be there where the footer names the encoding."""

DEPTH = 4


@dataclass(frozen=True, slots=True)
class Page:
    """A page's header: its bytes in memory, and where the next one begins."""

    is_dictionary: bool
    encoding: int
    size: int
    values: int
    end: int


def chunks_of(group: pq.RowGroupMetaData, columns: Collection[str]) -> Iterator[pq.ColumnChunkMetaData]:
    """The column chunks of a row group that hold these columns, or fields of them."""
    for number in range(group.num_columns):
        chunk = group.column(number)
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
            yield chunk


def pages_of(source: pa.NativeFile, chunk: pq.ColumnChunkMetaData, where: str) -> Iterator[Page]:
    """The pages of a column chunk; raises ``InputError`` where there is none."""
    at = _start(chunk)
    end = at + chunk.total_compressed_size
    while at < end:
        page = _page(source, at)
        if page is None or not at < page.end <= end:
            raise InputError(f"{where}: column {chunk.path_in_schema} is damaged.", remedy="Write the file again.")
        yield page
        at = page.end


def row_bytes(source: pa.NativeFile, group: pq.RowGroupMetaData, columns: Collection[str]) -> int:
    """Bytes that a row of these columns may have: a mean one by the footer, but all that rows may name or repeat."""
    rows = max(1, group.num_rows)
    chunks = chunks_of(group, columns)
    return sum(max(chunk.total_uncompressed_size // rows, _repeated_bytes(source, chunk)) for chunk in chunks)


def _repeated_bytes(source: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> int:
    page = _page(source, _start(chunk))
    dictionary = page.size if page is not None and page.is_dictionary else 0
    return max(dictionary, MOST_DELTA_PAGE if names_delta(chunk) else 0)


def names_delta(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether the footer says that values may repeat the one before."""
    return "DELTA_BYTE_ARRAY" in chunk.encodings


def _start(chunk: pq.ColumnChunkMetaData) -> int:
    """Where Arrow begins to read a chunk."""
    first: int = chunk.data_page_offset
    return min(first, chunk.dictionary_page_offset or first)


def _page(source: pa.NativeFile, at: int) -> Page | None:
    for length in HEADER_BYTES:
        data = source.read_at(length, at)
        try:
            return _header(data, at)
        except IndexError:
            if len(data) < length:
                return None
        except ValueError:
            return None
    return None


def _header(data: bytes, at: int) -> Page:
    """Parse a ``PageHeader`` of parquet.thrift; raises ``ValueError``, ``IndexError`` where ``data`` ends too early."""
    reader = _Compact(data)
    fields = reader.struct()
    field, encoding = ABOUT.get(fields.get(1, -1), (0, 0))
    about = fields.get(field)
    if not isinstance(about, dict):
        raise ValueError("no page header")
    told = (fields[1], fields.get(2), fields.get(3), about.get(encoding), about.get(1))
    numbers = [value for value in told if type(value) is int and value >= 0]
    if len(numbers) < len(told):
        raise ValueError("no page header")
    kind, size, stored, how, values = numbers
    return Page(kind == DICTIONARY_PAGE, how, size, values, at + reader.at + stored)


class _Compact:
    """Reads Thrift's compact protocol, as far as page headers use it."""

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self._data = data

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """A struct's fields by their numbers, None for what is no i32 nor struct.

        Raises ``ValueError`` for what readers could take in different ways: a field that is there twice, a number of
        more bits than its type has.
        """
        if depth > DEPTH:
            raise ValueError("a header is nested too deep")
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            if number in found or not 0 < number <= MOST_FIELD:
                raise ValueError("a field is there twice")
            found[number] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return None
        if kind in (4, I32, 6):
            value = self._integer()
            if kind == I32 and not -(1 << 31) <= value < 1 << 31:
                raise ValueError("a number is too large")
            return value if kind == I32 else None
        if kind == 12:
            return self.struct(depth + 1)
        if kind not in (3, 7, 8):
            raise ValueError("page headers hold no such field")
        skipped = {3: 1, 7: 8}[kind] if kind != 8 else self._varint()
        self.at += skipped
        return None

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
