"""A job under constant fire: a random process of it is killed every few seconds until it is done.

    python -m tests.benchmarks.soak --rows 1000000

Prints one JSON object: kills survived by kind, rows lost and doubled, the share of work that was repeated, and the
memory peak of each kind of process. The engine is simulated (``instant``): what is tried is everything around it.
Rows that an engine answered are counted in its own process (``counting/``), whatever became of the answer.
"""

import argparse
import json
import random
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

from jobs.verify import verify
from tests.runs import Run, write_pairs

WEIGHTS = {"replica": 4, "feeder": 4, "driver": 2, "controller": 1}
"""How often each kind is chosen; a driver's death costs a start of Ray, some eight seconds."""

MEASURED = ("driver", "replica", "feeder", "controller")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, nargs=2, default=(3.0, 9.0), help="seconds between two kills")
    parser.add_argument("--folder", type=Path, help="kept; else a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spanfill-soak-") as temporary:
        folder = arguments.folder or Path(temporary)
        result = soak(folder, rows=arguments.rows, seed=arguments.seed, pause=tuple(arguments.pause))
    print(json.dumps(result, indent=1))
    sys.exit(0 if not result["rows_lost"] and not result["rows_doubled"] and not result["problems"] else 1)


def soak(folder: Path, *, rows: int, seed: int, pause: tuple[float, float]) -> dict[str, Any]:
    """Run the job to its end through kills; returns the figures."""
    source = write_pairs(folder / "rows.parquet", rows, seed=seed, words=12, row_group_size=10_000)
    output, log, draw = folder / "out", folder / "log", random.Random(seed)
    options = ["--input", source, "--output", output, "--engine", "instant", "--max-tokens", 16]
    options += ["--rows-per-part", 4_000, "--replicas", 2]
    counts = folder / "counts"
    counts.mkdir(exist_ok=True)
    counting = {"SOAK_COUNTS": str(counts), "PYTHONPATH": str(Path(__file__).with_name("counting"))}
    meter, kills, asked, started = Meter(), Counter[str](), 0, time.monotonic()
    while True:
        run = Run(log, *options, env=counting)
        meter.watch(run)
        while run.process.poll() is None:
            time.sleep(draw.uniform(*pause))
            kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            if run.process.poll() is None and run.kill(kind, draw):
                kills[kind] += 1
                print(f"{time.monotonic() - started:7.1f} s  {_done(output):>9,} rows  killed {kind}", file=sys.stderr)
        code = run.wait()
        asked += 1
        if code == 0:
            manifest = json.loads(run.stdout)
            break
        assert code == -9, f"exit code {code}: {run.told[-2_000:]}"
    seconds = time.monotonic() - started
    found = Counter(
        value for path in (output / "data").iterdir() for value in pq.read_table(path, columns=["id"])["id"].to_pylist()
    )
    return {
        "rows": rows,
        "engine": manifest["engine"],
        "seconds": round(seconds, 1),
        "kills": dict(kills),
        "kills_survived": sum(kills.values()),
        "runs": asked,
        "rows_lost": rows - len(found),
        "rows_doubled": sum(count - 1 for count in found.values()),
        "error_rows": manifest["errors"],
        "work_repeated_share": round(sum(_answered(path) for path in counts.iterdir()) / rows - 1, 4),
        "memory_peak_mib": {kind: round(peak / 2**20) for kind, peak in meter.peaks.items()},
        "problems": verify(str(output)).problems,
    }


def _done(output: Path) -> int:
    """Rows of the finished parts, from their footers."""
    return sum(pq.read_metadata(path).num_rows for path in output.glob("data/*.parquet"))


def _answered(path: Path) -> int:
    """Rows that one engine's process answered, whatever became of them."""
    return int.from_bytes(path.read_bytes(), "little")


class Meter:
    """Memory peaks of the processes of the runs that it watches."""

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
