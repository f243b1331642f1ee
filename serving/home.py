"""Where spanfill keeps the state of this machine and user, and which database is meant: by the environment."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HOME_VARIABLE = "SPANFILL_HOME"
DATABASE_VARIABLE = "SPANFILL_DATABASE_URL"


def home_folder() -> Path:
    """The folder for the embedded database and the journals of usage; it need not be there yet."""
    return find_home(os.environ, sys.platform)


def database_url() -> str | None:
    """The database that the environment names, or None."""
    return os.environ.get(DATABASE_VARIABLE) or None


def find_home(environment: Mapping[str, str], platform: str) -> Path:
    """``SPANFILL_HOME``, else ``spanfill`` in the user's data folder.

    That is ``~/Library/Application Support`` on macOS, elsewhere ``XDG_DATA_HOME`` where it is an absolute path, as the
    XDG Base Directory Specification asks, or ``~/.local/share``.
    """
    if chosen := environment.get(HOME_VARIABLE):
        return Path(chosen).expanduser().absolute()
    if platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "spanfill"
    data = Path(environment.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "spanfill"
