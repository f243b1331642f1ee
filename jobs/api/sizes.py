"""What a tenant's input may take of the server's memory: rows and pages of so many bytes, whatever its footer says."""

from collections.abc import Collection, Mapping
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.pages import DELTA_BYTE_ARRAY, MOST_DELTA_PAGE, chunks_of, names_delta, pages_of
from jobs.plan import InputFile
from jobs.reader import InputSet, find_input
from jobs.spec import JobSpec
from jobs.store import Location, patient
from serving.errors import InputError

MOST_HELD = 128 << 20
"""Bytes of the largest pages of all columns together, which are in memory at once, or of a row on average.

Not of a row group: it is read a page at a time, and pyarrow makes one of a million rows. Writers end a page at a
megabyte, but look once in a thousand values: a column of source files has pages of ten or twenty.
"""

NUMBER_BYTES = 8


def check_sizes(spec: JobSpec) -> None:
    """Raise ``InputError`` for an input of which a job would take more memory than it may have.

    Of a file on the disk, which a tenant has sent, every page is looked at; of others the footer is believed.
    """
    inputs = find_input(spec.input, patience=spec.store_patience)
    kept = inputs.schema.names if spec.keep_columns is None else spec.keep_columns
    _check(inputs, {*kept, *map(spec.column, spec.roles)})


def _check(inputs: InputSet, columns: Collection[str]) -> None:
    for file in inputs.files:
        patient(inputs.root, partial(_check_file, inputs.root, file, columns))


def _check_file(root: Location, file: InputFile, columns: Collection[str]) -> None:
    with root.fs.open_input_file(file.path) as source:
        metadata = pq.ParquetFile(source).metadata
        leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
        widths = {leaf.path: leaf.length for leaf in leaves}
        for number in range(metadata.num_row_groups):
            group, where = metadata.row_group(number), f"{file.name}, row group {number}"
            _check_rows(group, columns, where)
            if root.is_local:
                _check_pages(source, group, columns, widths, where)


def _check_rows(group: pq.RowGroupMetaData, columns: Collection[str], where: str) -> None:
    mean = sum(chunk.total_uncompressed_size for chunk in chunks_of(group, columns)) // max(1, group.num_rows)
    if mean > MOST_HELD:
        raise _too_large(f"{where}: its rows have {mean:,} bytes on average", MOST_HELD)


def _check_pages(
    source: pa.NativeFile,
    group: pq.RowGroupMetaData,
    columns: Collection[str],
    widths: Mapping[str, int],
    where: str,
) -> None:
    """``widths`` are the bytes of the values of columns whose values have all the same, by their paths."""
    held = 0
    for chunk in chunks_of(group, columns):
        largest, width = 0, max(NUMBER_BYTES, widths[chunk.path_in_schema])
        for number, page in enumerate(pages_of(source, chunk, where)):
            if page.is_dictionary and number:
                raise InputError(
                    f"{where}: column {chunk.path_in_schema} has a dictionary behind its values.",
                    remedy="Write the file again.",
                )
            if page.encoding == DELTA_BYTE_ARRAY and not (names_delta(chunk) and page.size <= MOST_DELTA_PAGE):
                kind = f"{chunk.path_in_schema} has a DELTA_BYTE_ARRAY page of {page.size:,} bytes"
                raise _too_large(f"{where}: column {kind}", MOST_DELTA_PAGE)
            largest = max(largest, page.size, width * page.values)
        held += largest
        if held > MOST_HELD:
            name = chunk.path_in_schema
            raise _too_large(f"{where}: pages up to column {name}, the largest of each, have {held:,} bytes", MOST_HELD)


def _too_large(what: str, most: int) -> InputError:
    return InputError(
        f"{what}, more than {most:,}.",
        remedy="Leave such rows out, or columns (keep_columns), or write the file with smaller pages (data_page_size).",
    )
