"""Fixtures that the whole suite shares: the command in this process, small checkpoints, small inputs."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import settings

from jobs.cli import main
from tests.checkpoints import llama_checkpoint

settings.register_profile("spanfill", deadline=None)
settings.load_profile("spanfill")  # How long an example takes says how busy the machine is.


@dataclass(frozen=True)
class Ran:
    """What a command left behind; ``stderr`` on one line."""

    code: int
    stdout: str
    stderr: str


Command = Callable[..., Ran]
WriteRows = Callable[..., Path]


@pytest.fixture
def spanfill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``spanfill`` with arguments, in this process."""

    def run(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["spanfill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return Ran(int(ended.value.code or 0), told.out, " ".join(told.err.split()))

    return run


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write columns as ``rows.parquet``."""

    def write(name: str = "rows.parquet", **columns: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        return path

    return write


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray for every job that a test runs in this process; its workers know the credentials of the test's S3."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in CodeGen2.5's configuration, as sharded FP32 ``.bin``."""
    return llama_checkpoint(tmp_path_factory.mktemp("bin") / "codegen25-small", form="bin")


@pytest.fixture(scope="session")
def safe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as sharded safetensors."""
    return llama_checkpoint(tmp_path_factory.mktemp("safe") / "codegen25-small", form="safetensors")
