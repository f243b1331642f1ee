"""vLLM's engine arguments: which there are, which a job may set, what spanfill gives. Nothing here imports vllm."""

import ast
import difflib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from serving.config import EngineConfig
from serving.errors import ConfigError
from serving.yielding import BESIDE

OWN_ARGUMENTS = {
    "model": "--model",
    "revision": "--revision",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "tokenizer": "--format",
    "scheduler_cls": "nothing: batch rows make way for people",
    "skip_tokenizer_init": "nothing: token ids cross the engine, never text",
    "scheduling_policy": "nothing: interactive requests come before batch rows",
}
"""Engine arguments that spanfill sets itself, with what sets them."""

SPEED_ARGUMENTS = frozenset(
    [
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "long_prefill_token_threshold",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "pipeline_parallel_size",
        "stream_interval",
        "use_tqdm_on_load",
    ]
)
"""Engine arguments of speed and memory: a job may go on with others. All others can change what is computed."""

CPU_BLOCK_SIZE = 64
CPU_DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2 << 30,
    "max_num_seqs": 64,
    "block_size": CPU_BLOCK_SIZE,
}
"""Without compilation an engine starts in a third of the time; without a size vLLM would take most of the memory; its
blocks of 128 tokens share less and were slower, as those of 32 were."""

CPU_BATCHED_TOKENS = 4_096


PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}
"""What an annotation of vLLM's takes, where that can be told without vLLM."""


@cache
def engine_arguments() -> dict[str, list[str]]:
    """vLLM's engine arguments by name, with the members of their annotations (``int | None``: both).

    They are read from its source: importing it would take seconds and 700 MB.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py").read_text(encoding="utf-8")
    classes = [
        n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name in ("EngineArgs", "AsyncEngineArgs")
    ]
    fields = (f for c in classes for f in c.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name))
    return {f.target.id: _members(f.annotation) for f in fields if isinstance(f.target, ast.Name)}


def _members(annotation: ast.expr) -> list[str]:
    if isinstance(annotation, ast.BinOp):
        return _members(annotation.left) + _members(annotation.right)
    return [ast.unparse(annotation)]


def check_engine_args(arguments: Mapping[str, Any]) -> None:
    """Refuse engine arguments that vLLM does not know or that spanfill sets itself, and values of the wrong type.

    Raises ``ConfigError``.
    """
    known = engine_arguments()
    for name, value in arguments.items():
        if name in OWN_ARGUMENTS:
            raise ConfigError(
                f"engine argument {name} cannot be set here.", remedy=f"It is set by {OWN_ARGUMENTS[name]}."
            )
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else "See vLLM's engine arguments."
            raise ConfigError(f"engine argument {name} is unknown to vLLM {installed_version('vllm')}.", remedy=hint)
        kinds = known.get(name, [])
        if not _fits(value, kinds):
            wanted = " or ".join(kinds)
            raise ConfigError(
                f"engine argument {name} = {value!r} is {type(value).__name__}, not {wanted}.",
                remedy="Write numbers plainly, true or false for bool, null for None.",
            )


def _fits(value: Any, kinds: Sequence[str]) -> bool:
    """Whether a value is of one of the types; True where one of them is not plain, since only vLLM can tell then."""
    if not kinds or any(kind not in PLAIN_TYPES for kind in kinds):
        return True
    return any(type(value) in PLAIN_TYPES[kind] for kind in kinds)


def installed_version(package: str) -> str:
    """The version of an installed package, of its CPU build too, or an empty string."""
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def is_gpu_build() -> bool:
    """Whether the installed vLLM is the one for GPUs; its CPU build is a package of another name."""
    return any(True for _ in importlib.metadata.Distribution.discover(name="vllm"))


def reads_weights(kind: str, arguments: Mapping[str, Any]) -> bool:
    """Whether such an engine needs a model's weights: not one that makes them up or has none."""
    return kind == "vllm" and arguments.get("load_format") != "dummy"


def vllm_arguments(config: EngineConfig, *, on_cpu: bool) -> dict[str, Any]:
    """The arguments with which an engine of this configuration is made."""
    # vLLM 0.32's CPU build dies when the prompt of a seeded, sampled request is prefilled in chunks: its model runner
    # then takes a token back from a torch.Generator, which on a CPU has no offset.
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, config.max_model_len)}
    return {
        **(CPU_DEFAULTS | whole if on_cpu else {}),
        "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else None,
        "enable_prefix_caching": True,
        "enable_log_requests": False,
        "generation_config": "vllm",
        **config.engine_args,
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel_size,
        "skip_tokenizer_init": True,
        "scheduling_policy": "priority",
    }


def yield_to_people(vllm_config: Any, beside: int) -> None:
    """Let vLLM schedule with ``serving.scheduler``; after vLLM has decided whether it schedules a step ahead."""
    scheduling = vllm_config.scheduler_config
    scheduling.scheduler_cls = f"serving.scheduler.{'Async' if scheduling.async_scheduling else ''}YieldingScheduler"
    vllm_config.additional_config = {**vllm_config.additional_config, BESIDE: beside}
