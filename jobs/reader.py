"""Parquet in: find the files, check their footers and columns, stream row ranges."""

import fnmatch
import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from jobs.pages import row_bytes
from jobs.plan import InputFile, Unit
from jobs.store import PATIENCE_SECONDS, Location, locate, may_pass, patient
from serving.errors import InputChangedError, InputError

PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
READ_ROWS = 1_024
READ_BYTES = 64 << 20
"""Of rows that are read at once, uncompressed, as far as a row group's mean row tells."""

FOOTER_READERS = 16
RETRY_SECONDS = 1.0
OUTPUT_COLUMNS = [
    "infill",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "prefix_chars",
    "suffix_chars",
    "truncated",
    "sample",
]
SCORE_COLUMNS = ["sum_logprob", "mean_logprob", "tokens", "bits_per_byte"]
"""What a job adds that scores."""

ORIGIN_FILE, ORIGIN_ROW = "__spanfill_file", "__spanfill_row"
"""Columns of a gathered copy that tell where in the input each of its rows was."""

ERROR_COLUMNS = ["source_file", "source_row", "error_code", "error_message", "attempts"]


@dataclass(frozen=True)
class InputSet:
    """The files of a job, all of one schema."""

    root: Location
    files: tuple[InputFile, ...]
    schema: pa.Schema
    ignored: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)


def find_input(uri: str, *, patience: float = PATIENCE_SECONDS) -> InputSet:
    """The Parquet files of a path: a file, a folder (hidden and ``_`` files aside) or a glob.

    In a glob, ``*`` stays inside one folder and ``**`` stands for any number of them; what is there under the name as
    it is written is no glob. Raises ``InputError`` naming the file when there is none, when one is not Parquet or
    damaged, or when two differ in their columns' names or types.
    """
    return inputs_at(locate(uri, patience=patience), named=uri)


def inputs_at(root: Location, *, named: str) -> InputSet:
    """As ``find_input``, of a location; ``named`` is what an error calls it."""
    infos, base, ignored = _list(root)
    files, schema = [], None
    for file, found in _footers(root, infos, base):
        if double := next((name for name in found.names if found.names.count(name) > 1), None):
            raise InputError(f"{file.name}: column {double} is there twice.", remedy="Rename one of them.")
        if schema is not None and (difference := _difference(schema, found)):
            raise InputError(f"{file.name}: {difference}, unlike {files[0].name}.", remedy="Give each schema a job.")
        schema = schema or found
        files.append(file)
    if schema is None:
        seen = f" ({len(ignored)} other files were seen)" if ignored else ""
        raise InputError(
            f"{named}: no Parquet file is there{seen}.",
            remedy="Give a file, a folder or a glob of .parquet files (** goes down into folders).",
        )
    return InputSet(root, tuple(files), schema, tuple(ignored))


def _list(root: Location) -> tuple[list[pafs.FileInfo], str, list[str]]:
    base, glob = _split_glob(root)
    if glob:
        found = _walk(root, base, recursive=len(glob) > 1 or "**" in glob)
        return [i for i in found if _matches(PurePosixPath(i.path).relative_to(base).parts, glob)], base, []
    info = _info(root, root.path)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{root} does not exist.", remedy="Check --input.")
    if info.type == pafs.FileType.File:
        return [info], PurePosixPath(info.path).parent.as_posix(), []
    visible = [i for i in _walk(root, root.path) if not _hidden(i.path, root.path)]
    parquet = [i for i in visible if i.path.endswith(PARQUET_SUFFIXES)]
    return parquet, root.path.rstrip("/"), [i.path for i in visible if i not in parquet]


