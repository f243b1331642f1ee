"""``JobSpec``: everything that a job is, as one frozen record; its fields are the options of ``run`` and ``score``."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from jobs.plan import SAMPLE_TOKENS, UNIT_TOKENS
from jobs.store import PATIENCE_SECONDS
from serving.config import EngineConfig, EngineKind, Frozen
from serving.engine_args import SPEED_ARGUMENTS
from serving.errors import ConfigError
from serving.formats import FORMATS
from serving.tenants.caller import Caller
from serving.tenants.terms import LEAST_WEIGHT, MOST_WEIGHT, NAME
from serving.trimming import TRIMMINGS
from serving.truncation import DEFAULT_SUFFIX_SHARE

ROLES = ("prefix", "suffix", "id")
SCORE_ROLES = ("prefix", "suffix", "middle", "text", "id")
EXTRA_COLUMNS = ("mean_logprob", "token_ids", "source_file", "source_row")
SCORE_EXTRA_COLUMNS = ("truncated", "source_file", "source_row")
SAMPLED = ("top_k", "min_p")
"""Fields that change a sampled infill, and no greedy one."""

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
GENERATION = (
    *("max_tokens", "temperature", "top_p", "n", "seed", "stop", "stop_at_suffix", "trim"),
    *(*SAMPLED, *PENALTIES),
)
"""Fields of what is generated; a job that scores generates nothing."""

COMPRESSIONS = ("zstd", "snappy", "gzip", "lz4", "none")


class JobSpec(Frozen):
    """A job: Parquet of prefix/suffix pairs in, Parquet of infills out; or, with ``task`` score, of likelihoods.

    ``input`` is a file, a folder or a glob, local or a URI; ``output`` a folder that belongs to this job. Lengths are
    in tokens, ``max_error_rate`` is a share of the rows tried, ``store_patience`` is in seconds. How tokens are drawn,
    with what penalties, is said as in vLLM's ``SamplingParams``. ``tenant`` is whose job it is where one fleet serves
    several: it parts their prefix caches, by ``weight`` their shares of the engines, has no more rows read at once than
    memory allows, and changes no infill. With ``most_text`` rows with a text of more bytes are error rows. Raises
    ``ConfigError`` naming every wrong field.
    """

    task: Literal["infill", "score"] = "infill"
    input: str
    output: str
    tenant: str | None = Field(None, pattern=f"^{NAME.pattern}$")
    weight: float = Field(1.0, ge=LEAST_WEIGHT, le=MOST_WEIGHT)
    model: str = "demo-codegen25"
    revision: str | None = None
    format: str | None = None
    engine: EngineKind = "vllm"
    engine_args: dict[str, JsonValue] = Field(default_factory=dict)
    dtype: str | None = None
    tensor_parallel_size: int = Field(1, ge=1)
    max_model_len: int | None = Field(None, ge=16)
    replicas: int = Field(1, ge=1)
    cores: int = Field(0, ge=0)

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    n: int = Field(1, ge=1, le=1024)
    seed: int = Field(0, ge=0, lt=1 << 63)
    stop: tuple[str, ...] = ()
    stop_at_suffix: bool = False
    trim: tuple[str, ...] = ()
    prefix_align: int | None = Field(None, ge=1)
    suffix_share: float | None = Field(None, ge=0, le=1)
    score_end: bool = False
    order: Literal["prefix", "input", "global"] = "prefix"

    columns: dict[str, str] = Field(default_factory=dict)
    extra_columns: tuple[str, ...] = ()
    keep_columns: tuple[str, ...] | None = None
    rows_per_part: int = Field(10_000, ge=1)
    compression: str = "zstd"
    limit: int | None = Field(None, ge=1)
    most_text: int | None = Field(None, ge=1)

    batch_rows: int = Field(64, ge=1)
    max_attempts: int = Field(3, ge=1)
    max_error_rate: float = Field(0.05, ge=0, le=1)
    retry_errors: bool = False
    feeders: int = Field(1, ge=1)
    store_patience: float = Field(PATIENCE_SECONDS, ge=0)
    resume: bool = True
    overwrite: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "JobSpec":
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 at temperature 0 would repeat one infill; set temperature")
        _known("columns", self.columns, self.roles)
        extra = SCORE_EXTRA_COLUMNS if self.task == "score" else EXTRA_COLUMNS
        _known("extra_columns (--with)", self.extra_columns, extra)
        _known("trim", self.trim, TRIMMINGS)
        _known("compression", (self.compression,), COMPRESSIONS)
        if self.retry_errors and (self.overwrite or not self.resume):
            raise ValueError("retry_errors goes on with a job; it excludes overwrite and no-resume")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty")
        return self

    @model_validator(mode="after")
    def _of_its_task(self) -> "JobSpec":
        if self.task == "infill":
            if self.score_end:
                raise ValueError("score_end is for task score")
            return self
        if given := self._chosen(GENERATION):
            raise ValueError(f"scoring generates nothing; leave out {', '.join(given)}")
        if self.order == "global":
            raise ValueError("order global is for a prefix cache, which scoring does not read; use prefix or input")
        return self

    def _chosen(self, names: Sequence[str]) -> list[str]:
        """Those of the fields that are not left at their defaults."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def roles(self) -> tuple[str, ...]:
        """What the input's columns may be for this task."""
        return SCORE_ROLES if self.task == "score" else ROLES

    @property
    def required_roles(self) -> tuple[str, ...]:
        """The roles that need a column without nulls; the last one is what is scored, where that is the task."""
        if self.task == "infill":
            return ("prefix",)
        return ("prefix", "middle") if self.column("middle") else ("text",)

    @property
    def answer_tokens(self) -> int:
        """Tokens that an engine makes of a sample at most: one where it scores, since vLLM makes one at least."""
        return 1 if self.task == "score" else self.max_tokens

    @property
    def unit_rows(self) -> int:
        """Rows of a unit at most: fewer than ``rows_per_part`` where all of their samples are too much to hold."""
        return max(1, min(self.rows_per_part, UNIT_TOKENS // (self.n * (self.answer_tokens + SAMPLE_TOKENS))))

    @property
    def cache_salt(self) -> str | None:
        """What parts the tenant's blocks in the prefix cache from all others'; None for a job of no tenant."""
        return None if self.tenant is None else Caller(self.tenant, key="").cache_salt

    def column(self, role: str) -> str:
        """The input column that plays ``role``, one of ``roles``; empty for none."""
        return self.columns.get(role, role)

    def in_plain_words(self, columns: Sequence[str], rows: int) -> "JobSpec":
        """The same job over ``rows`` input rows of these columns, spelled as all who mean it would spell it."""
        kept = [name for name in columns if self.keep_columns is None or name in self.keep_columns]
        return self.model_copy(
            update={
                "stop": tuple(sorted(set(self.stop))),
                "columns": {role: self.column(role) for role in self.roles if self.column(role) in columns},
                "keep_columns": None if kept == list(columns) else tuple(kept),
                "limit": None if self.limit is None or self.limit >= rows else self.limit,
            }
        )

    def infill_identity(
        self, engine: EngineConfig, weights: dict[str, Any], format_name: str, files: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """What can change an answer or its columns, and nothing else: the ground of the job's fingerprint.

        Where the model and the input lie plays no part, nor do engine arguments of speed and memory, nor, when
        decoding is greedy, the seed. The order does where it decides which rows a part holds.
        """
        names = {"columns", "extra_columns", "keep_columns", "limit"}
        names |= {"task", "score_end"} if self.task == "score" else {"max_tokens", "temperature", "n", "stop", "trim"}
        if self.temperature > 0:
            names |= {"seed", "top_p", *self._chosen(SAMPLED)}
        if self.order == "global":  # Which rows a part holds, and their order.
            names |= {"order"}
        # Only where they are chosen: jobs that began before there were these options go on.
        names |= set(self._chosen(("stop_at_suffix", "most_text", *PENALTIES)))
        arguments = {key: value for key, value in engine.engine_args.items() if key not in SPEED_ARGUMENTS}
        return {
            "input": files,
            "engine": {"kind": engine.kind, "dtype": engine.dtype, "max_model_len": engine.max_model_len}
            | {"engine_args": arguments},
            "weights": weights,
            "format": format_name,
            "prefix_align": FORMATS[format_name].prefix_align if self.prefix_align is None else self.prefix_align,
            "suffix_share": DEFAULT_SUFFIX_SHARE if self.suffix_share is None else self.suffix_share,
            **self.model_dump(mode="json", include=names),
        }


def fingerprint(identity: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of the identity's sha256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _known(field: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{field}: {name!r} is none of {', '.join(sorted(known))}")


def parse_spec(values: dict[str, Any]) -> JobSpec:
    """A job from a mapping; raises ``ConfigError``."""
    if "input" not in values or "output" not in values:
        raise ConfigError("a job needs input and output.", remedy="Give --input PATH and --output DIR.")
    return JobSpec.parse(values, where="job")


def stored_spec(spec: JobSpec) -> dict[str, Any]:
    """The spec as a job's folder keeps it: paths absolute, and without the credentials that a URI may hold."""
    values = spec.model_dump(mode="json")
    return values | {name: _stored_path(values[name]) for name in ("input", "output")}


def _stored_path(text: str) -> str:
    return re.sub(r"://[^/@]*@", "://", text) if "://" in text else str(Path(text).expanduser().absolute())
