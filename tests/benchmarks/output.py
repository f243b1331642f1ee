"""Where a benchmark leaves what it found: a JSON file, a plot, a terminal or what it was redirected to."""

import argparse
import importlib
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.store import locate, publish_bytes
from tests.benchmarks.machine import machine, versions

PLOT_SUFFIXES = (".svg", ".png")
REDIRECTED_WIDTH = 150


def parser_of(name: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of ``spanfill bench NAME``."""
    return argparse.ArgumentParser(
        prog=f"spanfill bench {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    """The type of an argument that counts something; raises what argparse tells of."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def above_zero(text: str) -> float:
    """The type of an argument of seconds and rates; raises what argparse tells of."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def share(text: str) -> float:
    """The type of an argument that is a part of a whole; raises what argparse tells of."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def share_above_zero(text: str) -> float:
    """As ``share``, but not nothing."""
    if not (number := share(text)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def check_files(parser: argparse.ArgumentParser, json_file: Path | None, plot: Path | None) -> None:
    """End with the parser's error, before anything runs, where one of the files could not be written."""
    for path in filter(None, (json_file, plot)):
        if not path.parent.is_dir() or path.is_dir():
            parser.error(f"{path} cannot be written: {path.parent} must be a folder, and {path.name} a file in it")
    if not plot:
        return
    if plot.suffix not in PLOT_SUFFIXES:
        parser.error(f"--plot {plot}: its name must end in {' or '.join(PLOT_SUFFIXES)}")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        parser.error(f"--plot needs matplotlib: {error}")


def origin(name: str) -> dict[str, Any]:
    """The command of ``spanfill bench NAME`` as it was given, and what it was measured on."""
    command = f"spanfill bench {name} {shlex.join(sys.argv[1:])}"
    return {"command": command, "machine": machine(), "versions": versions()}


def publish_json(path: Path, value: Any) -> None:
    """Write the file so that readers see all of it or what was there before."""
    publish_bytes(locate(str(path)), json.dumps(value, indent=1).encode())


def console() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else REDIRECTED_WIDTH)
