"""A job under constant fire: a random process of it is killed every few seconds until it is done.

    python -m tests.benchmarks.soak --rows 1000000

Prints one JSON object: kills survived by kind, rows lost and doubled, the share of work that was repeated, and of each
kind of process, Ray's own too, the highest memory that any one of them had. The engine is simulated (``instant``): what
is tried is everything around it. One row in ``BAD_EVERY`` has no prefix and must become an error row. Rows that an
engine answered are counted in its own process (``counting/``), whatever became of the answer.

It fails (exit code 1) on a row lost or doubled, on an error row too many or too few, on anything that ``spanfill
verify`` finds, and where more work was repeated than ``--most-repeated`` allows.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from jobs.options import EXIT_ERROR_ROWS
from jobs.verify import verify
from tests.runs import Run, answered, counting, write_pairs

WEIGHTS = {"replica": 4, "feeder": 4, "driver": 2, "controller": 1}
"""How often each kind is chosen; a driver's death costs a start of Ray, some eight seconds."""

MEASURED = ("driver", "replica", "feeder", "controller", "raylet", "gcs_server")
BAD_EVERY = 1_000


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, nargs=2, default=(3.0, 9.0), help="seconds between two kills")
    parser.add_argument("--folder", type=Path, help="kept, and emptied of an earlier soak; else a temporary one")
    parser.add_argument("--most-repeated", type=float, default=0.5, help="share of the rows answered more than once")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spanfill-soak-") as temporary:
        folder = arguments.folder or Path(temporary)
        result = soak(folder, rows=arguments.rows, seed=arguments.seed, pause=tuple(arguments.pause))
    print(json.dumps(result, indent=1))
    wrong = ("rows_lost", "rows_doubled", "error_rows_astray", "problems")
    sys.exit(int(any(result[name] for name in wrong) or result["work_repeated_share"] > arguments.most_repeated))


def soak(folder: Path, *, rows: int, seed: int, pause: tuple[float, float]) -> dict[str, Any]:
    """Run the job to its end through kills; returns the figures."""
    bad = range(seed % BAD_EVERY, rows, BAD_EVERY)
    source = write_pairs(folder / "rows.parquet", rows, seed=seed, words=12, row_group_size=10_000, bad=bad)
    output, log, counts, draw = folder / "out", folder / "log", folder / "counts", random.Random(seed)
    for old in (output, counts):
        shutil.rmtree(old, ignore_errors=True)
    log.unlink(missing_ok=True)
    options = ["--input", source, "--output", output, "--engine", "instant", "--max-tokens", 16]
    options += ["--rows-per-part", 4_000, "--replicas", 2]
    meter, kills, asked, started = Meter(), Counter[str](), 0, time.monotonic()
    while True:
        run = Run(log, *options, env=counting(counts))
        meter.watch(run)
        while run.process.poll() is None:
            time.sleep(draw.uniform(*pause))
            kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            if run.process.poll() is None and run.kill(kind, draw):
                kills[kind] += 1
                print(f"{time.monotonic() - started:7.1f} s  {_done(output):>9,} rows  killed {kind}", file=sys.stderr)
        code = run.wait()
        asked += 1
        if code == EXIT_ERROR_ROWS:
            manifest = json.loads(run.stdout)
            break
        assert code == -9, f"exit code {code}: {run.told[-2_000:]}"
    seconds = time.monotonic() - started
    found, failed = _ids(output / "data"), _ids(output / "errors")
    everything = found + failed
    return {
        "rows": rows,
        "engine": manifest["engine"],
        "seconds": round(seconds, 1),
        "kills": dict(kills),
        "kills_survived": sum(kills.values()),
        "runs": asked,
        "rows_lost": rows - len(everything),
        "rows_doubled": everything.total() - len(everything),
        "error_rows": manifest["errors"],
        "error_rows_astray": len(failed.keys() ^ set(bad)),
        "work_repeated_share": round(answered(counts) / (rows - len(bad)) - 1, 4),
        "memory_peak_mib_of_the_largest": {kind: round(peak / 2**20) for kind, peak in meter.peaks.items()},
        "problems": verify(str(output)).problems,
    }


def _done(output: Path) -> int:
    """Rows of the finished parts, from their footers."""
    return sum(pq.read_metadata(path).num_rows for path in output.glob("data/*.parquet"))


def _ids(folder: Path) -> Counter[int]:
    """How often each row's id is in a folder's files."""
    return Counter(i for path in folder.iterdir() for i in pq.read_table(path, columns=["id"])["id"].to_pylist())


class Meter:
    """Memory peaks of the runs that it watches: of each kind the highest of any one process."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = dict.fromkeys(MEASURED, 0)

    def watch(self, run: Run) -> None:
        """Measure until the run ends."""
        threading.Thread(target=self._measure, args=(run,), daemon=True).start()

    def _measure(self, run: Run) -> None:
        while run.process.poll() is None:
            for kind in self.peaks:
                for process in run.processes(kind):
                    with suppress(psutil.NoSuchProcess):
                        self.peaks[kind] = max(self.peaks[kind], process.memory_info().rss)
            time.sleep(0.5)


if __name__ == "__main__":
    main()
