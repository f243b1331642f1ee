"""The steps of an installation, each logged in ``.venv/install.log`` and explained when it fails."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from environment import LOG, PYTHON, ROOT, STAMP, VENV, expected_stamp, lock_file, state

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index: CPU builds carry a local version (``+cpu``), which the Python package index refuses."""

SIZES = {"cpu": "about 1 GB to download, 4 GB installed", "gpu": "several GB to download, about 12 GB installed"}
PIP = [str(PYTHON), "-m", "pip", "install", "--no-deps", "--no-input", "--progress-bar", "off"]
NETWORK_ERRORS = "NewConnectionError|Timeout|ProxyError|SSLError|Max retries|IncompleteRead|HTTP error|Connection"
ONE_PACKAGE = re.compile(r"(?:Collecting|Requirement already satisfied:) (\S+)")


class InstallError(Exception):
    """A step failed; the message is all that a user needs to read."""


def bring_up_to_date(device: str) -> int:
    """Build or update ``.venv`` unless another process just did, and return the exit code."""
    with _only_one():
        found = state(device)
        try:
            if found != "current":
                _build(device, fresh=found == "rebuild")
        except InstallError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _build(device: str, *, fresh: bool) -> None:
    began = time.monotonic()
    requirements = lock_file(device).read_text().split()
    _say(f"Installing {len(requirements)} packages for {device.upper()} into .venv ({SIZES[device]}).")
    VENV.mkdir(exist_ok=True)
    LOG.touch()
    STAMP.unlink(missing_ok=True)
    if fresh:
        _clear(VENV)
        _run([sys.executable, "-m", "venv", str(VENV)], "the virtual environment")
    for requirement in requirements:
        if requirement.endswith("+cpu"):
            _install_local_build(requirement)
    wheels = ["--only-binary", ":all:", "--requirement", str(lock_file(device))]
    _run([*PIP, *wheels], "the locked packages", total=len(requirements))
    _run([*PIP, "--no-build-isolation", "--editable", str(ROOT)], "spanfill itself")
    _write_stamp(device)
    _say(f"Installed in {time.monotonic() - began:.0f} s.")


def _write_stamp(device: str) -> None:
    partial = STAMP.with_name(STAMP.name + ".partial")
    partial.write_text(json.dumps(expected_stamp(device)))
    partial.replace(STAMP)


def _install_local_build(requirement: str) -> None:
    """Take a CPU build of PyTorch from where pip looks already, else from PyTorch's own index."""
    one = [*PIP, "--only-binary", ":all:", requirement]
    try:
        _run(one, requirement)
    except InstallError as error:
        if "No matching distribution" not in str(error):
            raise
        _say(f"  pip's own index does not offer it; asking {TORCH_INDEX}.")
        _run([*one, "--index-url", TORCH_INDEX], requirement)


def _run(command: list[str], what: str, *, total: int = 0) -> None:
    """Run one step; its temporary files, which hold the downloads, stay on the environment's own disk."""
    _say(f"  {what} ...")
    scratch = VENV / "tmp"
    scratch.mkdir(exist_ok=True)
    try:
        status, lines = _logged(command, _variables(scratch), total)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if status:
        raise InstallError(explain_failure(what, lines))


def _variables(scratch: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"TMPDIR": str(scratch), "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _logged(command: list[str], variables: dict[str, str], total: int) -> tuple[int, list[str]]:
    lines: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables, text=True, errors="replace"
    )
    with LOG.open("a") as log, process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                lines.append(line.rstrip())
                _show_progress(lines, total)
        except KeyboardInterrupt:
            process.terminate()
            raise
    return process.returncode, lines


def _show_progress(lines: list[str], total: int) -> None:
    if lines[-1].startswith("Installing collected packages"):
        _say("    unpacking ...")
    elif total and ONE_PACKAGE.match(lines[-1]):
        number = sum(ONE_PACKAGE.match(line) is not None for line in lines)
        if number % 25 == 0:
            _say(f"    {number} of {total} packages")


def explain_failure(what: str, lines: list[str]) -> str:
    """Turn the output of a failed step into the package, the cause and what to do."""
    output = "\n".join(lines)
    named = re.findall(r"No matching distribution found for (\S+)", output)
    named = named or [found[1] for found in map(ONE_PACKAGE.match, lines) if found][-1:]
    if "No space left on device" in output:
        cause = "the disk is full."
    elif re.search(NETWORK_ERRORS, output):
        cause = "the network failed, or the package index did not answer properly."
    elif "No matching distribution" in output:
        cause = "the package index cannot be reached, or does not offer it for this Python."
    else:
        cause = "the step failed; its last lines follow."
    tail = "\n".join(f"    {line}" for line in lines[-8:])
    again = "It is safe to run the same command again: pip reuses what its cache kept."
    return f"Could not install {named[0] if named else what}: {cause}\n{tail}\n{again} The whole log: {LOG}"


def _clear(folder: Path) -> None:
    """Empty the environment but for the log, which marks it as ours should this be cut short."""
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child != LOG:
            child.unlink()


@contextmanager
def _only_one() -> Iterator[None]:
    """Wait until no other installation runs in this folder, by a lock on the project file."""
    with (ROOT / "pyproject.toml").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Another installation runs in this folder; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
