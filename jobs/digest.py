"""The digest of a unit's input: what its infills were made from, whatever file, time or encoding it came in."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.reader import is_text


class InputDigest:
    """A running digest of the columns that make a row's prompt and seed.

    Each column has two: one of its values' lengths (-1 for null) and one of their bytes, so that equal rows give equal
    digests however they are cut into batches.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._hashes = {name: (_hash(name), _hash(name)) for name in columns}

    def add(self, batch: pa.RecordBatch) -> None:
        """Go on with the next rows."""
        for name, (lengths, content) in self._hashes.items():
            values = as_bytes(batch.column(name))
            lengths.update(pc.fill_null(pc.binary_length(values), -1).to_numpy(zero_copy_only=False).tobytes())
            content.update(_bytes(values.drop_null()))

    def hexdigest(self) -> str:
        """Thirty-two hexadecimal digits."""
        return _hash("".join(h.hexdigest() for pair in self._hashes.values() for h in pair)).hexdigest()


def _hash(text: str) -> "hashlib.blake2b":
    return hashlib.blake2b(text.encode(), digest_size=16)


def as_bytes(column: pa.Array) -> pa.Array:
    """A column of any kind of text, or of numbers as text, as large binary."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.binary_view())
    elif not is_text(column.type):
        column = column.cast(pa.large_string())
    return column.cast(pa.large_binary())


def _bytes(values: pa.Array) -> memoryview | bytes:
    """The bytes of all values one after the other, without a copy."""
    if len(values) == 0:
        return b""
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    return memoryview(data)[ends[0] : ends[-1]] if data is not None else b""
