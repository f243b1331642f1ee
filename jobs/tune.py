"""Engine settings found by trying them on a sample of the user's own rows, over the whole path of ``run``."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.markup import escape
from rich.table import Table

from jobs.job import Job, prepare_job
from jobs.plan import Unit
from jobs.reader import UnitReader
from jobs.runner import Watcher, run_job
from jobs.sample import parts_of
from jobs.search import Figures, Knob, Settings, Trial, Tuning, search
from jobs.spec import JobSpec
from jobs.store import locate, publish_bytes
from serving.engine_args import is_gpu_build
from serving.errors import InputError, InterruptedJobError, OutputError

RUNS_OF_ROWS = 8
"""The sample's rows stand next to each other in the input by so many runs, since neighbours share their prompts."""

ROWS, GPU_ROWS = 256, 2_048
"""The sample of one engine, unless it is told: it fills each batch that is tried on such a machine twice over."""

GRID = (
    Knob("max_num_batched_tokens", (2_048, 4_096, 8_192, 16_384)),
    Knob("async_scheduling", (True, False)),
    Knob("enable_chunked_prefill", (True, False)),
    Knob("block_size", (32, 64, 128, 16)),
    Knob("max_num_seqs", (32, 64, 128, 256, 512, 1_024)),
)
"""What is tried, last what has the most values, of which the KV cache may hold the lower ones alone.

All are arguments of speed and memory: a begun job goes on with other ones.
"""


NEEDS_GPU = {
    "async_scheduling": "vLLM's CPU build has none",
    "enable_chunked_prefill": "vLLM's CPU build dies on seeded, sampled prompts in chunks",  # See serving.engine_args.
}
"""What is tried with vLLM's build for GPUs alone, and why."""


def objection(
    name: str,
    asked: Settings,
    in_force: Settings,
    *,
    rows: int,
    max_model_len: int,
    gpu: bool,
    replicas: int = 1,
    samples: int = 1,
) -> str:
    """Why it makes no sense to try the value of ``name`` that is ``asked`` for on a sample of ``rows``, or nothing.

    ``replicas`` share the rows, of each of which ``samples`` are made.
    A budget that is not asked for is no obstacle: vLLM raises it to what prompts need that may not be cut.
    """
    if name in NEEDS_GPU and not gpu:
        return NEEDS_GPU[name]
    if name == "max_num_seqs" and (needed := ceil(2 * asked[name] * replicas / samples)) > rows:
        return f"{rows:,} rows do not fill it twice over, {needed:,} would (--rows)"
    budget, is_cut = asked.get("max_num_batched_tokens"), (in_force | asked).get("enable_chunked_prefill", True)
    if budget is not None and budget < max_model_len and not is_cut:
        return f"a prompt of up to {max_model_len:,} tokens would not fit a step, and it may not be cut"
    return ""


