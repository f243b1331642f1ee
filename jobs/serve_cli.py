"""``spanfill serve``: the replicas and the HTTP API before them, until it is told to stop."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from jobs.options import FormatName, notice, pairs_of, present, scalars_of
from serving.errors import ConfigError

EXAMPLE = "Example: spanfill serve --model demo-codegen25 --port 8000"
ROUTES = "jobs.routes:routes"
"""What the API has besides the dialects: files, batches and jobs."""


def serve(
    config: Annotated[Path | None, typer.Option(help="A YAML file of an application's arguments; flags win.")] = None,
    model: Annotated[str | None, typer.Option(help="Known name, folder or hub id (default: demo-codegen25).")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    format: FormatName = None,  # noqa: A002
    engine: Annotated[str | None, typer.Option(help="vllm, simulated (roofline clock) or instant.")] = None,
    engine_arg: Annotated[list[str] | None, typer.Option(help="A vLLM engine argument, KEY=VALUE; repeatable.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights and activations, e.g. bfloat16.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="GPUs of one replica.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engines side by side (default: 1).")] = None,
    gateways: Annotated[int | None, typer.Option(help="HTTP gateways side by side (default: 1).", min=1)] = None,
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine need a tenant.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65_535)] = 8_000,
) -> None:
    """Answer HTTP requests in OpenAI's, Mistral's, llama.cpp's and Ollama's form, while jobs use the same engines."""
    from jobs.api.config import RoutesConfig
    from jobs.server import serve_until_stopped
    from serving.app_config import AppConfig
    from serving.config import read_yaml

    console = Console(stderr=True)
    values: dict[str, Any] = read_yaml(config) if config else {}
    values |= present(
        model=model,
        revision=revision,
        format=format,
        engine=engine,
        engine_args=scalars_of(pairs_of(engine_arg, "--engine-arg")),
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=max_model_len,
        gateways=gateways,
    )
    if replicas is not None:
        values["replicas"] = {**values.get("replicas", {}), "replicas": replicas}
    is_open = _is_loopback(host)
    defaults = {"model": "demo-codegen25", "gateways": 1, "routes": {ROUTES: {}}, "open_until_tenants": is_open}
    parsed = AppConfig.parse(defaults | values, where=str(config or "options"))
    RoutesConfig.parse(parsed.routes.get(ROUTES, {}), where=f"routes {ROUTES}")
    _check(host, gateways=parsed.gateways, is_open=parsed.open_until_tenants)
    notice(parsed.model, console, engine=parsed.engine, made="completion")
    code = serve_until_stopped(
        parsed, host=host, port=port, say=lambda text: console.print(escape(text), highlight=False, soft_wrap=True)
    )
    raise typer.Exit(code)


def _check(host: str, *, gateways: int, is_open: bool) -> None:
    """Raise ``ConfigError`` for a file that says what the address forbids, or that serves nobody."""
    if is_open and not _is_loopback(host):
        raise ConfigError(
            f"open_until_tenants = true, and {host} is not only for this machine.",
            remedy="Leave it out, and make a tenant first: spanfill tenants create NAME.",
        )
    if gateways == 0:
        raise ConfigError("gateways = 0: nobody would answer HTTP.", remedy="Leave it out, or set 1.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
