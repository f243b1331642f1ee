"""Rounds in turn, each contestant in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.setting import Setting

PAUSE_SECONDS = 3.0
"""Between two contestants, so that the processes of one are gone before the next begins."""

LOG_LINES = 15


@dataclass(frozen=True)
class Attempt:
    """One contestant in one round: its figures, and its outputs by row where they were asked for."""

    figures: dict[str, Any]
    outputs: dict[int, list[int]] = field(default_factory=dict)


def play(
    attempts: dict[str, list[Attempt]],
    rounds: int,
    setting: Setting,
    folder: Path,
    timeout: float,
    tell: Callable[[], None] = lambda: None,
) -> None:
    """Every contestant once a round, in turn (A, B, C, A, B, C); what one fails at is told in its figures.

    ``attempts`` may hold some from before; others are added, and ``tell`` is called after each.
    """
    setting.dump(folder / "setting.json")
    for number in range(1, rounds + 1):
        for name, made in attempts.items():
            if len(made) >= number:
                continue
            load = {"load_before": [round(load, 2) for load in os.getloadavg()]}
            attempt = _attempt(name, setting, folder, timeout)
            made.append(replace(attempt, figures=attempt.figures | load))
            tell()
            told = attempt.figures.get("failure") or f"{attempt.figures['rows_per_second']:.2f} rows/s"
            print(f"round {number} of {rounds}: {name}: {told}", file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)


def _attempt(name: str, setting: Setting, folder: Path, timeout: float) -> Attempt:
    result, log = folder / "result.json", folder / "log"
    result.unlink(missing_ok=True)
    module = "tests.benchmarks.peers.contestant"
    command = [sys.executable, "-m", module, name, str(folder / "setting.json"), str(result)]
    with log.open("wb") as told:
        code = _wait(command, setting.environment(), told, timeout)
    if code != 0 or not result.exists():
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        print("\n".join(lines[-LOG_LINES:]), file=sys.stderr)
        return Attempt({"failure": f"exit code {code}: {lines[-1][:300]}"})
    found = json.loads(result.read_text())
    return Attempt(found["figures"], {int(row): ids for row, ids in found["outputs"].items()})


def _wait(command: list[str], environment: dict[str, str], log: Any, timeout: float) -> int:
    """The exit code; a contestant that takes too long is killed with its process group."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return -signal.SIGKILL
        raise
