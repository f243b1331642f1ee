"""``spanfill score``: options in, ``run_job`` with the task score, exit codes out."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.options import (
    EXIT_ERROR_ROWS,
    FormatName,
    JobFiles,
    Json,
    merged,
    names_of,
    notice,
    pairs_of,
    present,
    scalars_of,
    tell_errors,
)

EXAMPLE = "Example: spanfill score --input corpus.parquet --output scores --model demo-codegen25"


def score(
    job: JobFiles = None,
    input: Annotated[str | None, typer.Option(help="Parquet file, folder, glob or URI.")] = None,  # noqa: A002
    output: Annotated[str | None, typer.Option(help="Folder or URI for the results.")] = None,
    model: Annotated[str | None, typer.Option(help="Known name, folder or hub id (default: demo-codegen25).")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    format: FormatName = None,  # noqa: A002
    engine: Annotated[str | None, typer.Option(help="vllm, simulated (roofline clock) or instant.")] = None,
    engine_arg: Annotated[list[str] | None, typer.Option(help="A vLLM engine argument, KEY=VALUE; repeatable.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights and activations, e.g. bfloat16.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="GPUs of one replica.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engines side by side (default: 1).")] = None,
    cores: Annotated[int | None, typer.Option(help="CPU cores of each replica (default: an equal share).")] = None,
    score_end: Annotated[
        bool | None, typer.Option("--score-end", help="Score the model's end of infill behind each middle too.")
    ] = None,
    prefix_align: Annotated[
        int | None, typer.Option(help="Start a cut prefix at a multiple of this many tokens.")
    ] = None,
    suffix_share: Annotated[float | None, typer.Option(help="Share of the context for the suffix.")] = None,
    order: Annotated[str | None, typer.Option(help="prefix (within a part) or input (default: prefix).")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="ROLE=NAME for prefix, suffix, middle, text or id; repeatable.")
    ] = None,
    with_: Annotated[str | None, typer.Option("--with", help="truncated,source_file,source_row")] = None,
    keep_columns: Annotated[str | None, typer.Option(help="Input columns to keep, by comma (default: all).")] = None,
    rows_per_part: Annotated[int | None, typer.Option(help="Input rows of one output file (default: 10000).")] = None,
    compression: Annotated[str | None, typer.Option(help="zstd, snappy, gzip, lz4 or none.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows.")] = None,
    batch_rows: Annotated[int | None, typer.Option(help="Rows of a micro-batch (default: 64).")] = None,
    max_attempts: Annotated[int | None, typer.Option(help="Tries of a row that kills its engine (default: 3).")] = None,
    max_error_rate: Annotated[
        float | None, typer.Option(help="Stop beyond this share of error rows (default: 0.05).")
    ] = None,
    feeders: Annotated[int | None, typer.Option(help="Processes that read and write (default: 1).")] = None,
    store_patience: Annotated[
        float | None, typer.Option(help="Seconds for which a failing store is tried again (default: 60).")
    ] = None,
    retry_errors: Annotated[
        bool | None, typer.Option("--retry-errors", help="Do a job's error rows again, into new parts.")
    ] = None,
    resume: Annotated[bool | None, typer.Option("--resume/--no-resume", help="Go on with a begun job.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Delete a begun job and start anew.")] = None,
    json_: Json = False,
) -> None:
    """Likelihood of each row's middle between its prefix and suffix, or of its plain text, by a model.

    The same command resumes an interrupted job.
    """
    from jobs.measured import StartUp
    from jobs.progress import Display
    from jobs.runner import run_job
    from jobs.spec import parse_spec

    given = present(
        input=input, output=output, model=model, revision=revision, format=format, engine=engine,
        engine_args=scalars_of(pairs_of(engine_arg, "--engine-arg")), dtype=dtype,
        tensor_parallel_size=tensor_parallel_size, max_model_len=max_model_len, replicas=replicas, cores=cores,
        score_end=score_end, prefix_align=prefix_align, suffix_share=suffix_share, order=order,
        columns=pairs_of(column, "--column"), extra_columns=names_of(with_), keep_columns=names_of(keep_columns),
        rows_per_part=rows_per_part, compression=compression, limit=limit, batch_rows=batch_rows,
        max_attempts=max_attempts, max_error_rate=max_error_rate, feeders=feeders, store_patience=store_patience,
        retry_errors=retry_errors, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    spec = parse_spec(merged(job or [], given | {"task": "score"}))
    # Ray prints some of its messages to stdout, which belongs to the manifest.
    with redirect_stdout(sys.stderr), Display() as display:
        notice(spec.model, display.console, engine=spec.engine, made="figure")
        manifest = run_job(spec, watcher=display, startup=StartUp.of_command())
    if json_:
        print(json.dumps(manifest))
    else:
        _summary(manifest, spec.output)
    if manifest["errors"]:
        raise typer.Exit(EXIT_ERROR_ROWS)


def _summary(manifest: dict[str, Any], output: str) -> None:
    """Say on stderr what a finished job did."""
    console = Console(stderr=True)
    bits = manifest["bits_per_byte"]
    told = "" if bits is None else f", {bits:.4f} bits per byte over all"
    console.print(
        f"{manifest['rows']:,} rows, {manifest['errors']:,} errors in {manifest['seconds']:,.1f} s: "
        f"{manifest['rows_per_second']:,.1f} rows/s, {manifest['scored_tokens_per_second']:,.0f} scored tokens/s"
        f"{told} ({manifest['engine']} engine)",
        highlight=False,
    )
    if manifest["truncated"]:
        console.print(
            f"{manifest['truncated']:,} prompts were cut to fit the context; --with truncated tells which",
            highlight=False,
        )
    tell_errors(manifest, output, console)
    console.print(f"likelihoods are in {output}/data; look at some with: spanfill show {output}", highlight=False)
