"""``spanfill bench``: what is measured here, and the benchmarks that a clone has besides."""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.options import Json

bench = typer.Typer(help="Measure spanfill on this machine.", no_args_is_help=True)


@bench.command(name="feed", epilog="Example: spanfill bench feed --rows 50000 --json")
def bench_feed(
    rows: Annotated[int, typer.Option(help="Rows; 60,000 at most are prepared while engines start.", min=1)] = 200_000,
    row_bytes: Annotated[int, typer.Option(help="Bytes of prefix and suffix together.", min=16, max=1 << 20)] = 2_048,
    replicas: Annotated[int, typer.Option(help="Instant engines.", min=1)] = 1,
    feeders: Annotated[int, typer.Option(help="Processes that read and write, as for run.", min=1)] = 2,
    files: Annotated[
        Path | None,
        typer.Option(help="Cut rows from the Python files below this folder [default: standard library, repeatedly]."),
    ] = None,
    json_: Json = False,
) -> None:
    """Rows a second of everything but the model: Parquet, tokenizer, order, Ray Serve, Parquet (instant engine)."""
    from jobs.bench import feed

    with redirect_stdout(sys.stderr):
        result = feed(rows=rows, row_bytes=row_bytes, replicas=replicas, feeders=feeders, files=files)
    if json_:
        print(json.dumps(result))
    else:
        Console().print(
            f"{result['rows_per_second']:,.0f} rows/s over {rows:,} rows of {row_bytes} bytes (instant engine), "
            f"{result['steady_rows_per_second']:,.0f} without those prepared while it started"
        )
        told = ", ".join(f"{work} {seconds:.3f}" for work, seconds in result["cpu_seconds_per_1000_rows"].items())
        Console().print(f"CPU seconds of 1,000 rows: {told}")


def _clone_benchmark(name: str, about: str, example: str) -> None:
    """Add a benchmark that is part of a clone, not of the package; its own ``--help`` tells its options."""

    def passed_on(context: typer.Context) -> None:
        from jobs.bench import from_clone

        command, environment = from_clone(f"tests.benchmarks.{name}", context.args)
        os.execve(command[0], command, environment)  # In this process' place: signals end the benchmark itself.

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    bench.command(name=name, help=about, context_settings=settings, epilog=f"Example: {example}")(passed_on)


_clone_benchmark(
    "peers",
    "spanfill beside bare vLLM, Ray Data LLM, run-batch and transformers; from a clone only, --help tells more.",
    "spanfill bench peers --input spans100 --json spans100.json --plot spans100.svg",
)
_clone_benchmark(
    "align",
    "What --prefix-align is worth: sharing, speed and quality of the demo model; from a clone only.",
    "spanfill bench align --json align.json --plot align.svg",
)
_clone_benchmark(
    "fleet",
    "Whether this machine keeps many simulated H100s full; from a clone only.",
    "spanfill bench fleet --replicas 4 16 --study 64",
)
_clone_benchmark(
    "locality",
    "What order, part size, replicas and KV cache do to prefix sharing, on simulated engines; from a clone only.",
    "spanfill bench locality --json locality.json",
)
_clone_benchmark(
    "loads",
    "How long people wait beside a job on the same engines, and what the job keeps of its speed; from a clone only.",
    "spanfill bench loads --engine simulated --rate 2 --seconds 120 --json loads.json",
)
_clone_benchmark(
    "two_loads",
    "The same on the clock of one simulated H100, without processes and HTTP; from a clone only.",
    "spanfill bench two_loads --rates 1 2 4 --seeds 3",
)
_clone_benchmark(
    "gateway",
    "What HTTP costs beside a call of a replica's handle, and 200 streams at once; from a clone only.",
    "spanfill bench gateway --streams 200 --seconds 60 --json gateway.json",
)
_clone_benchmark(
    "gpu",
    "CodeGen2.5-7B's full size with random weights on one GPU, beside bare vLLM and the roofline; from a clone only.",
    "spanfill bench gpu --json gpu.json",
)