def _info(root: Location, path: str) -> pafs.FileInfo:
    try:
        return root.fs.get_file_info(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreachable(root, error) from error


def _unreachable(root: Location, error: Exception) -> InputError:
    return InputError(
        f"{root} cannot be reached: {str(error).rstrip('. ')}.", remedy="Check the address and your credentials."
    )


def _split_glob(root: Location) -> tuple[str, tuple[str, ...]]:
    """The path down to where no such file or folder is there, and the parts of the glob below it."""
    parts = PurePosixPath(root.path).parts
    for at, part in enumerate(parts):
        literal = PurePosixPath(*parts[: at + 1]).as_posix()
        if any(c in part for c in "*?[") and _info(root, literal).type == pafs.FileType.NotFound:
            return PurePosixPath(*parts[:at]).as_posix(), parts[at:]
    return root.path, ()


def _matches(parts: Sequence[str], glob: Sequence[str]) -> bool:
    """Whether a path matches part by part; hidden parts only a glob's part that begins with a dot itself."""
    if not glob or not parts:
        return not parts and all(part == "**" for part in glob)
    visible = glob[0].startswith(".") or not parts[0].startswith(".")
    if glob[0] == "**":
        return _matches(parts, glob[1:]) or (visible and _matches(parts[1:], glob))
    return visible and fnmatch.fnmatchcase(parts[0], glob[0]) and _matches(parts[1:], glob[1:])


def _walk(root: Location, base: str, *, recursive: bool = True) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(base, recursive=recursive, allow_not_found=True)
    try:
        files = (info for info in root.fs.get_file_info(selector) if info.type == pafs.FileType.File)
        return sorted(files, key=lambda info: info.path)
    except UnicodeDecodeError as error:
        name = error.object.decode(errors="backslashreplace")
        raise InputError(f"{root}: the file name {name} is not UTF-8.", remedy="Rename it.") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreachable(root, error) from error


def _hidden(path: str, base: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(path).relative_to(base).parts)


def _footers(root: Location, infos: Sequence[pafs.FileInfo], base: str) -> list[tuple[InputFile, pa.Schema]]:
    names = [PurePosixPath(info.path).relative_to(base).as_posix() for info in infos]
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        return list(pool.map(_footer, [root] * len(infos), infos, names))


def _footer(root: Location, info: pafs.FileInfo, name: str) -> tuple[InputFile, pa.Schema]:
    if not info.size:
        raise InputError(f"{name} is empty (0 bytes).", remedy="Remove it or write it again.")

    def read() -> tuple[str, pq.ParquetFile]:
        with root.fs.open_input_file(info.path) as source:
            source.seek(max(0, info.size - 8))
            length = int.from_bytes(source.read(4), "little")
            source.seek(max(0, info.size - 8 - length))
            digest = hashlib.sha256(source.read(length)).hexdigest()
            source.seek(0)
            return digest, pq.ParquetFile(source)

    try:
        digest, metadata = patient(root, read)
    except FileNotFoundError:
        raise InputError(f"{name} has vanished.", remedy="Check --input.") from None
    except PermissionError:
        raise InputError(f"{name} may not be read.", remedy="Grant read access to it.") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{name} is no readable Parquet file: {error}.", remedy="Write it again or leave it out."
        ) from error
    groups = (metadata.metadata.row_group(i) for i in range(metadata.metadata.num_row_groups))
    size = sum(group.total_byte_size for group in groups)
    modified = modified_time(info)
    rows = metadata.metadata.num_rows
    return InputFile(info.path, name, rows, info.size, size, digest, modified), metadata.schema_arrow


def modified_time(info: pafs.FileInfo) -> float:
    """When a file last changed, in seconds since 1970; 0 where its store does not tell."""
    return info.mtime_ns / 1e9 if info.mtime_ns is not None else 0.0


def check_untouched(root: Location, file: InputFile) -> None:
    """Raise ``InputChangedError`` when a file was written to since the run began, or has vanished.

    Its rows may be as they were: the next run looks, and goes on if they are.
    """
    info = patient(root, lambda: root.fs.get_file_info(file.path))
    if info.type == pafs.FileType.NotFound:
        raise InputChangedError(f"{file.name} has vanished.", remedy="Put it back and run again to resume.")
    if modified_time(info) != file.modified:
        raise InputChangedError(
            f"{file.name} was written to while the job ran.",
            remedy="Put it back if its rows have changed, and run again to resume.",
        )


