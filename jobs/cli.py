"""The ``spanfill`` command: options in, library calls, exit codes out. Thin."""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from jobs import bench_cli, score_cli, serve_cli, tenants_cli, tune_cli
from jobs.options import (
    EXIT_ERROR_ROWS,
    FormatName,
    JobFiles,
    Json,
    ModelName,
    merged,
    names_of,
    notice,
    pairs_of,
    present,
    scalars_of,
    tell_errors,
)
from serving.errors import SpanfillError

if TYPE_CHECKING:
    from jobs.spec import JobSpec

app = typer.Typer(
    help="High-throughput batch code infilling on vLLM: Parquet of prefix/suffix pairs in, Parquet of infills out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench_cli.bench, name="bench")
app.add_typer(tenants_cli.tenants, name="tenants")
app.add_typer(tenants_cli.keys, name="keys")

EXIT_DAMAGED = 1
EXIT_INTERRUPTED = 130
DEMO_INFILLS = 5
EXACTLY: dict[str, Any] = {"soft_wrap": True, "end": ""}
"""How a console prints what ``jobs.visible.styled`` made: nothing wrapped, no tab expanded."""


def main() -> None:
    """Entry point: errors become one sentence and an exit code here, and nowhere else."""
    try:
        app(standalone_mode=True)
    except SpanfillError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@app.command(epilog="Example: spanfill run --input pairs.parquet --output out --model demo-codegen25 --max-tokens 64")
def run(
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
    max_tokens: Annotated[int | None, typer.Option(help="Output tokens at most (default: 128).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: 0).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling (default: 1).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many likeliest tokens (default: all).")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least share of the likeliest token's probability.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Against tokens that came, -2 to 2.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Against tokens by how often they came.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Against tokens of prompt and infill, 1 is none.")
    ] = None,
    n: Annotated[int | None, typer.Option(help="Samples a row (default: 1).")] = None,
    seed: Annotated[int | None, typer.Option(help="The job's seed (default: 0).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the infill at this text; repeatable.")] = None,
    stop_at_suffix: Annotated[
        bool | None, typer.Option("--stop-at-suffix", help="End the infill where it has run into the suffix.")
    ] = None,
    trim: Annotated[
        list[str] | None, typer.Option(help="suffix-overlap, suffix-echo, next-line, repeated-lines; repeatable.")
    ] = None,
    prefix_align: Annotated[
        int | None, typer.Option(help="Start a cut prefix at a multiple of this many tokens.")
    ] = None,
    suffix_share: Annotated[float | None, typer.Option(help="Share of the context for the suffix.")] = None,
    order: Annotated[
        str | None, typer.Option(help="prefix (within a part), global (all rows, by a sorted copy) or input.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME for prefix, suffix or id; repeatable.")] = None,
    with_: Annotated[str | None, typer.Option("--with", help="mean_logprob,token_ids,source_file,source_row")] = None,
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
    """Infill every row of a Parquet input; the same command resumes an interrupted job."""
    from jobs.measured import StartUp
    from jobs.progress import Display
    from jobs.runner import run_job
    from jobs.spec import parse_spec

    given = {
        key: value
        for key, value in locals().items()
        if value is not None and key not in ("job", "engine_arg", "column", "with_", "keep_columns", "json_", "Display")
        and not callable(value)
    }  # fmt: skip
    given |= present(
        engine_args=scalars_of(pairs_of(engine_arg, "--engine-arg")),
        columns=pairs_of(column, "--column"),
        extra_columns=names_of(with_),
        keep_columns=names_of(keep_columns),
    )
    spec = parse_spec(merged(job or [], given))
    # Ray prints some of its messages to stdout, which belongs to the manifest.
    with redirect_stdout(sys.stderr), Display() as display:
        notice(spec.model, display.console, engine=spec.engine)
        manifest = run_job(spec, watcher=display, startup=StartUp.of_command())
    if json_:
        print(json.dumps(manifest))
    else:
        summary(manifest, spec)
    if manifest["errors"]:
        raise typer.Exit(EXIT_ERROR_ROWS)


app.command(epilog=score_cli.EXAMPLE)(score_cli.score)
app.command(epilog=serve_cli.EXAMPLE)(serve_cli.serve)
app.command(epilog=tune_cli.EXAMPLE)(tune_cli.tune)


def summary(manifest: dict[str, Any], spec: "JobSpec") -> None:
    """Say on stderr what a finished job did."""
    console = Console(stderr=True)
    inputs = manifest["tally"]["rows"]
    rows = f"{inputs:,} rows" if spec.n == 1 else f"{manifest['rows']:,} samples of {inputs:,} rows"
    console.print(
        f"{rows}, {manifest['errors']:,} errors in {manifest['seconds']:,.1f} s: "
        f"{manifest['rows_per_second']:,.1f} rows/s, {manifest['output_tokens_per_second']:,.0f} output tokens/s, "
        f"{manifest['prefix_cache_hit_share']:.1%} of the prompt tokens from the prefix cache "
        f"(ideal: {manifest['ideal_hit_share']:.1%}; {manifest['engine']} engine)",
        highlight=False,
    )
    if manifest["input_rows"] > spec.unit_rows and spec.order == "prefix":
        console.print(
            "the ideal is that of each part; if rows that share a prompt's beginning are scattered over the input, "
            "--order global brings them together",
            highlight=False,
            soft_wrap=True,
        )
    tell_errors(manifest, spec.output, console)
    console.print(f"infills are in {spec.output}/data; look at some with: spanfill show {spec.output}", highlight=False)


@app.command(
    epilog="Example: spanfill pairs src/ --output pairs.parquet --mode mixed --per-file 20 --exclude '*/test/*'"
)
def pairs(
    sources: Annotated[list[Path], typer.Argument(help="Source files or folders.")],
    output: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    mode: Annotated[str, typer.Option(help="line, block, function, span or mixed.")] = "mixed",
    per_file: Annotated[
        int | None, typer.Option(help="Pairs of one file at most (default: 8, or as --limit needs).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs at most, spread over the files.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed cuts the same pairs.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of paths to leave out; repeatable.")] = None,
    json_: Json = False,
) -> None:
    """Cut source trees into prefix/suffix/middle rows."""
    from jobs.pairs import PairsSpec, cut_pairs

    values = {"sources": [str(s) for s in sources], "output": str(output), "mode": mode, "per_file": per_file}
    values |= {"limit": limit, "seed": seed, "exclude": exclude or []}
    report = cut_pairs(PairsSpec.parse(values, where="pairs"))
    if json_:
        print(json.dumps(report.as_dict()))
        return
    console = Console(stderr=True)
    console.print(f"{report.pairs:,} pairs of {report.files_cut:,} files in {output}", highlight=False)
    if report.skipped:
        told = ", ".join(f"{reason}: {count}" for reason, count in sorted(report.skipped.items()))
        console.print(f"skipped files: {told}", highlight=False)


@app.command(epilog="Example: spanfill infill src/main.py:12:8 --model demo-codegen25")
def infill(
    cursor: Annotated[str, typer.Argument(help="FILE:LINE:COL, both counted from 1.")],
    model: ModelName = "demo-codegen25",
    format: FormatName = None,  # noqa: A002
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    json_: Json = False,
) -> None:
    """Infill one cursor of a file and print it in place."""
    from jobs.cursor import split_at
    from jobs.show import colour
    from serving import infill as infill_once

    prefix, suffix = split_at(cursor)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    notice(model, Console(stderr=True), engine="vllm")
    answer = infill_once(prefix, suffix, model=model, format=format, max_tokens=max_tokens, temperature=temperature)
    if json_:
        print(json.dumps({"infill": answer.text, "finish_reason": answer.finish_reason}))
    else:
        Console().print(colour(prefix, answer.text, suffix), **EXACTLY)


@app.command(epilog="Example: spanfill explain --input pairs.parquet --row 7")
def explain(
    input: Annotated[str, typer.Option(help="Parquet file, folder, glob or URI.")],  # noqa: A002
    row: Annotated[int, typer.Option(help="Row of the input, from 0.", min=0)] = 0,
    model: ModelName = "demo-codegen25",
    format: FormatName = None,  # noqa: A002
    max_tokens: Annotated[int, typer.Option(help="Room left for the completion.")] = 128,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    prefix_align: Annotated[int | None, typer.Option(help="As for run.")] = None,
    suffix_share: Annotated[float | None, typer.Option(help="As for run.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME; repeatable.")] = None,
    json_: Json = False,
) -> None:
    """Show the exact prompt of one row: control tokens, what was cut, stop ids. No engine is started."""
    from jobs.explain import explain_row

    spec = {"input": input, "output": ".", "model": model, "max_tokens": max_tokens} | present(
        format=format, max_model_len=max_model_len, prefix_align=prefix_align, suffix_share=suffix_share,
        columns=pairs_of(column, "--column"),
    )  # fmt: skip
    told = explain_row(spec, row)
    if json_:
        print(json.dumps(told.as_dict()))
    else:
        Console().print(told.render(), **EXACTLY)


@app.command(epilog="Example: spanfill plan --input pairs.parquet --model codegen25-7b-multi --gpu H100 --price 2.5")
def plan(
    input: Annotated[str, typer.Option(help="Parquet file, folder, glob or URI.")],  # noqa: A002
    model: ModelName = "demo-codegen25",
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    format: FormatName = None,  # noqa: A002
    max_tokens: Annotated[int | None, typer.Option(help="Output tokens at most (default: 128).")] = None,
    n: Annotated[int | None, typer.Option(help="As for run: samples a row (default: 1).")] = None,
    temperature: Annotated[float | None, typer.Option(help="As for run: above 0 every row is generated.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    prefix_align: Annotated[int | None, typer.Option(help="As for run.")] = None,
    suffix_share: Annotated[float | None, typer.Option(help="As for run.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME; repeatable.")] = None,
    order: Annotated[str | None, typer.Option(help="As for run: which rows are ordered together.")] = None,
    rows_per_part: Annotated[int | None, typer.Option(help="As for run: rows of one unit.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows.")] = None,
    sample: Annotated[int, typer.Option(help="Rows to read.", min=1)] = 2_000,
    output_tokens: Annotated[
        float | None, typer.Option(help="Mean of a row, its stop token not counted (default: max_tokens).")
    ] = None,
    like: Annotated[str | None, typer.Option(help="A finished job whose mean output tokens to expect.")] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="H100, H200, A100 or L40S; repeatable (default: all).")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="bf16 or fp8; repeatable (default: both).")] = None,
    price: Annotated[list[str] | None, typer.Option(help="Dollars a GPU-hour, or NAME=PRICE; repeatable.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engines side by side (default: 1).")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="GPUs of one replica.")] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences of one engine at once (default: vLLM's for the GPU).", min=1)
    ] = None,
    fraction: Annotated[float, typer.Option(help="Of the bound, as you expect it to be reached.")] = 0.6,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="A finished job of this machine and model, to predict it; repeatable.")
    ] = None,
    json_: Json = False,
) -> None:
    """Tokens, prefix sharing, predicted rows/s, GPU-hours and cost of a job, before it is run. Nothing is started."""
    from jobs.estimate import Wish, parse_prices, plan_job
    from jobs.planned import rendered
    from jobs.spec import parse_spec
    from serving.gpus import GPUS, PRECISIONS, find_gpu, find_precision

    spec = {"input": input, "output": ".", "model": model} | present(
        revision=revision, format=format, max_tokens=max_tokens, max_model_len=max_model_len,
        prefix_align=prefix_align, suffix_share=suffix_share, columns=pairs_of(column, "--column"),
        n=n, temperature=temperature, order=order, rows_per_part=rows_per_part, limit=limit, replicas=replicas,
        tensor_parallel_size=tensor_parallel_size,
    )  # fmt: skip
    gpus = list(dict.fromkeys(map(find_gpu, gpu or GPUS)))
    precisions = list(dict.fromkeys(map(find_precision, precision or PRECISIONS)))
    prices = parse_prices(price or [], gpus)
    wish = Wish(gpus, precisions, prices, fraction, max_num_seqs, sample, output_tokens, like, calibrate or [])
    planned = plan_job(parse_spec(spec), wish)
    if json_:
        print(json.dumps(planned.as_dict()))
        return
    for piece in rendered(planned):
        Console().print(
            escape(piece) if isinstance(piece, str) else piece, highlight=False, soft_wrap=isinstance(piece, str)
        )


