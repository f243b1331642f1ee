"""The process of a work, as the gateway sees it: begun, asked to stop, ended."""

import os
import signal
import subprocess
import sys
import time

import ray

from jobs.api.order import GRACE_SECONDS, Mode, WorkFolder


class WorkProcess:
    """One process of a work; what it prints goes to the work's log."""

    def __init__(self, folder: WorkFolder, mode: Mode) -> None:
        folder.outcome.unlink(missing_ok=True)
        command = [sys.executable, "-m", "jobs.api.worker", str(folder.path), mode, str(os.getpid())]
        with folder.log.open("ab") as log:
            # In a session of its own: whoever interrupts the server asks the gateway to stop, which asks the process.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(), start_new_session=True
            )
        self._asked: float | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to stop, once; kill it when it does not for ``GRACE_SECONDS``."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            self._process.send_signal(signal.SIGTERM)
        elif now - self._asked > GRACE_SECONDS:
            self._process.kill()

    def end(self) -> None:
        """Wait until it has ended, however that comes about."""
        while self._process.poll() is None:
            self.stop()
            time.sleep(0.1)


def _environment() -> dict[str, str]:
    """Ours, and where the cluster is that this process is in."""
    found = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray.is_initialized() else {}
    return {**os.environ, **found}
