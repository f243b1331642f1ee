"""What the commands have in common: options, what becomes of their texts, and what is said before and after a job."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from serving.errors import ConfigError

EXIT_ERROR_ROWS = 3

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress goes to stderr.")]
JobFiles = Annotated[
    list[Path] | None,
    typer.Option("--job", help="A YAML file of the options of run; later files win, and flags over them; repeatable."),
]
ModelName = Annotated[str, typer.Option(help="A known name (see `spanfill models`), a folder or a hub id.")]
FormatName = Annotated[str | None, typer.Option("--format", help="The infill format where the model does not tell it.")]


def pairs_of(texts: list[str] | None, option: str) -> dict[str, str] | None:
    """``KEY=VALUE`` texts as a mapping, or None; raises ``ConfigError``."""
    if not texts:
        return None
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"{option} {text!r} has no equals sign.", remedy=f"Write {option} KEY=VALUE.")
    return dict(text.split("=", 1) for text in texts)


def names_of(text: str | None) -> list[str] | None:
    """Names separated by commas, or None."""
    return None if text is None else [name for name in text.split(",") if name]


def scalars_of(texts: dict[str, str] | None) -> dict[str, Any] | None:
    """Engine arguments as YAML scalars, so that ``enforce_eager=true`` is a boolean; raises ``ConfigError``."""
    import yaml

    values = {}
    for key, text in (texts or {}).items():
        try:
            values[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"--engine-arg {key}={text} is not YAML.", remedy="Put text in quotes.") from None
    return values or None


def merged(files: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of YAML files and of flags; what comes later wins, in a mapping key by key."""
    from serving.config import read_yaml

    found: dict[str, Any] = {}
    for values in [*map(read_yaml, files), given]:
        for name, value in values.items():
            before = found.get(name)
            found[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return found


def present(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in values.items() if value is not None}


def notice(model: str, console: Console, *, engine: str, made: str = "infill") -> None:
    """Print what a user must know before a model is used: research only, a large download, a simulated engine."""
    from serving.models import KNOWN_MODELS, download_notice, resolve_model

    if engine != "vllm":
        console.print(f"[bold yellow]{engine} engine:[/] no model is run, every {made} is noise.", highlight=False)
        return
    if model in KNOWN_MODELS:
        known = KNOWN_MODELS[model]
        for text in (known.notice, download_notice(resolve_model(model))):
            if text:
                console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)


def tell_errors(manifest: dict[str, Any], output: str, console: Console) -> None:
    """Say where a finished job's error rows are, if it has any."""
    if manifest["errors"]:
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(manifest["error_codes"].items()))
        console.print(f"error rows are in {output}/errors ({codes})", highlight=False)
