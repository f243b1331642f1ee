"""What a table was measured on: processor, memory, versions; no names."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from serving.cores import available_cores
from serving.engine_args import installed_version

PACKAGES = ("torch", "ray", "transformers", "tiktoken", "pyarrow", "spanfill")
ROOT = Path(__file__).parents[2]
SOURCES = ("serving", "jobs", "tests/benchmarks")


def machine() -> dict[str, Any]:
    """Cores, processor, memory, and how busy the machine is with other work."""
    return {
        "cores": len(available_cores()),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Of Python and of what the contestants are made of."""
    found = {"python": platform.python_version(), "vllm": installed_version("vllm")}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"source": _source()}


def _source() -> str:
    """Twelve hexadecimal digits of the sha256 of the code measured: its version stays the same while it changes."""
    paths = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:12]
