"""What a file or a command says of an application: its model, engines, replicas, gateways and routes."""

import importlib
from typing import Any

from pydantic import Field, JsonValue

from serving.config import EngineConfig, EngineKind, Frozen, ReplicaConfig
from serving.engine_args import check_engine_args, reads_weights
from serving.errors import ConfigError
from serving.models import Model, resolve_model


class AppConfig(Frozen):
    """What ``serve.yaml`` may say; ``model`` is a known name, a folder or a hub id.

    ``gateways`` answer HTTP (0: the replicas are for jobs alone) with the API's own routes and those that ``routes``
    name as ``module:function``, each with its settings. With ``open_until_tenants`` no key is asked for before there is
    a tenant: only for a server that listens on loopback.
    """

    model: str
    revision: str | None = None
    format: str | None = None
    engine: EngineKind = "vllm"
    dtype: str | None = None
    max_model_len: int | None = Field(None, gt=0)
    tensor_parallel_size: int = Field(1, ge=1)
    engine_args: dict[str, Any] = Field(default_factory=dict)
    replicas: ReplicaConfig = ReplicaConfig()
    gateways: int = Field(0, ge=0)
    open_until_tenants: bool = False
    routes: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)

    @property
    def resolved(self) -> Model:
        """The model; raises ``ModelError``."""
        weights = reads_weights(self.engine, self.engine_args)
        return resolve_model(self.model, format=self.format, revision=self.revision, weights=weights)

    def engine_config(self) -> EngineConfig:
        """The engine that every replica runs; raises ``ModelError`` or ``ConfigError``."""
        if self.engine == "vllm":
            check_engine_args(self.engine_args)
        return self.resolved.engine_config(
            kind=self.engine,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            tensor_parallel_size=self.tensor_parallel_size,
            engine_args=self.engine_args,
        )


def function_of(name: str) -> Any:
    """The function that ``module:function`` names; raises ``ConfigError``."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"routes: {name} is not there: {error}.", remedy="Write module:function.") from None
