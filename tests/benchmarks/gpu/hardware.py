"""What the device itself can do: ``python -m tests.benchmarks.gpu.hardware RESULT.json``, in a process of its own.

Memory bandwidth by a large copy (bytes read and written), FLOP/s by a large matrix product in bfloat16: the medians
of several, each waited for.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UPS, REPEATS = 3, 11
COPIED_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
MATRIX_SIZE = {"cuda": 16_384, "cpu": 1_024}


def measure() -> dict[str, Any]:
    """The first GPU's figures; those of the CPU where torch sees none."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    copies, products = _copies(torch, kind, wait), _products(torch, kind, wait)
    count, size = COPIED_BYTES[kind], MATRIX_SIZE[kind]
    return _device(torch, kind) | {
        "bytes_per_second": 2 * count / statistics.median(copies),
        "flops_per_second": 2 * size**3 / statistics.median(products),
        "copied_bytes": count,
        "copy_seconds": copies,
        "matrix_size": size,
        "product_seconds": products,
    }


def _copies(torch: Any, kind: str, wait: Callable[[], Any]) -> list[float]:
    source = torch.zeros(COPIED_BYTES[kind], dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), wait)


def _products(torch: Any, kind: str, wait: Callable[[], Any]) -> list[float]:
    factor = torch.randn(MATRIX_SIZE[kind], MATRIX_SIZE[kind], device=kind, dtype=torch.bfloat16)
    product = torch.empty_like(factor)
    return seconds_of(lambda: torch.mm(factor, factor, out=product), wait)


def seconds_of(work: Callable[[], Any], wait: Callable[[], Any]) -> list[float]:
    """How long the work took each time, until ``wait`` returned."""
    found = []
    for _ in range(WARM_UPS + REPEATS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - started)
    return found[WARM_UPS:]


def _device(torch: Any, kind: str) -> dict[str, Any]:
    if kind == "cpu":
        return {"name": "CPU"}
    told = torch.cuda.get_device_properties(0)
    names = {"name": told.name, "memory_bytes": told.total_memory, "cuda": torch.version.cuda}
    return names | {"gpus": torch.cuda.device_count(), "driver_and_power_limit": _driver()}


def _driver() -> str:
    """In the words of ``nvidia-smi``, empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.splitlines()[0] if said else ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure()))
