"""Every part of a job against its manifest and its input: nothing lost, nothing doubled, nothing changed, in order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.digest import InputDigest
from jobs.gather import inputs_of
from jobs.ledger import Ledger, Report, lists_errors, read_job, read_manifest
from jobs.plan import InputFile, Unit
from jobs.reader import ORIGIN_FILE, ORIGIN_ROW, InputSet, UnitReader, find_input, origins
from jobs.recheck import sha256
from jobs.spec import JobSpec
from jobs.store import Location, exists, locate, patient
from serving.errors import DamagedStateError, InputError, SpanfillError


@dataclass
class Verdict:
    """What was looked at and what is wrong; ``finished`` says whether there was a manifest to compare with."""

    finished: bool
    parts: int = 0
    rows: int = 0
    errors: int = 0
    problems: list[str] = field(default_factory=list)


def verify(folder: str) -> Verdict:
    """Check every finished part of a job's folder; reads all of its output and, of its input, what made the prompts.

    Raises ``OutputError`` when the folder holds no job.
    """
    output = locate(folder)
    try:
        job = read_job(output)
        ledger, manifest = Ledger.of(output, job), read_manifest(output)
        units, then = ledger.planned(), ledger.inputs()
    except DamagedStateError as error:
        return Verdict(finished=False, problems=[error.message])
    verdict, done = Verdict(finished=manifest is not None), ledger.done()
    spec, inputs = JobSpec.model_validate(job["spec"]), None
    try:
        inputs = inputs_of(spec, output)
    except InputError as error:
        verdict.problems.append(f"the input cannot be compared: {error.message}")
    if spec.order == "global":
        verdict.problems += _against_original(spec, job["identity"]["input"])
    check = _Check(ledger, spec, then, inputs, verdict)
    planned = {unit.index for unit in units}
    verdict.problems += [f"{ledger.part(index).name} is not in the plan" for index in sorted(done - planned)]
    for unit in units:
        if unit.index in done:
            check.unit(unit)
        elif manifest is not None:
            verdict.problems.append(f"{ledger.part(unit.index).name} is missing")
    if manifest is not None:
        verdict.problems += _against_manifest(ledger, manifest, verdict)
    return verdict


def _against_original(spec: JobSpec, then: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the files whose rows were gathered: the copy, which units count, does not tell."""
    try:
        now = {file.name: file.identity for file in find_input(spec.input, patience=spec.store_patience).files}
    except InputError as error:
        return [f"the input cannot be compared: {error.message}"]
    changed = [file["name"] for file in then if now.get(file["name"]) != file]
    return [f"{name} is not what it was when its rows were gathered" for name in changed]


def _against_manifest(ledger: Ledger, manifest: dict[str, Any], verdict: Verdict) -> Iterator[str]:
    listed, there = set(manifest["parts"]), set(ledger.outputs())
    yield from (f"{name} is not in the manifest" for name in sorted(there - listed))
    for name, told in manifest["parts"].items():
        if name in there and sha256(ledger.output.join(*name.split("/"))) != told:
            yield f"{name} is not what the manifest says (sha256)"
    for name, found in (("rows", verdict.rows), ("errors", verdict.errors)):
        if manifest[name] != found:
            yield f"the manifest says {manifest[name]} {name}, the files hold {found}"


