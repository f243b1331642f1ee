"""The files that a job has finished, by names that lead nowhere else."""

import re
from dataclasses import dataclass
from pathlib import Path

from jobs.api.order import WorkFolder
from serving.errors import NotFoundError

FOLDERS = ("data", "errors")
PART = re.compile(r"part-[0-9]{5,}-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True, slots=True)
class PartFile:
    """One Parquet file of results, or of the rows that could not be done."""

    folder: str
    name: str
    path: Path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size


def part_files(folder: WorkFolder) -> list[PartFile]:
    """The parts that are out, in the order of the input, then their error rows."""
    results = folder.results()
    names = [path.name for path in sorted((results / FOLDERS[0]).glob("part-*")) if PART.fullmatch(path.name)]
    # Error rows without a part are those of a unit that is not done: they may change.
    found = [PartFile(kind, name, results / kind / name) for kind in FOLDERS for name in names]
    return [part for part in found if part.path.is_file()]


def find_part(folder: WorkFolder, kind: str, name: str) -> PartFile:
    """One of them; raises ``NotFoundError``."""
    for part in part_files(folder):
        if (part.folder, part.name) == (kind, name):
            return part
    raise NotFoundError("The job has no such part.", remedy="List its results.")
