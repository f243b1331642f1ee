"""What makes two models the same or different, at the price of a few megabytes of reading."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pytest

from serving.errors import ModelError
from serving.models import Model, resolve_model
from serving.weights import SAMPLE_BYTES, SAMPLES, resolve_revision, weights_identity
from tests.checkpoints import llama_checkpoint

Form = Literal["safetensors", "bin"]
FORMS = pytest.mark.parametrize("form", ["safetensors", "bin"])
PATTERNS = {"safetensors": "*.safetensors", "bin": "*.bin"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_MODEL = Model("organisation/name", "codegen25", 2_048, hub_id="organisation/name")
FEW_MEGABYTES = 8 << 20
Hub = dict[str, tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Two fine-tunes in both forms, in shards of several megabytes."""
    folder = tmp_path_factory.mktemp("weights")
    forms: tuple[Form, ...] = ("safetensors", "bin")
    return {
        (form, seed): llama_checkpoint(folder / form / str(seed), form=form, hidden=32, layers=1, seed=seed)
        for form in forms
        for seed in (0, 1)
    }


@pytest.fixture
def copy(checkpoints: dict[tuple[str, int], Path], tmp_path: Path, form: Form) -> Path:
    """A checkpoint that a test may change."""
    shutil.copytree(checkpoints[form, 0], tmp_path / "elsewhere" / "copy")
    return tmp_path / "elsewhere" / "copy"


def identity(path: Path) -> dict[str, Any]:
    return weights_identity(resolve_model(str(path)), None)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def largest(folder: Path, form: Form) -> Path:
    return max(folder.glob(PATTERNS[form]), key=lambda path: path.stat().st_size)


