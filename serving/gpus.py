"""GPUs by their data sheets, and what a model makes of one: the roofline of a replica."""

import difflib
import math
from dataclasses import dataclass
from typing import Literal, get_args

from serving.config import RooflineConfig
from serving.errors import ConfigError, ModelError
from serving.shapes import ModelShape

Precision = Literal["bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MEMORY_SHARE = 0.9
"""Of a GPU's memory that vLLM uses: its default ``gpu_memory_utilization``."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: dense peaks in FLOP/s, bandwidth in bytes/s, memory in bytes.

    ``fp8_flops`` is None where the tensor cores have no FP8: weights in FP8 then save memory and bandwidth alone.
    """

    name: str
    bf16_flops: float
    fp8_flops: float | None
    bytes_per_second: float
    memory_bytes: float
    max_num_seqs: int = 256
    """vLLM 0.32's default (``EngineArgs.get_batch_defaults``)."""


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989e12, 1979e12, 3.35e12, 80e9, 1_024),
        Gpu("H200", 989e12, 1979e12, 4.8e12, 141e9, 1_024),
        Gpu("A100", 312e12, None, 2.039e12, 80e9),
        Gpu("L40S", 362e12, 733e12, 0.864e12, 48e9),
    )
}
"""NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "A100 Tensor Core GPU" (80GB SXM),
"L40S GPU"; tensor-core figures without sparsity, which is half of what the sheets print first."""


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, upper or lower case; raises ``ConfigError`` naming those that are known."""
    if name.upper() in GPUS:
        return GPUS[name.upper()]
    close = difflib.get_close_matches(name.upper(), GPUS, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise ConfigError(f"GPU {name} is unknown.", remedy=f"{hint}Known: {', '.join(GPUS)}.")


def find_precision(name: str) -> Precision:
    """The precision of a name; raises ``ConfigError``."""
    for precision in PRECISIONS:
        if name.lower() == precision:
            return precision
    raise ConfigError(f"precision {name} is unknown.", remedy=f"Known: {', '.join(PRECISIONS)}.")


def replica_roofline(
    gpu: Gpu,
    shape: ModelShape,
    precision: Precision,
    *,
    tensor_parallel_size: int = 1,
    max_model_len: int = 1,
    max_num_seqs: int | None = None,
) -> RooflineConfig:
    """The roofline of one replica of ``tensor_parallel_size`` GPUs, as if they worked as one (talk is free).

    ``fp8`` is FP8 weights, KV cache and compute; on a GPU without FP8 it is FP8 weights alone. The KV cache gets 90 %
    of the memory less the weights. Raises ``ModelError`` when that does not hold one sequence of ``max_model_len``.
    """
    native = precision == "fp8" and gpu.fp8_flops is not None
    weight_bytes = shape.parameters * (1 if precision == "fp8" else 2)
    kv_bytes = shape.kv_values_per_token * (1 if native else 2)
    memory = MEMORY_SHARE * gpu.memory_bytes * tensor_parallel_size
    kv_tokens = math.floor((memory - weight_bytes) / kv_bytes)
    if kv_tokens < max_model_len:
        room = max(0, kv_tokens)
        raise ModelError(
            f"{weight_bytes / 1e9:.1f} GB of weights leave room for {room:,} tokens of KV cache on "
            f"{tensor_parallel_size} {gpu.name}, a context is {max_model_len:,}.",
            remedy="Raise --tensor-parallel-size, lower --max-model-len, or take --precision fp8.",
        )
    return RooflineConfig(
        flops_per_second=(gpu.fp8_flops if native and gpu.fp8_flops else gpu.bf16_flops) * tensor_parallel_size,
        bytes_per_second=gpu.bytes_per_second * tensor_parallel_size,
        parameters=shape.parameters,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes,
        kv_cache_tokens=kv_tokens,
        max_num_seqs=max_num_seqs or gpu.max_num_seqs,
    )