@app.command(epilog="Example: spanfill show out --row 3")
def show(
    output: Annotated[str, typer.Argument(help="A job's output folder.")],
    row: Annotated[int | None, typer.Option(help="Row of the output, from 0.", min=0)] = None,
    limit: Annotated[int, typer.Option(help="Rows to show.", min=1)] = 5,
) -> None:
    """Show infills as coloured text: prefix, infill, suffix."""
    from jobs.show import shown_rows

    console = Console()
    for shown in shown_rows(output, row=row, limit=limit):
        console.print(shown, **EXACTLY)


@app.command(epilog="Example: spanfill status out --json")
def status(
    output: Annotated[str, typer.Argument(help="A job's output folder.")],
    json_: Json = False,
) -> None:
    """Tell a running, interrupted, finished or damaged job apart, from its folder alone; exit code 1 if damaged."""
    from jobs.progress import describe_status
    from jobs.status import read_status

    found = read_status(output)
    if json_:
        print(json.dumps(asdict(found)))
    else:
        for line in describe_status(found):
            Console().print(escape(line), highlight=False, soft_wrap=True)
    if found.state == "damaged":
        raise typer.Exit(EXIT_DAMAGED)


@app.command(epilog="Example: spanfill verify out")
def verify(
    output: Annotated[str, typer.Argument(help="A job's output folder.")],
    json_: Json = False,
) -> None:
    """Check every finished part against the manifest and the input's rows; exit code 1 if something is wrong."""
    from jobs.verify import verify as verify_job

    verdict = verify_job(output)
    if json_:
        print(json.dumps(asdict(verdict)))
    else:
        told = "" if verdict.finished else ", of a job that is not finished"
        console = Console()
        for problem in verdict.problems:
            console.print(f"[bold red]{escape(problem)}[/]", highlight=False, soft_wrap=True)
        console.print(
            f"{verdict.parts:,} parts with {verdict.rows:,} rows and {verdict.errors:,} error rows{told}: "
            f"{len(verdict.problems) or 'no'} problems",
            highlight=False,
        )
    if verdict.problems:
        raise typer.Exit(EXIT_DAMAGED)


