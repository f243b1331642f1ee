"""``spanfill run`` as a process of its own, and the processes that it starts, to be killed."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.runner import Watcher

NAMES = {
    "replica": "ray::ServeReplica",
    "feeder": "ray::Feeder",
    "controller": "ray::ServeController",
    "raylet": "raylet",
    "gcs_server": "gcs_server",
}
"""What the processes of a run call themselves; ``driver`` is the command itself, ``engine`` a core process of vLLM."""

NAME_LENGTH = 15
"""Of a process' name Linux keeps so many characters."""

COUNTING = Path(__file__).parent / "benchmarks" / "counting"

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def write_pairs(
    path: Path, rows: int, *, seed: int = 0, words: int = 30, row_group_size: int = 500, bad: Collection[int] = ()
) -> Path:
    """Rows of random words that share beginnings, with ids; the ``bad`` ones have no prefix."""
    draw = random.Random(seed)
    heads = [" ".join(draw.choices(WORDS, k=words)) for _ in range(20)]
    prefixes = [f"{draw.choice(heads)} {' '.join(draw.choices(WORDS, k=5))} {i}" for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    given = [None if i in bad else prefix for i, prefix in enumerate(prefixes)]
    table = pa.table({"id": range(rows), "prefix": given, "suffix": ["\nend\n"] * rows})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def counting(folder: Path) -> dict[str, str]:
    """The environment of a run whose simulated engines count the rows that they answer, in ``folder``."""
    folder.mkdir(exist_ok=True)
    paths = [str(COUNTING), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"SOAK_COUNTS": str(folder), "PYTHONPATH": os.pathsep.join(paths)}


def answered(folder: Path) -> int:
    """Rows that engines answered in all runs that counted in ``folder``, whatever became of the answers."""
    return sum(int.from_bytes(path.read_bytes(), "little") for path in folder.iterdir())


class Listener(Watcher):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, message: str) -> None:
        """Keep it."""
        self.heard.append(message)


class Run:
    """One run of the command; its stderr goes to ``log``. ``seen`` are the names of its processes, by their ids."""

    def __init__(self, log: Path, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        self._log = log
        # Not a pipe: nobody reads before the end, and the manifest of many parts would fill one.
        self._printed = log.with_name(f"{log.name}.stdout")
        self.seen: dict[int, str] = {}
        command = [sys.executable, "-m", "jobs.cli", "run", "--json", *map(str, arguments)]
        with log.open("a") as stderr, self._printed.open("w") as stdout:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env={**os.environ, **(env or {})})

    @property
    def told(self) -> str:
        """What was written to stderr so far, on one line."""
        return " ".join(self._log.read_text().split())

    def wait(self, seconds: float = 240) -> int:
        """Its exit code."""
        code = self.process.wait(seconds)
        self.stdout = self._printed.read_text()
        return code

    def manifest(self, seconds: float = 240) -> dict[str, Any]:
        """What it printed at its end, which must be a good one."""
        code = self.wait(seconds)
        assert code == 0, f"exit code {code}: {self.told}"
        manifest: dict[str, Any] = json.loads(self.stdout)
        return manifest

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Wait while the run lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            code = self.process.poll()
            assert code is None, f"ended with {code}; its processes were {self.seen}: {self.told}"
            assert time.monotonic() < deadline, f"waited in vain; its processes were {self.seen}: {self.told}"
            time.sleep(0.05)

    def processes(self, kind: str) -> list[psutil.Process]:
        """The live processes of a kind that this run started, or itself."""
        with suppress(psutil.NoSuchProcess):
            mine = psutil.Process(self.process.pid)
            if kind == "driver":
                return [mine]
            if kind == "engine":
                return [core for replica in self.processes("replica") for core in _cores(replica)]
            named = [(process, _name(process)) for process in mine.children(recursive=True)]
            self.seen.update((process.pid, name) for process, name in named if name)
            return [process for process, name in named if name == NAMES[kind][:NAME_LENGTH]]
        return []

    def tree(self) -> list[psutil.Process]:
        """Its process and all that it started, as they are now."""
        mine = psutil.Process(self.process.pid)
        return [mine, *mine.children(recursive=True)]

    def kill(self, kind: str, draw: random.Random) -> bool:
        """SIGKILL one process of a kind; whether there was one."""
        found = self.processes(kind)
        if found:
            with suppress(psutil.NoSuchProcess):
                draw.choice(found).kill()
        return bool(found)

    def end(self) -> None:
        """Kill it and whatever it started, for the end of a test that failed."""
        with suppress(psutil.NoSuchProcess):
            for process in reversed(self.tree()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@contextmanager
def running(log: Path, *arguments: object, env: Mapping[str, str] | None = None) -> Iterator[Run]:
    """A run that is over when the block is."""
    run = Run(log, *arguments, env=env)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.end()


def _cores(replica: psutil.Process) -> list[psutil.Process]:
    """The live core processes of vLLM in a replica, which are the children of it that have a child, their worker.

    Not by the title that they give themselves: setproctitle looks for its place before the first variable of the
    environment, and sets none, without a word, where that variable was changed. Ray orders them by chance.
    """
    with suppress(psutil.NoSuchProcess):
        return [child for child in replica.children() if _name(child) and child.children()]
    return []


def _name(process: psutil.Process) -> str:
    """Its name while it lives, else nothing."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else Path(f"/proc/{process.pid}/comm").read_text().strip()
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return ""


def journaled(output: Path) -> list[Path]:
    """The journal segments that are there."""
    return list(output.glob("_spanfill/journal/*/*.arrow"))


def contents(output: Path) -> dict[str, bytes]:
    """Every finished part's bytes by its name."""
    return {path.name: path.read_bytes() for path in sorted((output / "data").iterdir())}


def rows(output: Path, folder: str = "data") -> list[dict[str, Any]]:
    """The rows of all parts, in order."""
    return [row for path in sorted((output / folder).iterdir()) for row in pq.read_table(path).to_pylist()]
