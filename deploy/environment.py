"""The folder ``.venv``: where it is, what its stamp says, and what state it is in.

Kept to the syntax of Python 3.6, so that an old Python reads a sentence and not a SyntaxError.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
STAMP = VENV / "installed.json"


def lock_file(device: str) -> Path:
    """Return the lock file of a device."""
    return ROOT / "deploy" / f"lock-{device}.txt"


def expected_stamp(device: str) -> "dict[str, str]":
    """Return what the stamp of a finished installation holds."""
    content = lock_file(device).read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    return {"device": device, "folder": str(ROOT), "digest": hashlib.sha256(content).hexdigest()}


def stamp() -> "dict[str, str]":
    """Return the stamp of the installation that is there, or an empty one."""
    try:
        found = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def state(device: str) -> str:
    """Say whether ``.venv`` is ``current``, needs an ``update`` or a ``rebuild``, or is ``foreign``.

    The log is begun first and the stamp written last: a log without a stamp is an installation cut short.
    """
    there, wanted = stamp(), expected_stamp(device)
    if there:
        if there.get("device") != device or there.get("folder") != str(ROOT) or not PYTHON.exists():
            return "rebuild"
        return "current" if there == wanted else "update"
    if LOG.exists() or not VENV.exists() or (VENV.is_dir() and not any(VENV.iterdir())):
        return "rebuild"
    return "update" if _has_pip() else "foreign"


def size_on_disk() -> int:
    """Return the bytes that the environment takes; 0 when there is none."""
    paths = (os.path.join(base, name) for base, _, names in os.walk(str(VENV)) for name in names)  # noqa: PTH118
    return sum(os.lstat(path).st_blocks * 512 for path in paths)


def _has_pip() -> bool:
    if not PYTHON.exists():
        return False
    return subprocess.call([str(PYTHON), "-c", "import pip"], stderr=subprocess.DEVNULL) == 0
