"""Frozen configuration of an engine and of the replicas that run it; unknown keys are refused by name."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from serving.errors import ConfigError

EngineKind = Literal["vllm", "simulated", "instant"]


class Frozen(BaseModel):
    """A frozen pydantic model that refuses unknown keys and reports errors as ``ConfigError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "options") -> Self:
        """Validate ``values``; raises ``ConfigError`` naming every wrong key with its value."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            is_unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors())
            remedy = f"Known keys: {', '.join(cls.model_fields)}." if is_unknown else "Give what is allowed."
            raise ConfigError(f"{where}: {_problems(error)}.", remedy=remedy) from None


def _problems(error: ValidationError) -> str:
    """Each with its key and value; what is wrong with several keys together names them itself."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}"
        if e["loc"]
        else e["msg"].removeprefix("Value error, ")
        for e in error.errors(include_url=False)
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; raises ``ConfigError`` naming the file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {error}.", remedy="Mend the file.") from None
    if not isinstance(values, dict):
        held = "holds no options" if values is None else f"holds {type(values).__name__}, not a mapping of options"
        raise ConfigError(f"{path} {held}.", remedy="Write KEY: VALUE lines.")
    return values


class RooflineConfig(Frozen):
    """The hardware and model that ``serving.simulated`` imitates; defaults: CodeGen2.5-7B bf16 on an H100 SXM.

    Peaks are NVIDIA's data-sheet figures (dense bf16); ``efficiency`` is the share of the bound that is reached, and
    ``time_scale`` makes the clock run that many times faster than real time. ``crash_on``, ``hang_on`` and ``kill_on``
    are token ids in a row: a prompt that holds them makes the engine die, stand still, or lose its process.
    """

    flops_per_second: float = Field(989e12, gt=0)
    bytes_per_second: float = Field(3.35e12, gt=0)
    parameters: float = Field(6.9e9, gt=0)
    weight_bytes: float = Field(13.8e9, gt=0)
    kv_bytes_per_token: float = Field(524_288, gt=0)
    kv_cache_tokens: int = Field(117_000, gt=0)
    max_num_seqs: int = Field(256, gt=0)
    max_num_batched_tokens: int = Field(8_192, gt=0)
    block_size: int = Field(16, gt=0)
    step_overhead_seconds: float = Field(0.0005, ge=0)
    efficiency: float = Field(1.0, gt=0, le=1)
    time_scale: float = Field(1.0, gt=0)
    crash_on: tuple[int, ...] = ()
    hang_on: tuple[int, ...] = ()
    kill_on: tuple[int, ...] = ()


class EngineConfig(Frozen):
    """One engine: what it runs and how. Two engines with equal configurations answer alike."""

    kind: EngineKind = "vllm"
    model: str
    revision: str | None = None
    dtype: str = "auto"
    max_model_len: int = Field(gt=0)
    tensor_parallel_size: int = Field(1, ge=1)
    engine_args: dict[str, JsonValue] = Field(default_factory=dict)
    roofline: RooflineConfig = RooflineConfig()

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that are equal for equal configurations."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class ReplicaConfig(Frozen):
    """How many engines run and what each gets: ``cores`` of a CPU (0: decided where it starts), or GPUs.

    ``rows_beside`` batch rows go on in an engine while it serves people; None: it serves jobs alone.
    """

    replicas: int = Field(1, ge=1)
    cores: int = Field(0, ge=0)
    use_gpu: bool = False
    max_ongoing_requests: int = Field(1024, ge=1)
    drain_seconds: float = Field(30.0, ge=0)
    rows_beside: int | None = Field(None, ge=0)
