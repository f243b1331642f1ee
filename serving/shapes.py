"""What a model weighs: parameters and KV cache per token, from its configuration alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import ModelError

PLAIN_MLP = ("starcoder2", "gpt_bigcode", "codegen", "gpt2", "gpt_neox")
"""Model types whose MLP has two matrices; all others have three (gate, up, down)."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: ``parameters`` counts all weights, embeddings included; the KV cache is counted in values.

    ``heads`` are those of attention, which tensor parallelism deals out evenly.
    """

    parameters: int
    kv_values_per_token: int
    heads: int


def shape_of(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """The shape of a dense decoder from its ``config.json``; norms and biases, under 0.1 %, are left out.

    Raises ``ModelError`` for a mixture of experts, whose computed parameters its configuration does not give plainly,
    and for a configuration that lacks a size.
    """
    if any(config.get(key) for key in EXPERTS):
        raise ModelError(f"{name} is a mixture of experts; only dense models are planned.", remedy="Name a dense one.")
    hidden = _size(config, name, "hidden_size", "n_embd")
    layers = _size(config, name, "num_hidden_layers", "n_layer")
    heads = _size(config, name, "num_attention_heads", "n_head")
    vocabulary = _size(config, name, "vocab_size")
    key_heads = 1 if config.get("multi_query") else int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    inner = int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)
    attention = 2 * hidden * head * (heads + key_heads)
    mlp = (2 if config.get("model_type") in PLAIN_MLP else 3) * hidden * inner
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return ModelShape(layers * (attention + mlp) + embeddings, 2 * layers * key_heads * head, heads)


def read_shape(config: Path, *, name: str) -> ModelShape:
    """The shape that a ``config.json`` tells; raises ``ModelError``."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config} cannot be read: {error}.", remedy="Write it again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{config} holds no configuration.", remedy="Write it again.")
    return shape_of(values, name=name)


def _size(config: Mapping[str, Any], name: str, *keys: str) -> int:
    for key in keys:
        if isinstance(config.get(key), int) and config[key] > 0:
            return int(config[key])
    raise ModelError(f"{name}: its configuration has no {keys[0]}.", remedy="Complete its config.json.")