@app.command(epilog="Example: spanfill models --json")
def models(json_: Json = False) -> None:
    """Known models: licence, notices, training data, attribution, citation."""
    from serving.models import KNOWN_MODELS, describe

    if json_:
        print(json.dumps({name: describe(model) for name, model in KNOWN_MODELS.items()}))
        return
    from rich.table import Table

    for name, model in KNOWN_MODELS.items():
        shown = Table(title=name, title_justify="left", show_header=False)
        for key, value in describe(model).items():
            shown.add_row(key, str(value))
        Console().print(shown)


@app.command(epilog="Example: spanfill demo --rows 300")
def demo(
    folder: Annotated[Path, typer.Option(help="Where pairs and infills go.")] = Path("demo"),
    rows: Annotated[int, typer.Option(help="Pairs to cut and infill.", min=1)] = 300,
    model: ModelName = "demo-codegen25",
    seed: Annotated[int, typer.Option(help="Which pairs.")] = 0,
) -> None:
    """Cut pairs from the Python standard library, infill them on a real engine, and show the result."""
    from jobs.demo import cut_demo_pairs, table
    from jobs.progress import Display
    from jobs.runner import run_job
    from jobs.show import shown_rows
    from jobs.spec import JobSpec

    folder.mkdir(parents=True, exist_ok=True)
    cut_demo_pairs(folder / "pairs.parquet", rows=rows, seed=seed)
    output = str(folder / "out")
    with Display() as display:
        notice(model, display.console, engine="vllm")
        spec = JobSpec(input=str(folder / "pairs.parquet"), output=output, model=model, max_tokens=64, overwrite=True)
        manifest = run_job(spec, watcher=display)
    console = Console()
    console.print(table(manifest, output))
    for number in range(min(DEMO_INFILLS, manifest["rows"])):
        for shown in shown_rows(output, row=number * manifest["rows"] // DEMO_INFILLS):
            console.print(shown, **EXACTLY)


if __name__ == "__main__":
    main()
