"""A job made ready: model, engine and inputs resolved and checked, and what its feeders and parts are told."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from jobs.ledger import FORMAT_VERSION, STATE, read_job
from jobs.preflight import versions
from jobs.reader import (
    ERROR_COLUMNS,
    ORIGIN_FILE,
    ORIGIN_ROW,
    OUTPUT_COLUMNS,
    SCORE_COLUMNS,
    InputSet,
    check_kept,
    check_roles,
    find_input,
)
from jobs.score import check_logprobs_mode, settle_columns
from jobs.spec import JobSpec, fingerprint
from jobs.store import Location, exists, is_file, locate
from jobs.unit import FeederConfig
from serving.config import EngineConfig
from serving.engine_args import check_engine_args, reads_weights
from serving.errors import OutputError
from serving.formats import Format, load_format
from serving.models import Model, resolve_model
from serving.weights import resolve_revision, weights_identity


@dataclass(frozen=True)
class Job:
    """A job made ready: everything resolved and checked, nothing started."""

    spec: JobSpec
    model: Model
    engine: EngineConfig
    inputs: InputSet
    output: Location
    format_name: str
    identity: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What names the job's parts."""
        return fingerprint(self.identity)

    @property
    def total_rows(self) -> int:
        """Rows to do."""
        return min(self.inputs.rows, self.spec.limit or self.inputs.rows)


BEGUN_FIELDS = ("rows_per_part", "compression")
"""What a resumed job keeps from its beginning: it shapes the parts, not the infills."""


def begun_spec(spec: JobSpec, say: Callable[[str], None]) -> JobSpec:
    """The spec with what a begun job in its output folder has settled; says what of the new one plays no part."""
    output = locate(spec.output)
    if spec.overwrite or not exists(output.join(STATE, "job.json")):
        return spec
    begun = read_job(output)["spec"]
    kept = {name: begun[name] for name in BEGUN_FIELDS if begun[name] != getattr(spec, name)}
    for name, value in kept.items():
        say(f"going on with the begun job's {name} = {value}, not {getattr(spec, name)}")
    return spec.model_copy(update=kept)


def prepare_job(spec: JobSpec, *, weights: bool = True) -> Job:
    """Resolve and check a job; raises a ``UsageError`` for everything that is wrong before anything is started.

    The model's weights may be missing where ``weights`` is False, or its engine reads none.
    """
    output = locate(spec.output, patience=spec.store_patience)
    if is_file(output):
        raise OutputError(f"the output {output} is a file.", remedy="Give --output a folder of its own.")
    weights = weights and reads_weights(spec.engine, spec.engine_args)
    model = resolve_model(spec.model, format=spec.format, revision=spec.revision, weights=weights)
    if spec.task == "score":
        check_logprobs_mode(spec.engine_args)
    if spec.engine == "vllm":
        check_engine_args(spec.engine_args)
        model = replace(model, revision=resolve_revision(model))
    engine = model.engine_config(
        kind=spec.engine,
        dtype=spec.dtype,
        max_model_len=spec.max_model_len,
        tensor_parallel_size=spec.tensor_parallel_size,
        engine_args=spec.engine_args,
    )
    spec, _, inputs = open_input(spec, model.format, engine.max_model_len)
    kept = spec.keep_columns if spec.keep_columns is not None else inputs.schema.names
    added = SCORE_COLUMNS if spec.task == "score" else OUTPUT_COLUMNS
    check_kept(inputs.schema, kept, added=[*added, *spec.extra_columns, *ERROR_COLUMNS])
    files = [file.identity for file in inputs.files]
    plain = spec.in_plain_words(inputs.schema.names, inputs.rows)
    identity = plain.infill_identity(engine, weights_identity(model, engine.revision), model.format, files)
    return Job(spec, model, engine, inputs, output, model.format, identity)


def open_input(spec: JobSpec, format_name: str, max_model_len: int) -> tuple[JobSpec, Format, InputSet]:
    """A job, its format and its input files, found to suit each other; raises a ``UsageError``.

    The columns of a job that scores are settled then.
    """
    fmt = load_format(format_name, tokenizer_of=spec.model)
    fmt.check_budget(spec.answer_tokens, max_model_len)
    inputs = find_input(spec.input, patience=spec.store_patience)
    if spec.task == "score":
        spec = settle_columns(spec, inputs.schema.names)
    if spec.column("suffix") in inputs.schema.names:
        fmt.check_infill()
    wanted = {*spec.required_roles, *(role for role in spec.roles if spec.columns.get(role))}
    check_roles(inputs.schema, {role: spec.column(role) for role in spec.roles}, wanted=wanted)
    return spec, fmt, inputs


def refuse_nested_output(job: Job) -> None:
    """Raise ``OutputError`` when the output lies in the folder that is searched for input."""
    if str(job.output).startswith(f"{str(job.inputs.root).rstrip('/')}/"):
        raise OutputError(
            f"{job.output} lies in the input folder {job.inputs.root}: its parts would be taken for input.",
            remedy="Choose an --output beside it.",
        )


def feeder_config(job: Job, *, beginning: str = "", lease: int = 0) -> FeederConfig:
    """What the job's feeders are told; ``beginning`` is the ledger's, ``lease`` the number of the lease."""
    spec = job.spec
    own = [name for name in job.inputs.schema.names if name not in (ORIGIN_FILE, ORIGIN_ROW)]
    kept = [name for name in own if spec.keep_columns is None or name in spec.keep_columns]
    roles = [spec.column(role) for role in spec.roles]
    columns = [name for name in job.inputs.schema.names if name in [*kept, *roles, ORIGIN_FILE, ORIGIN_ROW]]
    schema = job.inputs.schema.remove_metadata()
    return FeederConfig(
        spec=spec,
        input=job.inputs.root,
        output=job.output,
        fingerprint=job.fingerprint,
        beginning=beginning,
        lease=lease,
        format=job.format_name,
        tokenizer=spec.model,
        max_model_len=job.engine.max_model_len,
        schema=pa.schema([schema.field(name) for name in columns]),
        kept=tuple(kept),
        metadata=provenance(job),
    )


def provenance(job: Job) -> dict[str, Any]:
    """What each part and the manifest say of where the infills or likelihoods come from."""
    model = job.model
    told: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "engine": job.engine.kind,
        "model": job.spec.model,
        "model_source": job.engine.model if model.path is None else model.name,
        "revision": job.engine.revision,
        "format": job.format_name,
        "licence": model.licence,
        "notice": model.notice,
        "citation": model.citation,
        "versions": versions(),
        "job": job.fingerprint,
    }
    if job.spec.task == "score":
        told["task"] = "score"
    if job.engine.kind != "vllm":
        noise = "figures are" if job.spec.task == "score" else "text is"
        told["simulated"] = f"no model computed these rows; their {noise} noise"
    return told
