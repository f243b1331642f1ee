"""What an operator may say of files, batches and jobs; the defaults suit one machine."""

import re
from typing import Any, Self

from pydantic import Field, model_validator

from serving.api.gateway import GatewayConfig
from serving.app_config import AppConfig
from serving.config import Frozen

DAY = 86_400.0
LEAST_TURN = 10.0
"""A shorter turn would be over before its process has begun to answer."""

LOCAL_SCHEMES = ("file", "local", "memory", "http", "https", "ftp")
"""Addresses that lead to the server's own disk or network, whatever an operator wrote."""

PREFIX = re.compile(r"([a-z][a-z0-9+.-]*)://[^?#\s]+/")
ENGINE_FIELDS = (
    *("model", "revision", "format", "engine", "engine_args"),
    *("dtype", "max_model_len", "tensor_parallel_size"),
)
"""What an application's configuration and a job's spec both call by the same name."""


class RoutesConfig(Frozen):
    """Limits and places; bytes and seconds.

    ``app`` is the configuration of the application whose replicas do the work: a job joins it by its engine. ``folder``
    holds what tenants store, by default ``files`` in spanfill's home; gateways on several nodes, and the nodes that run
    jobs, must share it. ``at_once`` batches and jobs run at the same time on one node, one of several for a tenant of
    whom nothing runs; 0: this gateway only takes them. One that has run for ``turn_seconds`` makes way when a tenant of
    whom nothing runs waits, and goes on later where it was. ``input_prefixes`` are URIs that end with a slash, below
    which every tenant may read: by default none.
    """

    app: AppConfig | None = None
    folder: str | None = None
    at_once: int = Field(3, ge=0, le=64)
    turn_seconds: float = Field(600.0, ge=LEAST_TURN)
    upload_bytes: int = Field(512 << 20, ge=1)
    batch_bytes: int = Field(200 << 20, ge=1)
    batch_lines: int = Field(50_000, ge=1)
    tenant_bytes: int = Field(20 << 30, ge=1)
    tenant_files: int = Field(10_000, ge=1)
    unfinished: int = Field(64, ge=1)
    kept_seconds: float = Field(30 * DAY, gt=0)
    window_seconds: float = Field(DAY, gt=0)
    input_prefixes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _prefixes_are_safe(self) -> Self:
        for prefix in self.input_prefixes:
            found = PREFIX.fullmatch(prefix)
            if found is None or found[1] in LOCAL_SCHEMES or "::" in prefix or ".." in prefix:
                raise ValueError(f"input_prefixes: {prefix!r} is no address of an object store that ends with a slash")
        return self

    def engine_of(self, gateway: GatewayConfig) -> dict[str, Any]:
        """The fields of a job's spec that name the engine of the gateway's application."""
        if self.app is None:
            return {"model": gateway.tokenizer, "format": gateway.format}
        return self.app.model_dump(mode="json", include=set(ENGINE_FIELDS), exclude_none=True)


DEFAULT = RoutesConfig()
