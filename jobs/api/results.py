"""What a job of a batch has made so far, row by row in the order of its input: parts, error rows, and the journal.

Whoever reads must be sure that nobody runs the job: a journal's damaged segments are set aside.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.api.groups import PASSED
from jobs.api.journaled import Journaled, cached_tokens, made_by, made_tokens, planned_ledger
from jobs.calibration import STOP_REASONS
from jobs.journal import Sample
from jobs.ledger import Ledger, lists_errors
from jobs.plan import Unit
from jobs.reader import READ_ROWS
from jobs.rows import row_prompts
from jobs.spec import JobSpec
from jobs.store import Location, locate
from serving.formats import Format, Prompt, load_format

PART_COLUMNS = [*PASSED, "infill", "finish_reason", "prompt_tokens", "completion_tokens"]
ERROR_COLUMNS = [*PASSED, "error_code", "error_message"]


@dataclass(frozen=True, slots=True)
class Made:
    """One sample of a row; the token that ended it is one of its ``tokens``."""

    text: str
    reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class RowResult:
    """What became of a prompt of a line: its samples, or why there are none.

    ``unit`` is the unit whose journal it comes from, None where a part holds it; only then ``cached_tokens`` is told.
    """

    line: int
    prompt: int
    prompt_tokens: int = 0
    made: tuple[Made, ...] = ()
    error: tuple[str, str] | None = None
    unit: int | None = None
    cached_tokens: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the batch."""
        return self.line, self.prompt


def group_results(spec: JobSpec, columns: Sequence[str]) -> Iterator[RowResult]:
    """The rows of a group that are done; none of a job that has not begun. ``columns`` are the input's.

    Raises ``OutputError`` for state that is damaged, ``StorageError``.
    """
    ledger = planned_ledger(locate(spec.output))
    if ledger is None:
        return
    done, journals = ledger.done(), _Journals(spec, columns, ledger)
    for unit in ledger.planned():
        if unit.index in done:
            finished = _finished(ledger, unit, spec.max_tokens)
            yield from heapq.merge(finished, _failed(ledger, unit), key=lambda row: row.place)
        else:
            yield from journals.rows(unit)


def _finished(ledger: Ledger, unit: Unit, max_tokens: int) -> Iterator[RowResult]:
    rows = _rows(ledger.part(unit.index), PART_COLUMNS)
    for place, found in groupby(rows, key=lambda row: (row["line"], row["prompt"])):
        samples = list(found)
        made = tuple(_made_of_part(sample, max_tokens) for sample in samples)
        yield RowResult(*place, samples[0]["prompt_tokens"], made)


def _made_of_part(row: dict[str, Any], max_tokens: int) -> Made:
    """A sample that reached its length was not ended by a stop token, though its text may end at a control token."""
    reason = row["finish_reason"]
    return Made(row["infill"], reason, min(max_tokens, row["completion_tokens"] + (reason in STOP_REASONS)))


def _failed(ledger: Ledger, unit: Unit) -> Iterator[RowResult]:
    if not lists_errors(ledger.read_report(unit.index)):
        return
    for row in _rows(ledger.errors(unit.index), ERROR_COLUMNS):
        yield RowResult(row["line"], row["prompt"], error=(row["error_code"], row["error_message"]))


def _rows(location: Location, columns: list[str]) -> Iterator[dict[str, Any]]:
    with location.fs.open_input_file(location.path) as source:
        for batch in pq.ParquetFile(source).iter_batches(READ_ROWS, columns=columns):
            yield from batch.to_pylist()


class _Journals:
    """Reads units whose part is not out."""

    def __init__(self, spec: JobSpec, columns: Sequence[str], ledger: Ledger) -> None:
        self._spec = spec
        self._journaled = Journaled(ledger, spec.input, columns, spec.n)

    @cached_property
    def _made_by(self) -> tuple[Format, int]:
        model, name, context = made_by(locate(self._spec.output))
        return load_format(name, tokenizer_of=model), context

    def rows(self, unit: Unit) -> Iterator[RowResult]:
        """The rows of a unit that its journal holds whole."""
        for batch, found in self._journaled.rows(unit):
            yield from self._results(unit, batch, found)

    def _results(self, unit: Unit, batch: pa.RecordBatch, found: list[list[Sample]]) -> Iterator[RowResult]:
        prompts = row_prompts(self._spec, *self._made_by, batch)
        places = zip(*(batch.column(name).to_pylist() for name in PASSED), strict=True)
        for (line, number), (_, prompt), samples in zip(places, prompts, found, strict=True):
            first = samples[0]
            if first.error_code is not None or not isinstance(prompt, Prompt):
                error = (first.error_code or "bad_input", first.error_message or "")
                yield RowResult(line, number, error=error, unit=unit.index)
            else:
                made, length = tuple(map(self._made, samples)), len(prompt.token_ids)
                cached = cached_tokens(samples, length)
                yield RowResult(line, number, length, made, unit=unit.index, cached_tokens=cached)

    def _made(self, sample: Sample) -> Made:
        fmt, _ = self._made_by
        infill = fmt.infill(sample.token_ids, stop_token_id=sample.stop_token_id, stop=self._spec.stop)
        return Made(infill.text, infill.finish_reason, made_tokens(sample))
