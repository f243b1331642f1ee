"""What this machine must have before anything is installed, and the sentences that say what it lacks.

Kept to the syntax of Python 3.6, so that an old Python reads a sentence and not a SyntaxError.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from typing import NamedTuple

OLDEST, NEWEST = (3, 11), (3, 13)
GLIBC = (2, 31)
NEEDED_BYTES = {"cpu": 6 * 10**9, "gpu": 16 * 10**9}
CUDA_13_DRIVER = 580

DOCKER = """Use Docker instead:
    docker build --platform linux/amd64 -f deploy/Dockerfile -t spanfill .
    docker run --rm -it --platform linux/amd64 spanfill demo"""


class Machine(NamedTuple):
    """Everything that decides whether and how spanfill can be installed."""

    device: str
    python: "tuple[int, ...]"
    system: str
    architecture: str
    glibc: str
    free_bytes: int
    folder: str
    ensurepip: bool = True
    libnuma: bool = True
    avx2: bool = True
    compiler: bool = True
    driver: str = ""


def problems(machine: Machine) -> "list[str]":
    """Say, one sentence group a problem, why spanfill cannot be installed here; empty when it can."""
    platform_problem = _platform(machine)
    if platform_problem:
        return [platform_problem]
    found = [_python(machine), _disk(machine)]
    if machine.device == "cpu":
        found += [_libnuma(machine), _avx2(machine)]
    return [problem for problem in found if problem]


def notes(machine: Machine) -> "list[str]":
    """Say what will probably fail later on a GPU, without refusing to install."""
    if machine.device != "gpu":
        return []
    found = []
    major = machine.driver.split(".")[0]
    if major.isdigit() and int(major) < CUDA_13_DRIVER:
        found.append(
            f"The locked packages use CUDA 13, which wants NVIDIA driver {CUDA_13_DRIVER} or newer; "
            f"this one is {machine.driver}. Update it, or set SPANFILL_DEVICE=cpu."
        )
    if not machine.compiler:
        found.append(
            "No C compiler was found; vLLM compiles small GPU kernels when it starts. "
            "On Debian or Ubuntu: sudo apt-get install gcc python3-dev"
        )
    return found


def inspect(device: str, folder: str, *, reusable_bytes: int = 0, driver: str = "") -> Machine:
    """Look at this machine; ``reusable_bytes`` is what an older environment in ``folder`` gives back."""
    return Machine(
        device=device,
        python=tuple(sys.version_info[:3]),
        system=platform.system(),
        architecture=platform.machine(),
        glibc=_glibc_version(),
        free_bytes=shutil.disk_usage(folder).free + reusable_bytes,
        folder=folder,
        ensurepip=importlib.util.find_spec("ensurepip") is not None,
        libnuma=_loads("libnuma.so.1"),
        avx2=_has_avx2(),
        compiler=any(shutil.which(name) for name in ("cc", "gcc", "clang")),
        driver=driver,
    )


def nvidia_driver() -> str:
    """Return the NVIDIA driver's version, or an empty string when no driver answers."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = answer.stdout.decode(errors="replace").split()
    return lines[0] if answer.returncode == 0 and lines else ""


def _platform(machine: Machine) -> str:
    if machine.system == "Linux" and machine.architecture in ("x86_64", "AMD64"):
        if _numbers(machine.glibc) >= GLIBC:
            return ""
        found = f"glibc {machine.glibc}" if machine.glibc else "another C library (Alpine's musl?)"
        return (
            f"spanfill needs a Linux with glibc {_dotted(GLIBC)} or newer (Debian 11, Ubuntu 20.04, RHEL 9 and "
            f"later); this one has {found}.\n{DOCKER}"
        )
    names = {"Darwin": "macOS", "": "an unknown system"}
    here = f"{names.get(machine.system, machine.system)} on {machine.architecture or 'an unknown processor'}"
    also = " (or work inside WSL2, which is a Linux)" if machine.system == "Windows" else ""
    if machine.architecture not in ("x86_64", "AMD64"):
        also += ", which Docker would emulate: slow and untested"
    return f"spanfill runs on Linux on x86-64 processors; this is {here}{also}.\n{DOCKER}"


def _python(machine: Machine) -> str:
    version = machine.python[:2]
    if OLDEST <= version <= NEWEST:
        if machine.ensurepip:
            return ""
        return (
            f"Python {_dotted(machine.python)} has no venv module. On Debian or Ubuntu: "
            f"sudo apt-get install python{_dotted(version)}-venv"
        )
    fault = "too old" if version < OLDEST else "newer than the locked packages support"
    return (
        f"Python {_dotted(machine.python)} is {fault}; spanfill needs Python 3.11, 3.12 or 3.13. "
        "Get one with your system's packages (Debian 12: sudo apt-get install python3.11 python3.11-venv), "
        "with pyenv, or from https://www.python.org/downloads/, then: make PYTHON=/path/to/python3.11 ..."
    )


def _disk(machine: Machine) -> str:
    needed = NEEDED_BYTES[machine.device]
    if machine.free_bytes >= needed:
        return ""
    return (
        f"The disk is short: installing takes about {_gigabytes(needed)}, and {machine.folder} has "
        f"{_gigabytes(machine.free_bytes)} free. Free {_gigabytes(needed - machine.free_bytes)} more, "
        "or put this folder on a larger disk."
    )


def _libnuma(machine: Machine) -> str:
    if machine.libnuma:
        return ""
    return (
        "The system library libnuma.so.1 is missing; vLLM's CPU build needs it. "
        "Debian or Ubuntu: sudo apt-get install libnuma1; Fedora or RHEL: sudo dnf install numactl-libs"
    )


def _avx2(machine: Machine) -> str:
    if machine.avx2:
        return ""
    return "This processor has no AVX2; vLLM's CPU build needs it (Intel since 2013, AMD since 2015)."


def _glibc_version() -> str:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        return ""
    return version if name == "glibc" else ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _has_avx2() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123 - read as it comes, one line at a time
            flags = next((line for line in lines if line.startswith("flags")), "avx2")
    except OSError:
        return True
    return "avx2" in flags.split()


def _numbers(version: str) -> "tuple[int, ...]":
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _dotted(numbers: "tuple[int, ...]") -> str:
    return ".".join(str(number) for number in numbers)


def _gigabytes(count: int) -> str:
    return f"{count / 10**9:.1f} GB"
