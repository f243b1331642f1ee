"""What a node is asked before a job starts, and what its answer leads to."""

from pathlib import Path

import pytest

from jobs.preflight import judge, look, versions
from jobs.store import locate
from serving.config import EngineConfig
from serving.errors import UsageError, VersionError

ENGINE = EngineConfig(model="/models/seven", max_model_len=512)


def test_a_node_tells_its_versions_and_what_it_does_not_see(tmp_path: Path) -> None:
    here, gone = locate(str(tmp_path)), locate(str(tmp_path / "gone.parquet"))
    assert look(str(tmp_path), [here], here) == {"versions": versions(), "missing": [], "model_missing": False}
    seen = look(str(tmp_path / "model"), [here, gone], None)
    assert (seen["missing"], seen["model_missing"]) == ([str(gone)], True)
    assert {"vllm", "ray", "torch", "python"} <= {name for name, version in seen["versions"].items() if version}


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ({"versions": versions() | {"vllm": "0.1"}}, VersionError, "node b runs vllm 0.1"),
        ({"missing": ["/data/in.parquet"]}, UsageError, "node b does not reach /data/in.parquet"),
        ({"model_missing": True}, UsageError, "node b does not see the model /models/seven"),
    ],
)
def test_a_node_that_lacks_something_is_named(answer: dict[str, object], error: type[Exception], words: str) -> None:
    good = {"versions": versions(), "missing": [], "model_missing": False}
    judge("b", good, ENGINE)
    with pytest.raises(error, match=words):
        judge("b", good | answer, ENGINE)
