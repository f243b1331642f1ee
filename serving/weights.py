"""What tells one model's weights from another's without reading gigabytes."""

import hashlib
from pathlib import Path
from typing import Any

from serving.errors import ModelError
from serving.models import Model

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
CODE_AND_TOKENIZERS = (".py", ".model", ".tiktoken", ".bpe")
CONFIGURATION = {
    *("config.json", "params.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
}
"""Files that tell how weights are read and text is tokenised; notes on a training, say, change no infill."""

SAMPLES = 64
SAMPLE_BYTES = 4_096
MOST_HEADER_BYTES = 16 << 20
"""Several times the header of the largest models; one that says it is longer is damaged."""

HUB_SECONDS = 10.0


def weights_identity(model: Model, revision: str | None) -> dict[str, Any]:
    """The identity of a model's weights, equal wherever the same files lie.

    For a hub id: the id and its commit. For a folder: the sha256 of each configuration, tokenizer and code file (the
    generation configuration is ignored), and of each weights file its size and a sha256 of its header and of 64
    evenly spread blocks of 4 KiB, so that two fine-tunes of one architecture differ although their headers are alike.
    Raises ``ModelError`` for a file that cannot be read.
    """
    if model.path is None:
        return {"hub": model.hub_id, "revision": revision}
    try:
        found = (path for path in model.path.iterdir() if path.is_file())
        files = sorted(p for p in found if p.suffix in WEIGHTS + CODE_AND_TOKENIZERS or p.name in CONFIGURATION)
        return {path.name: _weights(path) if path.suffix in WEIGHTS else _sha256(path.read_bytes()) for path in files}
    except OSError as error:
        raise ModelError(f"{error.filename}: {error.strerror}.", remedy="Grant read access to it.") from error


def resolve_revision(model: Model) -> str | None:
    """The commit that a hub model's revision stands for now, so that every replica and every resume loads the same.

    Asks the hub; offline, the local cache. None for a folder, and the revision as it is when nobody knows.
    """
    if model.path is not None or model.hub_id is None:
        return None
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        return HfApi().model_info(model.hub_id, revision=model.revision, timeout=HUB_SECONDS).sha or model.revision
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError):
        found = try_to_load_from_cache(model.hub_id, "config.json", revision=model.revision)
        return Path(found).parent.name if isinstance(found, str) else model.revision


def _weights(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), MOST_HEADER_BYTES)))
        step = max(SAMPLE_BYTES, size // SAMPLES)
        # The last block holds what a .bin, which is a zip archive, says of its members, checksums included.
        for at in (*range(0, size, step), max(0, size - (1 << 16))):
            file.seek(at)
            digest.update(file.read(SAMPLE_BYTES if at < size - (1 << 16) else 1 << 16))
    return {"size": size, "sha256": digest.hexdigest()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
