"""What every contestant is given alike: model, limits, dtype, cores, KV cache, engine arguments."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from serving.config import EngineConfig
from serving.cores import available_cores
from serving.engine_args import CPU_BLOCK_SIZE, vllm_arguments
from serving.truncation import DEFAULT_PREFIX_ALIGN

SPANFILL_ONLY = ("scheduling_policy", "distributed_executor_backend", "enable_log_requests")
"""What spanfill's engine is given for its own ends; a peer keeps vLLM's defaults."""


@dataclass(frozen=True)
class Setting:
    """One table's settings; ``rows`` and ``model`` are paths, ``block_size`` is that of the KV cache.

    The KV cache is vLLM's own choice where ``kv_cache_gib`` is None. ``engine_args`` are more of vLLM's arguments.
    """

    rows: str
    model: str
    context: int = 1_100
    max_tokens: int = 16
    dtype: str = "bfloat16"
    kv_cache_gib: int | None = 1
    block_size: int = CPU_BLOCK_SIZE
    transformers_rows: int = 20
    align: int = DEFAULT_PREFIX_ALIGN
    """``prefix_align`` of the contestants that align."""

    keep_outputs: bool = False
    device: Literal["cpu", "gpu"] = "cpu"
    engine_args: dict[str, Any] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """This process's environment with the KV cache and the cores of every contestant."""
        cache = {} if self.kv_cache_gib is None else {"VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib)}
        return os.environ | {
            **cache,
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, available_cores())),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    @property
    def job_engine_args(self) -> dict[str, Any]:
        """The engine arguments of spanfill's job, the KV cache among them."""
        blocks = {"block_size": self.block_size} if self.device == "cpu" else {}
        cache = {} if self.kv_cache_gib is None else {"kv_cache_memory_bytes": self.kv_cache_gib << 30}
        return cache | blocks | self.engine_args

    def engine_arguments(self) -> dict[str, Any]:
        """What spanfill's engine is given, less what only spanfill needs, as vLLM's engine arguments."""
        config = EngineConfig(
            model=self.model, dtype=self.dtype, max_model_len=self.context, engine_args=self.job_engine_args
        )
        arguments = vllm_arguments(config, on_cpu=self.device == "cpu")
        return {k: v for k, v in arguments.items() if k not in SPANFILL_ONLY and v is not None} | {"seed": 0}

    def dump(self, path: Path) -> None:
        """Write the setting as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Setting":
        """Read what ``dump`` wrote."""
        return cls(**json.loads(path.read_text()))
