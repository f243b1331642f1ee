"""``spanfill tune``: options in, ``jobs.tune`` and its report, nothing else."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.options import FormatName, JobFiles, Json, merged, notice, pairs_of, present, scalars_of

EXAMPLE = "Example: spanfill tune --input pairs.parquet --model demo-codegen25 --output engine.yaml"


def tune(
    input: Annotated[str | None, typer.Option(help="Parquet file, folder, glob or URI.")] = None,  # noqa: A002
    output: Annotated[
        Path, typer.Option(help="The YAML file to write, for `run --job`.", dir_okay=False, writable=True)
    ] = Path("engine.yaml"),
    job: JobFiles = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the sample (default: 256 an engine; with vLLM's build for GPUs 2,048).", min=2),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Begin no trial after so long; the baseline runs first, three times.", min=0)
    ] = 15.0,
    model: Annotated[str | None, typer.Option(help="Known name, folder or hub id (default: demo-codegen25).")] = None,
    format: FormatName = None,  # noqa: A002
    engine_arg: Annotated[list[str] | None, typer.Option(help="Part of the baseline, KEY=VALUE; repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Output tokens at most (default: 128).")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engines side by side (default: 1).")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME; repeatable.")] = None,
    json_: Json = False,
) -> None:
    """Try engine settings on a sample of your rows, one engine start each, and write the best to a file."""
    from jobs.progress import Display
    from jobs.search import Tuning
    from jobs.spec import parse_spec
    from jobs.tune import check_output, table, told, write_report
    from jobs.tune import tune as find

    given = present(
        output=".", input=input, model=model, format=format, max_tokens=max_tokens, replicas=replicas,
        engine_args=scalars_of(pairs_of(engine_arg, "--engine-arg")), columns=pairs_of(column, "--column"),
    )  # fmt: skip
    spec = parse_spec(merged(job or [], given))
    check_output(output)
    with redirect_stdout(sys.stderr), Display() as display:
        notice(spec.model, display.console, engine=spec.engine)

        def tell(so_far: Tuning) -> None:
            write_report(output, so_far, source=spec.input)
            display.say(f"{so_far.trials[-1].setting}: {told(so_far.trials[-1], so_far)}")

        found = find(spec, rows=rows, minutes=minutes, watcher=display, tell=tell)
        write_report(output, found, source=spec.input)
    if json_:
        print(json.dumps(found.as_dict()))
    else:
        Console().print(table(found))
        Console(stderr=True).print(f"use it with: spanfill run --job {output} ...", highlight=False)
