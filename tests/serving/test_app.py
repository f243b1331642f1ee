"""What an application's configuration becomes before it is built."""

import shutil
from pathlib import Path

import pytest

from serving import app
from serving.app import pinned
from serving.app_config import AppConfig
from serving.errors import ModelError
from serving.models import Model

COMMIT = "c" * 40


def test_a_hubs_model_is_pinned_to_a_commit_by_which_jobs_join(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def resolve(model: Model) -> str:
        asked.append(model.revision)
        return COMMIT

    monkeypatch.setattr(app, "resolve_revision", resolve)
    config = pinned(AppConfig(model="codegen25-7b-multi", revision="v1"))
    assert (config.revision, config.engine_config().revision, asked) == (COMMIT, COMMIT, ["v1"])


@pytest.mark.parametrize("values", [{"model": "demo-codegen25"}, {"model": "codegen25-7b-multi", "engine": "instant"}])
def test_what_comes_from_no_hub_has_no_commit(values: dict[str, str]) -> None:
    assert pinned(AppConfig.parse(values)).revision is None


def test_weights_must_be_there_for_an_engine_that_reads_them(checkpoint: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("*.bin*"))
    assert AppConfig(model=str(bare), engine="simulated").engine_config().model == str(bare)
    assert AppConfig(model=str(bare), engine_args={"load_format": "dummy"}).engine_config().model == str(bare)
    with pytest.raises(ModelError, match="no weights"):
        AppConfig(model=str(bare)).engine_config()
