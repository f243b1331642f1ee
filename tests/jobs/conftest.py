"""Real jobs of an instant engine, run once; each test gets a copy that it may tamper with."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.lease import Holder
from jobs.ledger import Ledger, read_job
from jobs.store import locate

ROWS = {"a.parquet": 25, "b.parquet": 15}
"""In parts of 10 rows: three parts of the first file, two of the second."""

PARTS = 5
FAILED = {("a.parquet", 3), ("a.parquet", 7), ("a.parquet", 12), ("b.parquet", 0)}
"""Rows that are error rows in a job with errors: in its parts 0, 1 and 3."""


@dataclass(frozen=True)
class JobFolder:
    """A job's input and output, side by side below ``root``."""

    root: Path

    @property
    def input(self) -> Path:
        return self.root / "in"

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def ledger(self) -> Ledger:
        output = locate(str(self.output))
        return Ledger.of(output, read_job(output))

    def state(self, *names: str) -> Path:
        return self.output.joinpath("_spanfill", *names)

    def part(self, unit: int, folder: str = "data") -> Path:
        return next((self.output / folder).glob(f"part-{unit:05d}-*.parquet"))

    def report(self, unit: int) -> Path:
        return self.state("reports", f"{unit:05d}.json")

    def edit(self, path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Change what a JSON file says."""
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    def forge(self, unit: int) -> None:
        """Make report and manifest vouch for a part as it is now."""
        part = self.part(unit)
        name, data = f"data/{part.name}", part.read_bytes()

        def vouch(digests: str) -> Callable[[dict[str, Any]], None]:
            def change(told: dict[str, Any]) -> None:
                told[digests][name] = hashlib.sha256(data).hexdigest()
                told["bytes"][name] = len(data)

            return change

        self.edit(self.report(unit), vouch("sha256"))
        self.edit(self.state("manifest.json"), vouch("parts"))

    def interrupt(self, *units: int) -> None:
        """Make it a job that was killed before these units were done."""
        self.state("manifest.json").unlink(missing_ok=True)
        for unit in units:
            for path in self.output.glob(f"*/part-{unit:05d}-*.parquet"):
                path.unlink()
            self.report(unit).unlink()

    def hold(self, holder: Holder) -> None:
        """Let somebody have taken the lease."""
        self.state("lease", "99999999.json").write_text(json.dumps(asdict(holder)))


def _run(root: Path, checkpoint: Path, **options: Any) -> JobFolder:
    values = {"input": str(root / "in"), "output": str(root / "out"), "model": str(checkpoint), "engine": "instant"}
    run_job(JobSpec.parse(values | {"max_tokens": 4, "rows_per_part": 10, "max_error_rate": 1.0} | options))
    return JobFolder(root)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the state of gateways and tenants is, for a test alone."""
    monkeypatch.setenv("SPANFILL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPANFILL_DATABASE_URL", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def clean_job(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, cluster: None) -> JobFolder:
    """Rows with ids and a column that passes through; nothing fails."""
    root = tmp_path_factory.mktemp("clean")
    (root / "in").mkdir()
    for name, rows in ROWS.items():
        table = {
            "id": [f"{name}-{i}" for i in range(rows)],
            "prefix": pa.array([f"def f{i % 4}():\n    " for i in range(rows)], pa.string_view()),
            "suffix": [None if i % 3 else f"\n# {i}" for i in range(rows)],
            "extra": list(range(rows)),
        }
        pq.write_table(pa.table(table), root / "in" / name)
    return _run(root, checkpoint)


@pytest.fixture(scope="session")
def failed_job(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, cluster: None) -> JobFolder:
    """Two samples a row, no ids, and rows whose prefix is null or not UTF-8."""
    root = tmp_path_factory.mktemp("failed")
    (root / "in").mkdir()
    for name, rows in ROWS.items():
        prefixes: list[bytes | None] = [f"{name} row {i}".encode() for i in range(rows)]
        for file, row in FAILED:
            if file == name:
                prefixes[row] = b"bad \xff" if row == 12 else None
        buffers = pa.array(prefixes, pa.binary()).buffers()
        pq.write_table(pa.table({"prefix": pa.Array.from_buffers(pa.string(), rows, buffers)}), root / "in" / name)
    return _run(root, checkpoint, n=2, temperature=0.8)


@pytest.fixture(scope="session")
def retried_job(tmp_path_factory: pytest.TempPathFactory, failed_job: JobFolder, checkpoint: Path) -> JobFolder:
    """The job with errors, whose error rows were done again and failed again."""
    root = tmp_path_factory.mktemp("retried")
    shutil.copytree(failed_job.root, root, dirs_exist_ok=True)
    return _run(root, checkpoint, n=2, temperature=0.8, retry_errors=True)


def _copy(job: JobFolder, root: Path) -> JobFolder:
    shutil.copytree(job.root, root)
    copied = JobFolder(root)
    copied.edit(copied.state("job.json"), lambda told: told["spec"].update(input=str(copied.input)))
    return copied


@pytest.fixture
def clean(clean_job: JobFolder, tmp_path: Path) -> JobFolder:
    """A copy of the clean job."""
    return _copy(clean_job, tmp_path / "clean")


@pytest.fixture
def failed(failed_job: JobFolder, tmp_path: Path) -> JobFolder:
    """A copy of the job with errors."""
    return _copy(failed_job, tmp_path / "failed")


@pytest.fixture
def retried(retried_job: JobFolder, tmp_path: Path) -> JobFolder:
    """A copy of the job whose errors were retried."""
    return _copy(retried_job, tmp_path / "retried")
