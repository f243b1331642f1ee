import subprocess
import sys
from pathlib import Path

import pytest

from serving.cores import available_cores, claim_cores
from serving.errors import ResourceError

CLAIM = """import pathlib, sys
from serving.cores import claim_cores
print(*claim_cores(1, folder=pathlib.Path(sys.argv[1])))"""


def test_cores_are_claimed_once_and_freed_by_death(tmp_path: Path) -> None:
    mine = claim_cores(len(available_cores()), folder=tmp_path)
    assert sorted(mine) == available_cores()
    with pytest.raises(ResourceError, match="0 of"):
        claim_cores(1, folder=tmp_path)


def test_a_dead_process_leaves_its_cores(tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", CLAIM, str(tmp_path)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(available_cores()[0])