def _difference(expected: pa.Schema, found: pa.Schema) -> str:
    """How names, types or order differ, empty if they do not: nullability and metadata play no part."""
    for field in expected:
        if field.name not in found.names:
            return f"column {field.name} is missing"
        if found.field(field.name).type != field.type:
            return f"column {field.name} is {found.field(field.name).type}, not {field.type}"
    extra = [name for name in found.names if name not in expected.names]
    if extra:
        return f"column {extra[0]} is there"
    return "" if found.names == expected.names else "the columns stand in another order"


def check_roles(schema: pa.Schema, roles: dict[str, str], *, wanted: Collection[str]) -> None:
    """Refuse a schema that lacks a role's column or has it in the wrong type.

    ``roles`` maps roles to column names, ``wanted`` are those that the task needs or that the user named. Raises
    ``InputError`` naming the column.
    """
    for role, name in roles.items():
        if name not in schema.names:
            if role in wanted:
                raise InputError(
                    f"column {name} is missing; the input has {', '.join(schema.names)}.",
                    remedy=f"Name the column that holds it: --column {role}=NAME, over HTTP columns: {{{role}: NAME}}.",
                )
            continue
        kind = schema.field(name).type
        good = is_text(kind) or (role == "id" and pa.types.is_integer(kind))
        if role == "suffix" and pa.types.is_null(kind):
            good = True
        if not good:
            wanted = "string or integer" if role == "id" else "string"
            raise InputError(
                f"column {name} is {kind}, not {wanted}.", remedy=f"Cast it, or name another: --column {role}=NAME."
            )


def check_kept(schema: pa.Schema, kept: Sequence[str], *, added: Sequence[str]) -> None:
    """Refuse columns to pass through that are not there, or that the job adds; raises ``InputError`` naming one."""
    for name in kept:
        if name not in schema.names:
            raise InputError(f"column {name} is missing.", remedy=f"The input has {', '.join(schema.names)}.")
    for name in added:
        if name in kept:
            raise InputError(
                f"the input already has a column {name}, which the output adds.",
                remedy="Rename it, or leave it out with --keep-columns.",
            )


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds strings, as pyarrow, polars or pandas write them."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


