"""The model: CodeGen2.5-7B's configuration, and a tiny one for CPUs, without weights: vLLM makes them up."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.shapes import ModelShape, shape_of
from tests.checkpoints import CODEGEN25_CONFIG


@dataclass(frozen=True)
class Sizes:
    """What one run works on: the model's sizes, tokens of prompt and output, rows."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    prompt_tokens: int
    output_tokens: int
    rows: int

    def config(self) -> dict[str, Any]:
        """The ``config.json``."""
        return CODEGEN25_CONFIG | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.intermediate,
        }

    @property
    def shape(self) -> ModelShape:
        """What the model weighs."""
        return shape_of(self.config(), name="the benchmark's model")


FULL = Sizes(4_096, 32, 32, 11_008, prompt_tokens=1_000, output_tokens=64, rows=1_000)
SMALL = Sizes(64, 2, 2, 128, prompt_tokens=600, output_tokens=8, rows=24)


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A folder that holds ``config.json`` and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=1))
    return folder