def bytes_read() -> int:
    """Bytes that this process has read, from files and otherwise."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def sparse(path: Path, size: int, beginning: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(size)


@FORMS
def test_the_same_files_elsewhere_are_the_same_model(
    checkpoints: dict[tuple[str, int], Path], copy: Path, form: Form
) -> None:
    for path in copy.iterdir():
        path.touch()
    assert identity(copy) == identity(checkpoints[form, 0])
    assert json.loads(json.dumps(identity(copy))) == identity(copy)


@FORMS
@pytest.mark.parametrize(
    "name", ["training.json", "notes.txt", "trainer_state.json", "chat_template.jinja", "README.md"]
)
def test_notes_beside_the_weights_change_nothing(copy: Path, form: Form, name: str) -> None:
    before = identity(copy)
    (copy / name).write_text("{}")
    assert identity(copy) == before


@FORMS
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.bpe", "modeling_own.py", "quantize_config.json"])
def test_what_decides_how_weights_are_read_is_part_of_them(copy: Path, form: Form, name: str) -> None:
    before = identity(copy)
    (copy / name).write_text("{}")
    assert identity(copy) != before


@FORMS
def test_another_fine_tune_differs_although_sizes_and_headers_are_alike(
    checkpoints: dict[tuple[str, int], Path], form: Form
) -> None:
    one, two = checkpoints[form, 0], checkpoints[form, 1]
    first, second = identity(one), identity(two)
    assert first.keys() == second.keys()
    shards = [path.name for path in one.glob(PATTERNS[form])]
    assert shards
    for name in shards:
        assert (one / name).stat().st_size == (two / name).stat().st_size
        assert first[name]["size"] == second[name]["size"]
        assert first[name]["sha256"] != second[name]["sha256"]
    assert {name for name in first if first[name] != second[name]} == set(shards)


@FORMS
@pytest.mark.parametrize("sample", [0, 1, SAMPLES // 2, SAMPLES - 2])
def test_a_byte_that_changed_deep_in_a_sample_is_seen(copy: Path, form: Form, sample: int) -> None:
    path = largest(copy, form)
    size = path.stat().st_size
    assert size > 3 << 20
    before = identity(copy)
    flip(path, sample * max(SAMPLE_BYTES, size // SAMPLES) + SAMPLE_BYTES - 1)
    after = identity(copy)
    assert {name for name in before if before[name] != after[name]} == {path.name}


@FORMS
def test_a_byte_that_changed_at_the_end_is_seen(copy: Path, form: Form) -> None:
    before = identity(copy)
    flip(largest(copy, form), largest(copy, form).stat().st_size - 1)
    assert identity(copy) != before


@FORMS
def test_a_weights_file_that_grew_is_seen(copy: Path, form: Form) -> None:
    before = identity(copy)
    with largest(copy, form).open("ab") as file:
        file.write(b"\0")
    assert identity(copy) != before


@pytest.mark.parametrize("form", ["safetensors"])
def test_a_header_that_names_its_tensors_otherwise_is_seen(copy: Path, form: Form) -> None:
    path = largest(copy, form)
    with path.open("rb") as file:
        header = file.read(8 + int.from_bytes(file.read(8), "little"))
    before = identity(copy)
    flip(path, header.rindex(b"weight"))
    assert identity(copy) != before


@FORMS
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"])
def test_a_changed_configuration_or_tokenizer_is_another_model(copy: Path, form: Form, name: str) -> None:
    before = identity(copy)
    path = copy / name
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    first = identity(copy)
    assert first != before
    path.write_text(path.read_text() + " ")
    assert identity(copy) != first


@FORMS
@pytest.mark.parametrize("name", ["generation_config.json", "README.md", ".gitattributes", "figure.png"])
def test_what_does_not_enter_an_infill_does_not_count(copy: Path, form: Form, name: str) -> None:
    before = identity(copy)
    (copy / name).write_text("changed")
    (copy / "folder.json").mkdir()
    assert identity(copy) == before


def test_links_count_as_what_they_point_at(checkpoints: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    """A snapshot in the hub's cache is a folder of links."""
    for path in checkpoints["safetensors", 0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert identity(tmp_path) == identity(checkpoints["safetensors", 0])


def header(size: int) -> bytes:
    text = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("size", [5 << 20, 2 << 30])
def test_of_a_large_file_a_few_megabytes_are_read(tmp_path: Path, name: str, size: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    sparse(tmp_path / name, size, header(size) if name.endswith("safetensors") else b"")
    model = Model("large", "codegen25", 2_048, path=tmp_path)
    before = bytes_read()
    found = weights_identity(model, None)
    assert bytes_read() - before < FEW_MEGABYTES
    assert found[name]["size"] == size
    flip(tmp_path / name, 40 * (size // SAMPLES) + 10)
    assert weights_identity(model, None) != found


def test_a_header_that_lies_about_its_length_is_not_read_to_the_end(tmp_path: Path) -> None:
    """As a download that broke off leaves it, or a file that is no safetensors."""
    sparse(tmp_path / "model.safetensors", 256 << 20, (1 << 40).to_bytes(8, "little"))
    before = bytes_read()
    weights_identity(Model("broken", "codegen25", 2_048, path=tmp_path), None)
    assert bytes_read() - before < 128 << 20


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, SAMPLE_BYTES, 1 << 16, (1 << 16) + 1, 300_000])
def test_tiny_weights_are_read_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    model = Model("tiny", "codegen25", 2_048, path=tmp_path)
    path.write_bytes(bytes(size))
    found = weights_identity(model, None)
    assert found["model.safetensors"]["size"] == size
    for at in {0, size // 2, size - 1} if size else ():
        flip(path, at)
        assert weights_identity(model, None) != found
        flip(path, at)
    assert weights_identity(model, None) == found


def test_a_folder_that_cannot_be_read_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone: No such file or directory\. Grant read access"):
        weights_identity(Model("gone", "codegen25", 2_048, path=tmp_path / "gone"), None)


def test_a_hub_model_is_its_id_and_its_commit() -> None:
    assert weights_identity(HUB_MODEL, COMMIT) == {"hub": "organisation/name", "revision": COMMIT}
    assert weights_identity(HUB_MODEL, COMMIT) != weights_identity(HUB_MODEL, "f" * 40)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of its own, empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine: what it answers at each path, anything else with 404."""
    answers: Hub = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, told = answers.get(unquote(self.path.split("?")[0]), (404, {"error": "not here"}))
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nobody listens."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


def keep(cache: Path, revision: str, commit: str) -> None:
    """Put a snapshot into the cache as a download does."""
    folder = cache / "models--organisation--name"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")


def told(commit: str) -> tuple[int, dict[str, Any]]:
    return 200, {"id": "organisation/name", "sha": commit}


def test_the_hub_tells_the_commit_of_a_revision(hub: Hub) -> None:
    hub["/api/models/organisation/name"] = told(COMMIT)
    hub["/api/models/organisation/name/revision/v1"] = told("f" * 40)
    assert resolve_revision(HUB_MODEL) == COMMIT
    assert resolve_revision(replace(HUB_MODEL, revision="v1")) == "f" * 40


def test_the_hub_wins_over_an_old_cache(hub: Hub, cache: Path) -> None:
    keep(cache, "main", "a" * 40)
    hub["/api/models/organisation/name"] = told(COMMIT)
    assert resolve_revision(HUB_MODEL) == COMMIT


@pytest.mark.parametrize("status", [401, 404, 500])
def test_where_the_hub_fails_the_cache_tells(hub: Hub, cache: Path, status: int) -> None:
    hub["/api/models/organisation/name"] = (status, {"error": "no"})
    keep(cache, "main", "a" * 40)
    assert resolve_revision(HUB_MODEL) == "a" * 40


@pytest.fixture(params=["offline", "unreachable"])
def away(request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub: switched off by the user, or nothing listens there."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", request.param == "offline")


@pytest.mark.usefixtures("away")
def test_without_a_hub_the_cache_tells_the_commit(cache: Path) -> None:
    keep(cache, "main", COMMIT)
    keep(cache, "v1", "f" * 40)
    assert resolve_revision(HUB_MODEL) == COMMIT
    assert resolve_revision(replace(HUB_MODEL, revision="v1")) == "f" * 40
    assert resolve_revision(replace(HUB_MODEL, revision=COMMIT)) == COMMIT


@pytest.mark.usefixtures("away")
def test_what_nobody_knows_stays_as_it_was_said() -> None:
    assert resolve_revision(HUB_MODEL) is None
    assert resolve_revision(replace(HUB_MODEL, revision="v1")) == "v1"


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    assert resolve_revision(Model("folder", "codegen25", 2_048, path=tmp_path)) is None