class UnitReader:
    """Streams units' rows; consecutive units of one file go on where the last one ended, in one pass over it.

    Rows that are read at once have ``READ_BYTES`` at most where they are alike, and about ``most_bytes`` whatever they
    are and whatever encoding they have; one row is always read.
    """

    def __init__(self, root: Location, columns: Sequence[str], *, most_bytes: int | None = None) -> None:
        self._root = root
        self._columns = list(columns)
        self._most = most_bytes
        self._path = ""
        self._at = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._group = ""

    def read(self, file: InputFile, unit: Unit) -> Iterator[pa.RecordBatch]:
        """The unit's rows in batches; a store that fails is asked again while its patience lasts.

        Raises ``InputChangedError`` when the file is not what was planned, or cannot be read.
        """
        at, patience = unit.start, time.monotonic() + self._root.patience
        while True:
            try:
                for batch in self._read(file, unit, at):
                    yield batch
                    at += batch.num_rows
                    patience = time.monotonic() + self._root.patience
                return
            except InputChangedError:
                self._path = ""
                raise
            except FileNotFoundError:
                raise InputChangedError(
                    f"{file.name} has vanished.", remedy="Put it back and run again to resume."
                ) from None
            except (OSError, pa.ArrowException) as error:
                group, self._path = f", {self._group}" if self._path else "", ""
                if self._root.is_local or not may_pass(error) or time.monotonic() > patience:
                    raise InputChangedError(
                        f"{file.name}{group}: {str(error).rstrip('.')}.",
                        remedy="Mend the file or its store and run again to resume.",
                    ) from error
            time.sleep(RETRY_SECONDS)

    def _read(self, file: InputFile, unit: Unit, at: int) -> Iterator[pa.RecordBatch]:
        if file.path != self._path or self._at > at:
            self._open(file, at)
        yield from self._take(file, at, unit.stop)

    def _open(self, file: InputFile, start: int) -> None:
        self._path = ""
        source = self._root.fs.open_input_file(file.path)
        if source.size() != file.size:
            raise InputChangedError(f"{file.name} has changed.", remedy="Put it back, or start anew with --overwrite.")
        parquet = pq.ParquetFile(source, pre_buffer=False)
        group, at = 0, 0
        while group < parquet.num_row_groups and at + parquet.metadata.row_group(group).num_rows <= start:
            at += parquet.metadata.row_group(group).num_rows
            group += 1
        self._batches = self._row_groups(source, parquet, group, at)
        self._path, self._at, self._rest = file.path, at, None

    def _row_groups(
        self, source: pa.NativeFile, parquet: pq.ParquetFile, group: int, at: int
    ) -> Iterator[pa.RecordBatch]:
        """The batches from row group ``group`` on, whose first row is ``at``; one group is held at a time."""
        for number in range(group, parquet.num_row_groups):
            metadata = parquet.metadata.row_group(number)
            stop = at + metadata.num_rows
            self._group = f"rows {at} to {stop} (row group {number})"
            rows = max(1, min(READ_ROWS, READ_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))
            if self._most is not None:
                widest = row_bytes(source, metadata, self._columns)
                rows = max(1, min(rows, self._most // max(1, widest)))
            for batch in parquet.iter_batches(rows, row_groups=[number], columns=self._columns):
                yield from [batch] if self._most is None else halved(batch, batch.schema.names, self._most)
            at = stop

    def _take(self, file: InputFile, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        while self._at < stop:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                raise InputChangedError(f"{file.name} holds fewer rows than its footer said.", remedy="Write it again.")
            self._rest = None
            skip = max(0, start - self._at)
            keep = min(batch.num_rows, stop - self._at)
            if keep < batch.num_rows:
                self._rest = batch.slice(keep)
            self._at += keep
            if skip < keep:
                yield batch.slice(skip, keep - skip)


def halved(batch: pa.RecordBatch, columns: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
    """A batch in parts whose ``columns`` hold ``most`` bytes at most, or are one row.

    One row may have a thousand times what others have. Of text in views each part would seem to hold all.
    """
    if batch.num_rows <= 1 or held_bytes(batch.select(columns)) <= most:
        yield batch
        return
    middle = batch.num_rows // 2
    yield from halved(batch.slice(0, middle), columns, most)
    yield from halved(batch.slice(middle), columns, most)


def held_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of a batch, without the dictionaries that its rows name: a copy of a row names them again."""
    columns = (c.indices if isinstance(c, pa.DictionaryArray) else c for c in batch.columns)
    return sum(int(column.nbytes) for column in columns)


def origins(batch: pa.RecordBatch, file: InputFile, first: int) -> list[tuple[str, int]]:
    """The input file and the row number of each row of a batch that begins at row ``first`` of ``file``."""
    if ORIGIN_FILE in batch.schema.names:
        return list(zip(batch.column(ORIGIN_FILE).to_pylist(), batch.column(ORIGIN_ROW).to_pylist(), strict=True))
    return [(file.name, row) for row in range(first, first + batch.num_rows)]


def texts(column: pa.Array) -> list[str | UnicodeDecodeError | None]:
    """The strings of a column; a value that is not UTF-8 comes back as the error that decoding it gave."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values: list[str | UnicodeDecodeError | None] = column.to_pylist()
    except UnicodeDecodeError:
        return [_text(value) for value in column.cast(pa.large_binary()).to_pylist()]
    return values


def _text(value: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return error


@dataclass(frozen=True, slots=True)
class TooLong:
    """A text that has more bytes than it may have."""

    bytes: int


def short_texts(column: pa.Array, most: int) -> list[str | UnicodeDecodeError | TooLong | None]:
    """As ``texts``, but what has more than ``most`` bytes is not decoded."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):  # Nothing computes on it; nor may a cast look whether it is UTF-8.
        column = column.cast(pa.binary_view()).cast(pa.large_binary()).view(pa.large_string())
    sizes: list[int] = pc.fill_null(pc.binary_length(column), 0).to_pylist()
    found = iter(texts(column.filter(pa.array([size <= most for size in sizes], pa.bool_()))))
    return [next(found) if size <= most else TooLong(size) for size in sizes]
