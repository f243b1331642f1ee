"""Counts the rows that simulated engines answer, in files that outlive a SIGKILL; on the path of a run's processes.

Python imports a module of this name at its start. It waits for ``serving.simulated`` to be imported and then counts
every answer in an eight-byte memory-mapped file of its process's own, in the folder that ``SOAK_COUNTS`` names.
"""

import importlib.util
import mmap
import os
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

COUNTED = "serving.simulated"


class Hook:
    """Finds one module as Python would, and changes it once it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Python's own specification, with a loader that counts."""
        if name != COUNTED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_count(module: ModuleType) -> None:
            load(module)
            count_answers(module)

        spec.loader.exec_module = load_and_count  # type: ignore[method-assign]
        return spec


def count_answers(module: Any) -> None:
    """Count what ``SimulatedEngine.generate`` answers."""
    path = Path(os.environ["SOAK_COUNTS"], f"{os.getpid()}-{time.time_ns()}")
    path.write_bytes(bytes(8))
    with path.open("r+b") as file:
        counter = mmap.mmap(file.fileno(), 8)
    generate = module.SimulatedEngine.generate
    answered = 0

    async def counting(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal answered
        result = await generate(self, *arguments, **options)
        answered += 1
        counter[:] = answered.to_bytes(8, "little")
        return result

    module.SimulatedEngine.generate = counting


if "SOAK_COUNTS" in os.environ:
    sys.meta_path.insert(0, Hook())
