"""The roofline of LLM inference: how long one engine step takes at best.

The model of Williams et al., "Roofline" (CACM 52:4, 2009), as used for decoding: linear layers are bound by compute
or by reading the weights, whichever is longer, and attention by reading the KV cache.
"""

from serving.config import RooflineConfig


def step_seconds(roofline: RooflineConfig, *, tokens: float, kv_tokens_read: float) -> float:
    """Seconds of one step that computes ``tokens`` tokens and reads ``kv_tokens_read`` tokens of KV cache."""
    compute = 2 * roofline.parameters * tokens / roofline.flops_per_second
    weights = roofline.weight_bytes / roofline.bytes_per_second
    attention = kv_tokens_read * roofline.kv_bytes_per_token / roofline.bytes_per_second
    return (max(compute, weights) + attention) / roofline.efficiency + roofline.step_overhead_seconds


def bound_rows_per_second(
    roofline: RooflineConfig, *, prompt_tokens: float, output_tokens: float, cached_share: float = 0.0
) -> float:
    """The most rows a second that one replica can do, weights amortised: 1 / (FLOPs / peak + KV bytes / bandwidth).

    Prefill gives the first of the ``output_tokens``, a stop token among them, so decoding computes one less.
    ``cached_share`` of the prompt tokens are in the prefix cache: they cost no FLOPs, but decoding reads them like all.
    The last prompt token is always computed.
    """
    decoded = max(0.0, output_tokens - 1)
    flops = 2 * roofline.parameters * (max(1.0, prompt_tokens * (1 - cached_share)) + decoded)
    kv_bytes = decoded * (prompt_tokens + output_tokens / 2) * roofline.kv_bytes_per_token
    return 1 / (flops / roofline.flops_per_second + kv_bytes / roofline.bytes_per_second)