class _Check:
    """Compares units with the input of a job."""

    def __init__(
        self, ledger: Ledger, spec: JobSpec, then: list[InputFile], now: InputSet | None, verdict: Verdict
    ) -> None:
        self._ledger = ledger
        self._spec = spec
        self._verdict = verdict
        self._then, self._inputs = then, now
        self._now = {file.name: file for file in now.files} if now else {}
        present = now.schema.names if now else []
        self._roles = [spec.column(role) for role in spec.roles if spec.column(role) in present]
        kept = present if spec.keep_columns is None else spec.keep_columns
        keys = map(spec.column, ("id", *reversed(spec.required_roles)))
        named = [name for name in keys if name in kept and name in present]
        self._key = named[0] if named else None

    def unit(self, unit: Unit) -> None:
        """Look at one finished unit's files."""
        self._verdict.parts += 1
        part = self._ledger.part(unit.index)
        try:
            problems = list(self._problems(unit, part))
        except (SpanfillError, OSError, pa.ArrowException) as error:
            problems = [f"{part.name}: {error}"]
        self._verdict.problems += problems

    def _problems(self, unit: Unit, part: Location) -> Iterator[str]:
        report = self._ledger.read_report(unit.index)
        if report is None:
            yield f"{part.name} has no readable report"
            return
        yield from self._changed(report)
        sampled = self._spec.task == "infill"
        table = _read(part, ["sample" if sampled else "tokens", *([self._key] if self._key else [])])
        failed = self._failed(unit.index, report)
        self._verdict.rows += table.num_rows
        self._verdict.errors += len(failed) if lists_errors(report) else 0
        if self._inputs is None:
            return
        digest, keys, sources = self._input(self._inputs, unit)
        if digest != report.input:
            yield f"{part.name}: its input's rows are not what they were when it was made"
        wanted = (
            set(sources) if unit.retries < 0 else self._failed(unit.retries, self._ledger.read_report(unit.retries))
        )
        expected = [row for row, source in enumerate(sources) if source in wanted and source not in failed]
        samples = list(range(self._spec.n)) * len(expected)
        if table.num_rows != len(samples):
            yield f"{part.name} holds {table.num_rows} rows, not {len(samples)}"
        elif sampled and table.column("sample").to_pylist() != samples:
            yield f"{part.name}: its samples are out of order"
        elif self._key and _values(table, self._key) != [keys[row] for row in expected for _ in range(self._spec.n)]:
            yield f"{part.name}: column {self._key} is not that of input rows {unit.start} to {unit.stop}, in order"

    def _changed(self, report: Report) -> Iterator[str]:
        for name, told in report.sha256.items():
            if (found := sha256(self._ledger.output.join(*name.split("/")))) != told:
                yield f"{name} is not what was written (sha256)" if found else f"{name} is missing"

    def _failed(self, unit: int, report: Report | None) -> set[tuple[str, int]]:
        """Input files and rows of what a unit could not do, by its report or, where they were retried, as kept."""
        listed = (self._ledger.errors(unit),) if lists_errors(report) else ()
        for location in (*listed, self._ledger.retried(unit)):
            if exists(location):
                found = _read(location, ["source_file", "source_row"])
                return set(zip(*(column.to_pylist() for column in found.columns), strict=True))
        return set()

    def _input(self, inputs: InputSet, unit: Unit) -> tuple[str, Sequence[Any], list[tuple[str, int]]]:
        """The digest of a unit's rows, their keys, and where in the input each is."""
        digest, keys, sources = InputDigest(self._roles), list[Any](), list[tuple[str, int]]()
        for batch in self._rows(inputs, unit):
            digest.add(batch)
            sources += origins(batch, self._then[unit.file], unit.start + len(sources))
            if self._key:
                keys += _values(pa.Table.from_batches([batch]), self._key)
        return digest.hexdigest(), keys, sources

    def _rows(self, inputs: InputSet, unit: Unit) -> Iterator[pa.RecordBatch]:
        if unit.rows == 0:
            return iter(())
        if unit.file >= len(self._then):
            raise InputError(f"the plan names input file {unit.file}, of {len(self._then)}.")
        file: InputFile | None = self._now.get(self._then[unit.file].name)
        if file is None:
            raise InputError(f"{self._then[unit.file].name} is gone.", remedy="Put it back to verify its rows.")
        own = [name for name in (ORIGIN_FILE, ORIGIN_ROW) if name in inputs.schema.names]
        columns = list(dict.fromkeys([*self._roles, *([self._key] if self._key else []), *own]))
        return UnitReader(inputs.root, columns).read(file, unit)


def _read(location: Location, columns: Sequence[str]) -> pa.Table:
    def read() -> pa.Table:
        with location.fs.open_input_file(location.path) as source:
            return pq.read_table(source, columns=list(columns))

    return patient(location, read)


def _values(table: pa.Table, name: str) -> list[Any]:
    """A column's values, texts as their bytes: what is not UTF-8 must compare too."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.binary_view())
    return list(column.to_pylist())
