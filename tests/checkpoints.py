"""Small random Llama checkpoints in CodeGen2.5's configuration and vocabulary, in the two forms that are published."""

import json
from pathlib import Path
from typing import Literal

CODEGEN25_CONFIG = {
    "vocab_size": 51_200,
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""What the published ``config.json`` says beside the sizes."""


def llama_checkpoint(
    folder: Path,
    *,
    form: Literal["safetensors", "bin"] = "safetensors",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    intermediate: int | None = None,
    seed: int = 0,
    shard_size: int = 8 << 20,
) -> Path:
    """Write config and float32 weights, sharded; no tokenizer files, as none that load are published.

    ``intermediate`` is the width of the feed-forward layers, twice ``hidden`` when None.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate or hidden * 2,
        initializer_range=0.2,
        **CODEGEN25_CONFIG,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        model.save_pretrained(folder, max_shard_size=shard_size)
        return folder
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    tensors = dict(model.state_dict())
    names = sorted(tensors)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save({name: tensors[name].clone() for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder
