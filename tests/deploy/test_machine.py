"""What a machine must have, judged on values alone."""

import runpy
from pathlib import Path
from typing import Any

import pytest

MACHINE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "deploy" / "machine.py"))
GOOD = MACHINE["Machine"](
    device="cpu",
    python=(3, 11, 7),
    system="Linux",
    architecture="x86_64",
    glibc="2.36",
    free_bytes=10**12,
    folder="/home/me/spanfill",
)


def test_a_good_machine_has_no_problem() -> None:
    assert MACHINE["problems"](GOOD) == []
    assert MACHINE["problems"](GOOD._replace(python=(3, 13, 0), device="gpu")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": (3, 10, 2)}, ["3.10.2", "too old", "3.11, 3.12 or 3.13"]),
        ({"python": (3, 6, 15)}, ["3.6.15", "too old"]),
        ({"python": (3, 14, 0)}, ["3.14.0", "newer"]),
        ({"ensurepip": False}, ["venv", "python3.11-venv"]),
        ({"system": "Darwin", "architecture": "arm64"}, ["Linux", "macOS on arm64", "deploy/Dockerfile"]),
        ({"system": "Windows", "architecture": "AMD64"}, ["Windows", "WSL2", "deploy/Dockerfile"]),
        ({"architecture": "aarch64"}, ["x86-64", "aarch64", "slow"]),
        ({"glibc": ""}, ["glibc 2.31", "musl"]),
        ({"glibc": "2.28"}, ["glibc 2.31", "glibc 2.28"]),
        ({"free_bytes": 4_500_000_000}, ["6.0 GB", "4.5 GB", "1.5 GB more", "/home/me/spanfill"]),
        ({"free_bytes": 6_000_000_000, "device": "gpu"}, ["16.0 GB", "10.0 GB more"]),
        ({"libnuma": False}, ["libnuma.so.1", "apt-get install libnuma1"]),
        ({"avx2": False}, ["AVX2"]),
    ],
)
def test_each_lack_is_one_problem_that_says_what_to_do(change: dict[str, Any], words: list[str]) -> None:
    [problem] = MACHINE["problems"](GOOD._replace(**change))
    assert [word for word in words if word not in problem] == []


def test_several_lacks_are_told_at_once() -> None:
    assert len(MACHINE["problems"](GOOD._replace(python=(3, 9, 0), free_bytes=0, libnuma=False))) == 3


def test_what_only_the_cpu_build_needs_does_not_stop_a_gpu() -> None:
    assert MACHINE["problems"](GOOD._replace(device="gpu", libnuma=False, avx2=False)) == []


def test_an_old_driver_and_no_compiler_are_noted_for_a_gpu_only() -> None:
    poor = GOOD._replace(driver="550.54.15", compiler=False)
    assert MACHINE["notes"](poor) == []
    driver, compiler = MACHINE["notes"](poor._replace(device="gpu"))
    assert "550.54.15" in driver
    assert "gcc" in compiler
    assert MACHINE["notes"](GOOD._replace(device="gpu", driver="580.65.06")) == []
