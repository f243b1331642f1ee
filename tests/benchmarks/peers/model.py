"""The contestants' model: a random Llama of 51 M parameters in CodeGen2.5's vocabulary, made once a machine."""

import os
import tempfile
from pathlib import Path

from tests.checkpoints import llama_checkpoint

SIZES = {"hidden": 384, "layers": 8, "heads": 6, "intermediate": 768}


def cached_model() -> Path:
    """The checkpoint's folder, made when it is not there yet."""
    name = "-".join(map(str, SIZES.values()))
    folder = Path(tempfile.gettempdir(), f"spanfill-peers-{os.getuid()}", f"llama-{name}")
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            llama_checkpoint(Path(made, "model"), shard_size=1 << 30, **SIZES)  # type: ignore[arg-type]
            Path(made, "model").rename(folder)
    return folder