def tune(
    spec: JobSpec,
    *,
    rows: int | None = None,
    minutes: float,
    knobs: Sequence[Knob] = GRID,
    tell: Callable[[Tuning], None] = lambda _: None,
    watcher: Watcher | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuning:
    """Find engine arguments that infill a sample of ``spec.input`` faster; ``spec.engine_args`` are the baseline.

    The sample has ``rows`` rows, or ``GPU_ROWS`` where vLLM is the one for GPUs and ``ROWS`` elsewhere, as often as
    there are replicas for each sample of a row. The baseline runs first, three times; after ``minutes`` no trial is
    begun. Each has engines of its own, whatever fleet runs. ``tell`` is called after each, ``watcher`` hears what the
    runs say. Raises what ``run_job`` raises when the baseline itself cannot run.
    """
    job, gpu, deadline = prepare_job(spec), is_gpu_build(), clock() + 60 * minutes
    length, usual = job.engine.max_model_len, GPU_ROWS if gpu and spec.engine == "vllm" else ROWS
    wanted = rows or usual * ceil(spec.replicas / spec.n)
    with tempfile.TemporaryDirectory(prefix="spanfill-tune-") as folder:
        sample = Path(folder, "rows.parquet")
        rows_to_try = sample_rows(job, wanted)
        pq.write_table(rows_to_try, sample)
        return search(
            lambda settings: _run(spec, sample, settings, watcher),
            knobs,
            spec.engine_args,
            late=lambda: clock() >= deadline,
            objection=partial(
                objection,
                rows=rows_to_try.num_rows,
                max_model_len=length,
                gpu=gpu,
                replicas=spec.replicas,
                samples=spec.n,
            ),
            tell=tell,
        )


def _run(spec: JobSpec, sample: Path, settings: Settings, watcher: Watcher | None) -> Figures:
    paths = {"input": str(sample), "output": str(sample.with_name("out"))}
    once = {"limit": None, "keep_columns": None, "overwrite": True, "resume": True, "retry_errors": False}
    trial = JobSpec.parse(spec.model_dump() | paths | once | {"engine_args": settings})
    try:
        manifest = run_job(trial, watcher=watcher, alone=True)  # Beside a fleet, a baseline that joined it is none.
    except InterruptedJobError as error:
        words = "interrupted; the best of the trials that had ended, if any, is in the output."
        raise type(error)(words, remedy="It begins anew when it is run again.") from None
    in_force = manifest["engines"]["settings"]
    return Figures(manifest["rows_per_second"], manifest["prefix_cache_hit_share"], manifest["errors"], in_force)


def sample_rows(job: Job, rows: int) -> pa.Table:
    """Some runs of neighbouring rows, spread evenly over the input, with the columns that play a role.

    Of a shuffled input they share less than a job's rows do, above all with ``order: global``.
    """
    roles = {job.spec.column(role) for role in job.spec.roles}
    reader = UnitReader(job.inputs.root, [name for name in job.inputs.schema.names if name in roles])
    files = job.inputs.files
    units = [Unit(number, number, 0, file.rows) for number, file in enumerate(files)]
    taken = parts_of(units, _ranges(sum(file.rows for file in files), rows))
    tables = [pa.Table.from_batches([batch]) for unit in taken for batch in reader.read(files[unit.file], unit)]
    if not tables:
        raise InputError(f"{job.spec.input} has no rows to tune on.", remedy="Give an input with rows.")
    return pa.concat_tables(tables, promote_options="default")


def _ranges(total: int, rows: int) -> list[tuple[int, int]]:
    rows = min(rows, total)
    runs = min(RUNS_OF_ROWS, rows)
    lengths = (rows * (run + 1) // runs - rows * run // runs for run in range(runs))
    return [(total * run // runs, total * run // runs + length) for run, length in enumerate(lengths)]


def report(tuning: Tuning, *, source: str) -> str:
    """The YAML file for ``spanfill run --job``: the settings found, and what was measured as comments."""
    lines = [
        f"Engine settings that spanfill tune found on rows of {source}; for spanfill run --job FILE.",
        f"{tuning.rows_per_second:.2f} rows/s, {tuning.ratio(tuning.rows_per_second):.2f} times the baseline's.",
        f"Two equal runs were within {tuning.noise:.1%} of each other; less counts for nothing.",
        *([] if tuning.finished else ["Its time was up before everything was tried."]),
        "Tried, each beside what had won by then:",
        *(f"  {trial.setting}: {told(trial, tuning)}" for trial in tuning.trials),
        *(["Not tried:"] if tuning.left_out else []),
        *(f"  {setting}: {why}" for setting, why in tuning.left_out.items()),
    ]
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + yaml.safe_dump({"engine_args": tuning.best}, sort_keys=True)


def check_output(output: Path) -> None:
    """Raise ``OutputError`` where no file can be written, before minutes are spent on what is to stand in it."""
    if output.is_dir():
        raise OutputError(f"{output} is a folder.", remedy="Name a file in it.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}.", remedy="Name a file elsewhere.") from None


def write_report(output: Path, tuning: Tuning, *, source: str) -> None:
    """Publish the report; raises ``StorageError``."""
    publish_bytes(locate(str(output)), report(tuning, source=source).encode())


def table(tuning: Tuning) -> Table:
    """What was tried, for the terminal."""
    best = escape(f"best: {tuning.best}")
    shown = Table("setting", "rows/s", "ratio", "cached", title="engine settings", caption=best)
    for trial in tuning.trials:
        figures, setting = trial.figures, escape(trial.setting)
        if figures is None:
            shown.add_row(setting, "-", "-", escape(trial.failure))
            continue
        speed = figures.rows_per_second
        shown.add_row(setting, f"{speed:.2f}", f"{tuning.ratio(speed):.2f}", f"{figures.cached_share:.1%}")
    for setting, why in tuning.left_out.items():
        shown.add_row(escape(setting), "-", "-", f"not tried: {escape(why)}")
    return shown


def told(trial: Trial, tuning: Tuning) -> str:
    """A trial's figures in words, or why there are none."""
    if trial.figures is None:
        return f"does not run: {trial.failure}"
    speed, share = trial.figures.rows_per_second, trial.figures.cached_share
    errors = f", {trial.figures.errors:,} error rows" if trial.figures.errors else ""
    return f"{speed:.2f} rows/s, ratio {tuning.ratio(speed):.2f}, {share:.1%} of the prompt tokens cached{errors}"
