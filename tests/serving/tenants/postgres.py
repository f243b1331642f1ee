"""A PostgreSQL server of the tests' own: in a temporary folder, on a Unix socket alone, never as root."""

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

DEBIAN = Path("/usr/lib/postgresql")
MISSING = (
    "These tests need PostgreSQL's initdb, pg_ctl and createdb: in the PATH, or where Debian's package `postgresql` "
    "puts them."
)


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
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
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
    programs, owner = _programs(), _owner()
    folder = Path(tempfile.mkdtemp(prefix="spanfill-pg-"))
    if owner:
        os.chown(folder, owner["user"], owner["group"])
    server = Postgres(programs, folder, owner)
    try:
        server.run("initdb", "-D", "data", "-U", "spanfill", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        server.start()
        yield server
    finally:
        with suppress(RuntimeError):
            server.stop()
        shutil.rmtree(folder)


def _programs() -> Path:
    """The folder of the server's programs: Debian keeps them out of the PATH, one folder a version."""
    newest_first = sorted(DEBIAN.glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    in_path = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    for folder in (*in_path, *newest_first):
        if all((folder / name).exists() for name in ("initdb", "pg_ctl", "createdb")):
            return folder
    raise FileNotFoundError(MISSING)


def _owner() -> dict[str, Any]:
    """Who shall run it: PostgreSQL refuses to be root's."""
    if os.getuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
