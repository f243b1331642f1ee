import json
from pathlib import Path

import pytest

from serving.errors import ModelError
from serving.models import KNOWN_MODELS, describe, download_notice, resolve_model


def folder(path: Path, config: dict[str, object], *files: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name in files:
        (path / name).touch()
    return str(path)


def test_known_names_have_current_hub_ids_and_an_explicit_dtype() -> None:
    multi = resolve_model("codegen25-7b-multi")
    assert multi.hub_id == "Salesforce/codegen25-7b-multi_P"
    assert (multi.dtype, multi.format, multi.context) == ("bfloat16", "codegen25", 2_048)


def test_a_download_says_what_it_takes() -> None:
    notice = download_notice(resolve_model("codegen25-7b-mono"))
    assert notice is not None
    assert all(words in notice for words in ("27.6 GB", "13.8 GB", "512 KiB", "unverified"))


def test_instruct_is_for_research_only() -> None:
    assert "research only" in describe(KNOWN_MODELS["codegen25-7b-instruct"])["notice"]


@pytest.mark.parametrize("name", [n for n in KNOWN_MODELS if n.startswith("codegen25")])
def test_models_tell_licence_data_attribution_and_citation(name: str) -> None:
    told = describe(KNOWN_MODELS[name])
    assert {"licence", "training data", "attribution", "citation"} <= told.keys()
    assert "2305.02309" in told["citation"]
    assert "starcoder-search" in told["attribution"]


def test_a_folder_tells_its_format_and_context(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 51_200, "max_position_embeddings": 512}
    found = resolve_model(folder(tmp_path / "m", config, "model.safetensors"))
    assert (found.format, found.context) == ("codegen25", 512)
    other = resolve_model(folder(tmp_path / "starcoder2-3b", {"model_type": "starcoder2"}, "a.bin"))
    assert other.format == "starcoder2"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="codegen25-7b-multi"):
        resolve_model("codegen25-7b-mutli")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no weights"):
        resolve_model(folder(tmp_path / "bare", {}))
    assert resolve_model(folder(tmp_path / "bare", {}), format="codegen25", weights=False).path == tmp_path / "bare"
    with pytest.raises(ModelError, match="--format"):
        resolve_model(folder(tmp_path / "x", {"model_type": "gpt2"}, "a.bin"))
    with pytest.raises(ModelError, match="no folder"):
        resolve_model("/nowhere/at/all")


def test_a_named_format_wins(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", {"model_type": "gpt2"}, "a.bin")
    assert resolve_model(path, format="codegen25").format == "codegen25"
