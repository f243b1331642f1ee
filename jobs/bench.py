"""How fast rows flow when the engine costs nothing (the instant engine), and the benchmarks of a clone."""

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.pairs import standard_library
from jobs.runner import Progress, Watcher, run_job
from jobs.spec import JobSpec
from serving.errors import ConfigError


class _Ahead(Watcher):
    """Remembers how many rows were prepared when the engine was up."""

    rows: int | None = None

    def update(self, progress: Progress) -> None:
        """Called once a second, and when something is finished."""
        if progress.stage == "running" and self.rows is None:
            self.rows = progress.tally.prepared


def feed(
    *, rows: int, row_bytes: int, replicas: int, feeders: int = 1, seed: int = 0, files: Path | None = None
) -> dict[str, Any]:
    """Cut ``rows`` rows of ``row_bytes`` bytes from Python files and run them; returns the figures.

    The files are those anywhere below ``files``, or the standard library's. Raises ``ConfigError`` where they are too
    short.

    ``rows_per_second`` counts from the moment the engine is up to the last part written; ``steady_rows_per_second``
    leaves out the rows that were prepared before, so it is what a job of any length can rely on. ``total_seconds`` is
    all.
    """
    ahead = _Ahead()
    with tempfile.TemporaryDirectory(prefix="spanfill-feed-") as folder:
        source = Path(folder, "rows.parquet")
        write_rows(source, rows, row_bytes, seed, files)
        spec = JobSpec(
            input=str(source),
            output=f"{folder}/out",
            engine="instant",
            replicas=replicas,
            feeders=feeders,
            max_tokens=64,
        )
        started = time.monotonic()
        manifest = run_job(spec, watcher=ahead)
        total = time.monotonic() - started
    return {
        "rows": manifest["rows"],
        "errors": manifest["errors"],
        "row_bytes": row_bytes,
        "engine": manifest["engine"],
        "replicas": manifest["replicas"],
        "seconds": manifest["running_seconds"],
        "rows_per_second": manifest["rows_per_second"],
        "steady_rows_per_second": round((rows - (ahead.rows or 0)) / manifest["running_seconds"], 1),
        "total_seconds": round(total, 1),
        "startup_seconds": manifest["startup_seconds"],
        "cpu_seconds_per_1000_rows": {
            work: round(seconds / rows * 1_000, 4) for work, seconds in manifest["cpu_seconds"].items()
        },
    }


def write_rows(path: Path, rows: int, row_bytes: int, seed: int, files: Path | None = None) -> None:
    """Prefixes and suffixes of half of ``row_bytes`` characters each, cut anywhere from Python files."""
    paths = standard_library().glob("*.py") if files is None else files.rglob("*.py")
    text = "".join(p.read_text(errors="ignore") for p in sorted(paths) if p.is_file())
    if len(text) <= row_bytes:
        raise ConfigError(
            f"the Python files below {files} have {len(text):,} characters together, fewer than a row.",
            remedy="Name a folder with more of them.",
        )
    draw = random.Random(seed)
    starts = [draw.randrange(len(text) - row_bytes) for _ in range(rows)]
    half = row_bytes // 2
    table = pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "prefix": pa.array([text[s : s + half] for s in starts]),
            "suffix": pa.array([text[s + half : s + row_bytes] for s in starts]),
        }
    )
    pq.write_table(table, path, row_group_size=5_000)


def from_clone(module: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command that runs a benchmark of the tests, and its environment.

    Raises ``ConfigError`` outside a clone: it is not part of the package.
    """
    clone = Path(__file__).resolve().parent.parent
    if not clone.joinpath("tests", "benchmarks").is_dir():
        raise ConfigError(f"{module} is not part of an installed package.", remedy="Run it from a clone of spanfill.")
    path = os.pathsep.join(filter(None, [str(clone), os.environ.get("PYTHONPATH")]))
    return [sys.executable, "-m", module, *arguments], os.environ | {"PYTHONPATH": path}
