"""The files that a job has finished, by names that lead nowhere else."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.api.order import WorkFolder
from serving.errors import NotFoundError

FOLDERS = ("data", "errors")
PART = re.compile(r"part-[0-9]{5,}-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True, slots=True)
class PartFile:
    """One Parquet file of results, or of the rows that could not be done; ``size`` in bytes."""

    folder: str
    name: str
    path: Path
    size: int


def part_files(folder: WorkFolder) -> list[PartFile]:
    """The parts that are out, in the order of the input, then their error rows."""
    results = folder.results()
    names = [path.name for path in sorted((results / FOLDERS[0]).glob("part-*")) if PART.fullmatch(path.name)]
    # Error rows without a part are those of a unit that is not done: they may change.
    found = [_part(kind, name, results / kind / name) for kind in FOLDERS for name in names]
    return [part for part in found if part is not None]


def _part(kind: str, name: str, path: Path) -> PartFile | None:
    """One of them, unless it is not there, or no more: a job may be deleted meanwhile."""
    with suppress(FileNotFoundError):
        return PartFile(kind, name, path, path.stat().st_size)
    return None


def find_part(folder: WorkFolder, kind: str, name: str) -> PartFile:
    """One of them; raises ``NotFoundError``."""
    for part in part_files(folder):
        if (part.folder, part.name) == (kind, name):
            return part
    raise NotFoundError("The job has no such part.", remedy="List its results.")
