"""The job's folder: whose it is, what is planned, what is done. All state is files that are published whole."""

import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa

from jobs.plan import InputFile, Unit, dump_plan, load_plan
from jobs.store import Location, delete, delete_folder, exists, list_files, publish_bytes, read_bytes
from serving.errors import OutputError, VersionError

FORMAT_VERSION = 1
STATE = "_spanfill"

JOURNAL_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("stop_token_id", pa.int32()),
        ("mean_logprob", pa.float32()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


@dataclass(slots=True)
class Sample:
    """What the engine made of one sample of one row: the least that must survive a kill. ``row`` is the file's."""

    row: int
    sample: int
    token_ids: list[int]
    stop_token_id: int | None = None
    mean_logprob: float | None = None
    error_code: str | None = None
    error_message: str | None = None
    attempts: int = 1


@dataclass(slots=True)
class Tally:
    """Sums over rows; two add up."""

    rows: int = 0
    errors: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    truncated: int = 0
    empty: int = 0
    retries: int = 0
    repeated_ids: int = 0
    seconds: float = 0.0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    error_codes: dict[str, int] = field(default_factory=dict)
    replicas: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Tally") -> "Tally":
        """Add ``other`` to this one."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, f.name, mine + theirs)
        return self


class Ledger:
    """The files of one output folder."""

    def __init__(self, output: Location, fingerprint: str) -> None:
        self.output = output
        self.fingerprint = fingerprint

    def part(self, unit: int) -> Location:
        """The unit's part file; if it is there, the unit is done."""
        return self.output.join("data", self._name(unit))

    def errors(self, unit: int) -> Location:
        """The unit's error rows."""
        return self.output.join("errors", self._name(unit))

    def report(self, unit: int) -> Location:
        """The unit's tally and the sha256 of its part."""
        return self.output.join(STATE, "reports", f"{unit:05d}.json")

    def _name(self, unit: int) -> str:
        return f"part-{unit:05d}-{self.fingerprint}.parquet"

    def _state(self, name: str) -> Location:
        return self.output.join(STATE, name)

    def open(self, identity: dict[str, Any], spec: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
        """Take the folder for this job; returns whether it goes on with one that was begun.

        Raises ``OutputError`` when the folder holds something else, another job (naming the fields that differ) or,
        without ``resume``, this one.
        """
        if overwrite and exists(self._state("job.json")):
            for name in ("data", "errors", STATE):
                delete_folder(self.output.join(name))
        if not exists(self._state("job.json")):
            self._refuse_foreign_files()
            new = {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "identity": identity,
                "spec": spec,
            }
            publish_bytes(self._state("job.json"), json.dumps(new, indent=1).encode())
            return False
        job = read_job(self.output)
        if job["fingerprint"] != self.fingerprint:
            names = ", ".join(differing(job["identity"], identity)) or "versions"
            raise OutputError(
                f"{self.output} belongs to another job; different: {names}.",
                remedy="Choose another --output, or start anew with --overwrite.",
            )
        if not resume:
            raise OutputError(f"{self.output} holds this job already.", remedy="Drop --no-resume, or add --overwrite.")
        return True

    def probe(self) -> None:
        """Write and remove a small file; raises ``StorageError``."""
        location = self._state(f".probe-{uuid.uuid4().hex[:8]}")
        publish_bytes(location, b"probe")
        delete(location)

    def _refuse_foreign_files(self) -> None:
        for info in list_files(self.output, recursive=True):
            if not info.base_name.endswith(".tmp"):
                raise OutputError(
                    f"{self.output} is not empty and no job's folder (it holds {info.path}).",
                    remedy="Choose an empty or new folder.",
                )

    def plan(self, files: Sequence[InputFile], units: Iterable[Unit]) -> list[Unit]:
        """The stored plan, or ``units`` stored as such."""
        location = self._state("plan.arrow")
        if not exists(location):
            publish_bytes(self._state("inputs.json"), json.dumps([asdict(file) for file in files]).encode())
            publish_bytes(location, dump_plan(units))
        return load_plan(read_bytes(location))

    def done(self) -> set[int]:
        """The indices of the units whose part is out."""
        names = (info.base_name for info in list_files(self.output.join("data")))
        return {int(name.split("-")[1]) for name in names if name.endswith(f"-{self.fingerprint}.parquet")}

    def write_report(self, unit: int, tally: Tally, parts: dict[str, str]) -> None:
        """Record a unit's sums and the sha256 of what it published."""
        publish_bytes(self.report(unit), json.dumps({"tally": asdict(tally), "sha256": parts}).encode())

    def read_reports(self, units: Iterable[int]) -> Iterator[tuple[Tally, dict[str, str]]]:
        """The reports of finished units."""
        for unit in units:
            report = json.loads(read_bytes(self.report(unit)))
            yield Tally(**report["tally"]), report["sha256"]

    def journal(self, unit: int, samples: Sequence[Sample]) -> None:
        """Publish one immutable segment; its name carries the sha256 of its content."""
        if not samples:
            return
        columns = {name: [getattr(sample, name) for sample in samples] for name in JOURNAL_SCHEMA.names}
        sink = io.BytesIO()
        batch = pa.record_batch(columns, schema=JOURNAL_SCHEMA)
        with pa.ipc.new_file(sink, JOURNAL_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        publish_bytes(self._journal(unit).join(f"{hashlib.sha256(data).hexdigest()}.arrow"), data)

    def replay(self, unit: int) -> tuple[list[Sample], list[str]]:
        """The samples of a unit's segments, and the names of damaged segments, which are set aside."""
        samples: list[Sample] = []
        damaged: list[str] = []
        for info in list_files(self._journal(unit)):
            if not info.base_name.endswith(".arrow"):
                continue
            location = Location(self.output.uri, info.path)
            data = read_bytes(location)
            if hashlib.sha256(data).hexdigest() != info.base_name.removesuffix(".arrow"):
                publish_bytes(self._state("damaged").join(info.base_name), data)
                delete(location)
                damaged.append(info.base_name)
                continue
            rows = pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist()
            samples.extend(Sample(**row) for row in rows)
        return samples, damaged

    def drop_journal(self, unit: int) -> None:
        """Forget a unit's segments once its part is out."""
        delete_folder(self._journal(unit))

    def _journal(self, unit: int) -> Location:
        return self.output.join(STATE, "journal", f"{unit:05d}")

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Say that all is done."""
        publish_bytes(self._state("manifest.json"), json.dumps(manifest, indent=1).encode())


def read_job(output: Location) -> dict[str, Any]:
    """What ``job.json`` says; raises ``OutputError`` for a folder of no job, ``VersionError`` for a newer one's."""
    try:
        job: dict[str, Any] = json.loads(read_bytes(output.join(STATE, "job.json")))
    except FileNotFoundError:
        raise OutputError(
            f"{output} is no job's folder: it has no {STATE}/job.json.", remedy="Check the path."
        ) from None
    except json.JSONDecodeError as error:
        raise OutputError(
            f"{output}/{STATE}/job.json is damaged: {error}.", remedy="Start anew with --overwrite."
        ) from None
    if job["format_version"] > FORMAT_VERSION:
        raise VersionError(
            f"{output} was written in format {job['format_version']}; this spanfill reads up to {FORMAT_VERSION}.",
            remedy="Install the spanfill that wrote it.",
        )
    return job


def read_manifest(output: Location) -> dict[str, Any] | None:
    """The manifest of a finished job, or None."""
    location = output.join(STATE, "manifest.json")
    if not exists(location):
        return None
    manifest: dict[str, Any] = json.loads(read_bytes(location))
    return manifest


def differing(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """The names of the fields in which two identities differ."""
    names: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        name, left, right = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names += differing(left, right, f"{name}.")
        elif left != right:
            names.append(name if name == "input" else f"{name} ({left!r}, now {right!r})")
    return names
