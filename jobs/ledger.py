"""The job's folder: whose it is, what is planned, what is done. All state is files that are published whole."""

import json
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.journal import Journal
from jobs.plan import InputFile, Unit, dump_plan, load_plan
from jobs.store import Location, delete, delete_folder, exists, list_files, publish_bytes, read_bytes
from jobs.tally import Tally
from serving.errors import DamagedStateError, OtherJobError, OutputError, StorageError, VersionError

FORMAT_VERSION = 5
STATE = "_spanfill"
JOB_KEYS = {"fingerprint", "beginning", "identity", "spec", "versions"}
MANIFEST_KEYS = {"rows", "errors", "error_codes", "rows_per_second", "parts", "bytes"}
READERS = 32
"""Threads that read small files side by side: an object store takes tens of milliseconds for each."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished unit was: its sums, its files' sha256 and sizes, and the digest of the input it was made from.

    ``job`` tells this beginning of the job from an earlier one in the same folder.
    """

    tally: Tally
    sha256: dict[str, str]
    bytes: dict[str, int]
    input: str
    job: str = ""


class Ledger:
    """The files of one output folder.

    ``beginning`` is a token that ``job.json`` gets when a job begins in the folder: what a runner of an earlier
    beginning, displaced by ``--overwrite``, still writes does not count. ``open`` sets it.
    """

    def __init__(self, output: Location, fingerprint: str, *, beginning: str = "") -> None:
        self.output = output
        self.fingerprint = fingerprint
        self.beginning = beginning

    @classmethod
    def of(cls, output: Location, job: dict[str, Any]) -> "Ledger":
        """The ledger of a begun job, from what its ``job.json`` says."""
        return cls(output, job["fingerprint"], beginning=job["beginning"])

    def part(self, unit: int) -> Location:
        """The unit's part file; if it is there, the unit is done."""
        return self.output.join("data", self._name(unit))

    def errors(self, unit: int) -> Location:
        """The unit's error rows."""
        return self.output.join("errors", self._name(unit))

    def retried(self, unit: int) -> Location:
        """Where the error rows of a unit lie once they were done again."""
        return self.output.join(STATE, "retried", self._name(unit))

    def report(self, unit: int) -> Location:
        """The unit's tally and the sha256 of its part."""
        return self.output.join(STATE, "reports", f"{unit:05d}.json")

    def journal(self, unit: int) -> Journal:
        """The unit's finished rows before its part is out."""
        return Journal(self._state("journal").join(f"{unit:05d}"), self._state("damaged"), job=self.beginning)

    def _name(self, unit: int) -> str:
        return f"part-{unit:05d}-{self.fingerprint}.parquet"

    def _state(self, name: str) -> Location:
        return self.output.join(STATE, name)

    def refuse_others(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
        """Whether the folder holds this job already; touches nothing.

        Raises ``OutputError`` when it holds something else, another job (naming the fields that differ) or, without
        ``resume``, this one.
        """
        if not exists(self._state("job.json")):
            self._refuse_foreign_files()
            return False
        if overwrite:
            return False
        job = read_job(self.output)
        if job["fingerprint"] != self.fingerprint:
            names = differing(job["identity"], identity) or ["versions"]
            raise OtherJobError(
                f"{self.output} belongs to another job; different: {', '.join(names)}.",
                remedy="Choose another --output, or start anew with --overwrite.",
                differing=names,
            )
        if not resume:
            raise OutputError(f"{self.output} holds this job already.", remedy="Drop --no-resume, or add --overwrite.")
        return True

    def open(
        self, identity: dict[str, Any], spec: dict[str, Any], versions: dict[str, str], *, resume: bool, overwrite: bool
    ) -> dict[str, Any] | None:
        """Take the folder for this job, whose lease the caller holds; returns what a begun job's ``job.json`` says.

        Raises ``OutputError`` as ``refuse_others`` does.
        """
        if self.refuse_others(identity, resume=resume, overwrite=overwrite):
            self._remove_temporaries()
            job = read_job(self.output)
            self.beginning = job["beginning"]
            if job["spec"].get("input") != spec.get("input"):  # The same files, found elsewhere now.
                moved = job | {"spec": job["spec"] | {"input": spec.get("input")}}
                publish_bytes(self._state("job.json"), json.dumps(moved, indent=1).encode())
            return job
        if overwrite and exists(self._state("job.json")):
            self._clear()
        self.beginning = uuid.uuid4().hex
        new = {
            "format_version": FORMAT_VERSION,
            "beginning": self.beginning,
            "fingerprint": self.fingerprint,
            "identity": identity,
            "spec": spec,
            "versions": versions,
        }
        publish_bytes(self._state("job.json"), json.dumps(new, indent=1).encode())
        return None

    def _clear(self) -> None:
        """Remove a job but its lease; the manifest goes first and ``job.json`` last, so that a kill leaves no lie."""
        self._remove_temporaries()
        delete(self._state("manifest.json"))
        for folder in (self.output.join("data"), self.output.join("errors")):
            delete_folder(folder)
        for name in ("reports", "journal", "damaged", "retried"):
            delete_folder(self._state(name))
        for name in ("plan.arrow", "inputs.json", "gathered.parquet", "job.json"):
            delete(self._state(name))

    def _remove_temporaries(self) -> None:
        """What killed writers left half written on a disk; an object store shows no such thing."""
        if self.output.is_local:
            for path in Path(self._state("").path).rglob(".*.tmp"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def probe(self) -> None:
        """Write and remove a small file; raises ``StorageError``."""
        location = self._state(f".probe-{uuid.uuid4().hex[:8]}")
        publish_bytes(location, b"probe")
        delete(location)

    def _refuse_foreign_files(self) -> None:
        lease = f"/{STATE}/lease/"
        for info in list_files(self.output, recursive=True):
            if not info.base_name.endswith(".tmp") and lease not in info.path:
                raise OutputError(
                    f"{self.output} is not empty and no job's folder (it holds {info.path}).",
                    remedy="Choose an empty or new folder.",
                )

    def plan(self, files: Sequence[InputFile], units: Iterable[Unit]) -> list[Unit]:
        """The stored plan, or ``units`` stored as such; raises ``OutputError`` when it is damaged."""
        if not self.has_plan:
            self.store_inputs(files)
            self.store_plan(units)
        return self.planned()

    def store_inputs(self, files: Sequence[InputFile]) -> None:
        """Store what the input files are."""
        publish_bytes(self._state("inputs.json"), json.dumps([asdict(file) for file in files]).encode())

    def store_plan(self, units: Iterable[Unit]) -> None:
        """Store the units as the job's plan; a stored plan may grow, and nothing else."""
        publish_bytes(self._state("plan.arrow"), dump_plan(units))

    @property
    def has_plan(self) -> bool:
        """Whether a plan is stored: a job killed in its first moments has none, and its next run makes it."""
        return exists(self._state("plan.arrow"))

    def planned(self) -> list[Unit]:
        """The stored plan; raises ``OutputError`` when it is damaged or missing."""
        try:
            return load_plan(read_bytes(self._state("plan.arrow")))
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise self._damaged("plan.arrow", error) from None

    def inputs(self) -> list[InputFile]:
        """The input files as they were when the job began; raises ``OutputError`` when that is damaged."""
        try:
            return [InputFile(**values) for values in json.loads(read_bytes(self._state("inputs.json")))]
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise self._damaged("inputs.json", error) from None

    def _damaged(self, name: str, error: Exception) -> DamagedStateError:
        return DamagedStateError(
            f"{self._state(name)} is damaged or missing: {error}.", remedy="Start anew with --overwrite."
        )

    def done(self) -> set[int]:
        """The indices of the units whose part is out."""
        return self._units_in("data")

    def failed(self) -> set[int]:
        """The indices of the finished units that have error rows, by their reports."""
        found = sorted(self._units_in("errors") & self.done())
        return {unit for unit, report in zip(found, self.try_reports(found), strict=True) if lists_errors(report)}

    def _units_in(self, folder: str) -> set[int]:
        names = (info.base_name for info in list_files(self.output.join(folder)))
        return {int(name.split("-")[1]) for name in names if name.endswith(f"-{self.fingerprint}.parquet")}

    def write_report(self, unit: int, report: Report) -> None:
        """Record what a unit's part is, before it appears."""
        publish_bytes(self.report(unit), json.dumps(asdict(report)).encode())

    def read_report(self, unit: int) -> Report | None:
        """A finished unit's report, or None when it is missing, damaged or of an earlier beginning of the job."""
        try:
            values = json.loads(read_bytes(self.report(unit)))
            report = Report(**{**values, "tally": Tally(**values["tally"])})
            return report if report.job == self.beginning else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def read_reports(self, units: Iterable[int]) -> Iterator[Report]:
        """The reports of finished units, in order; raises ``StorageError`` for one that is missing or damaged."""
        units = list(units)
        for unit, report in zip(units, self.try_reports(units), strict=True):
            if report is None:
                raise StorageError(f"{self.report(unit)} is damaged or missing.", remedy="Run again to mend it.")
            yield report

    def try_reports(self, units: Sequence[int]) -> Iterator[Report | None]:
        """The reports of finished units, in order; None for one that is missing or damaged."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(self.read_report, units)

    def set_aside(self, unit: int) -> None:
        """Move a damaged part and its errors out of the way, so that the unit is done again; not all is done then."""
        self.withdraw_manifest()
        for folder, location in (("data", self.part(unit)), ("errors", self.errors(unit))):
            if exists(location):
                self._put_aside(f"{folder}/{location.name}")

    def outputs(self) -> dict[str, int]:
        """What lies in ``data/`` and ``errors/``, in folders there too: sizes in bytes by names such as ``data/a``."""
        found: dict[str, int] = {}
        for folder in (self.output.join("data"), self.output.join("errors")):
            for info in list_files(folder, recursive=True):
                name = f"{folder.name}/{info.path.removeprefix(folder.path).lstrip('/')}"
                found[name] = info.size
        return found

    def set_strays_aside(self, parts: Collection[str]) -> list[str]:
        """Move files of ``data/`` and ``errors/`` that are not among ``parts`` out of readers' way; their names."""
        strays = [name for name in self.outputs() if name not in parts]
        for name in strays:
            self._put_aside(name)
        return strays

    def _put_aside(self, name: str) -> None:
        location = self.output.join(*name.split("/"))
        publish_bytes(self._state("damaged").join(name.replace("/", "-")), read_bytes(location))
        delete(location)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Say that all is done; nothing is left in the journal then."""
        delete_folder(self._state("journal"))
        self._remove_temporaries()
        publish_bytes(self._state("manifest.json"), json.dumps(manifest, indent=1).encode())

    def withdraw_manifest(self) -> None:
        """Not all is done any more."""
        delete(self._state("manifest.json"))


def lists_errors(report: Report | None) -> bool:
    """Whether a unit has an error file: one that its report does not list is what a killed writer left."""
    return report is not None and any(name.startswith("errors/") for name in report.sha256)


def read_job(output: Location) -> dict[str, Any]:
    """What ``job.json`` says; raises ``OutputError`` for a folder of no job, ``VersionError`` for another format's."""
    try:
        job: dict[str, Any] = json.loads(read_bytes(output.join(STATE, "job.json")))
    except FileNotFoundError:
        raise OutputError(
            f"{output} is no job's folder: it has no {STATE}/job.json.", remedy="Check the path."
        ) from None
    except ValueError as error:
        raise DamagedStateError(
            f"{output}/{STATE}/job.json is damaged: {error}.", remedy="Start anew with --overwrite."
        ) from None
    if not isinstance(job, dict) or not isinstance(job.get("format_version"), int):
        raise DamagedStateError(f"{output}/{STATE}/job.json is damaged.", remedy="Start anew with --overwrite.")
    if job["format_version"] != FORMAT_VERSION:
        raise VersionError(
            f"{output} was written in format {job['format_version']}; this spanfill reads {FORMAT_VERSION}.",
            remedy="Use the spanfill that wrote it, or start anew with --overwrite.",
        )
    if not job.keys() >= JOB_KEYS:
        raise DamagedStateError(f"{output}/{STATE}/job.json is damaged.", remedy="Start anew with --overwrite.")
    return job


def read_manifest(output: Location) -> dict[str, Any] | None:
    """The manifest of a finished job, or None; raises ``OutputError`` when it is damaged."""
    try:
        manifest: dict[str, Any] = json.loads(read_bytes(output.join(STATE, "manifest.json")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedStateError(
            f"{output}/{STATE}/manifest.json is damaged: {error}.", remedy="Remove it and run again to write it anew."
        ) from None
    whole = isinstance(manifest, dict) and manifest.keys() >= MANIFEST_KEYS
    if not whole or not all(isinstance(manifest[key], dict) for key in ("parts", "bytes", "error_codes")):
        raise DamagedStateError(
            f"{output}/{STATE}/manifest.json is damaged.", remedy="Remove it and run again to write it anew."
        )
    return manifest


def differing(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """The names of the fields in which two identities differ."""
    names: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        name, left, right = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names += differing(left, right, f"{name}.")
        elif left != right:
            plain = not any(isinstance(value, dict | list) for value in (left, right))
            names.append(f"{name} ({left!r}, now {right!r})" if plain else name)
    return names
