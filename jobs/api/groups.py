"""The Parquet that a batch becomes: rows by how they are decoded, each group the input of one job."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.api.order import Options, Order, WorkFolder
from jobs.spec import PENALTIES, SAMPLED, JobSpec
from serving.api.ask import Ask
from serving.api.checks import text_of

MOST_GROUPS = 256
"""Each is a job that costs seconds to begin, and a file that is open while the batch is read."""

FLUSH_ROWS = 1_000
FLUSH_TEXT = 32 << 20
"""Rows of a group, and characters of all groups together, that wait at most: a line repeats its suffix for each row."""

PASSED = ("line", "prompt")
"""Columns that come out again: whose answer it is."""


def options_of(ask: Ask) -> Options:
    """How an ask is decoded, spelled as all who mean it would spell it."""
    decoding = ask.decoding
    heeded = PENALTIES if decoding.temperature == 0 else ("top_p", *SAMPLED, *PENALTIES)
    return Options(
        max_tokens=ask.max_tokens,
        temperature=decoding.temperature,
        n=ask.n,
        stop=tuple(sorted(set(ask.stop))),
        **{name: getattr(decoding, name) for name in heeded},
    )


def columns_of(*, can_infill: bool) -> list[str]:
    """The columns of a group's rows; a format without a place for a suffix must not see one."""
    return ["id", *PASSED, "prefix", *(["suffix"] if can_infill else [])]


def group_spec(order: Order, folder: WorkFolder, group: int, options: Options) -> JobSpec:
    """The job of a group. A failing row fails alone, so no share of them stops it."""
    values = {**options.model_dump(), "keep_columns": PASSED, "max_error_rate": 1.0}
    return order.spec(str(folder.rows(group)), folder.results(group), values)


@dataclass
class _Group:
    writer: pq.ParquetWriter
    schema: pa.Schema
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []


class Groups:
    """Writes the rows of a batch; ``open_groups`` makes one."""

    def __init__(self, order: Order, folder: WorkFolder, closing: ExitStack) -> None:
        self._order = order
        self._folder = folder
        self._closing = closing
        self._groups: dict[Options, _Group] = {}
        self._text = 0

    @property
    def options(self) -> tuple[Options, ...]:
        """How each group is decoded, by its number."""
        return tuple(self._groups)

    def has_room_for(self, asks: list[Ask]) -> bool:
        """Whether rows that are decoded so find a group."""
        new = {options_of(ask) for ask in asks} - self._groups.keys()
        return len(self._groups) + len(new) <= MOST_GROUPS

    def add(self, line: int, asks: list[Ask]) -> None:
        """The rows of a line, one a prompt.

        A row's seeds come from its id: with a seed of its own the same request has the same answer wherever it stands.
        """
        for prompt, ask in enumerate(asks):
            identity = f"{self._order.id} {line} {prompt}" if ask.seed is None else f"seed {ask.seed}"
            row = {"id": identity, "line": line, "prompt": prompt, "prefix": ask.prefix, "suffix": ask.suffix}
            self._group(options_of(ask)).add(row)
            self._text += text_of(ask)
        if self._text > FLUSH_TEXT:
            self._flush()

    def _flush(self) -> None:
        """Write what waits of all groups."""
        for group in self._groups.values():
            group.flush()
        self._text = 0

    def _group(self, options: Options) -> _Group:
        if options not in self._groups:
            self._groups[options] = self._begin(len(self._groups))
        return self._groups[options]

    def _begin(self, number: int) -> _Group:
        path = self._folder.rows(number)
        path.parent.mkdir(parents=True)
        kinds = {"line": pa.int32(), "prompt": pa.int32()}
        names = columns_of(can_infill=self._order.can_infill)
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
        group = _Group(self._closing.enter_context(pq.ParquetWriter(path, schema)), schema)
        self._closing.callback(group.flush)  # Before the writer is closed.
        return group


@contextmanager
def open_groups(order: Order, folder: WorkFolder) -> Iterator[Groups]:
    """Begin to write a batch's rows; the files are whole when the block has ended."""
    with ExitStack() as closing:
        yield Groups(order, folder, closing)
