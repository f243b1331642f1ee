"""What a tenant may choose of a job: how rows are decoded and what comes out, nothing of engines, places or memory."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from jobs.spec import JobSpec
from serving.api.fields import MOST_STOPS, Flag, Integer, Name, Number, Penalty, Repetition, Share, StopWord
from serving.errors import ConfigError

MOST_SAMPLES = 128
MOST_COLUMNS = 1_000
MOST_LENGTH = 1 << 20
MOST_NAMED = 64
FEW = 8

LEAST_PART, MOST_PART = 1_000, 100_000
"""Input rows of a part: fewer would make a file of every row."""

Length = Annotated[int, Field(strict=True, ge=1, le=MOST_LENGTH)]
Names = Annotated[list[Name], Field(max_length=FEW)]


class JobOptions(BaseModel):
    """The fields of a job's spec that are a tenant's to say; one that is left out has the spec's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["infill", "score"] | None = None
    max_tokens: Length | None = None
    temperature: Annotated[Number, Field(ge=0, le=10)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_SAMPLES)] | None = None
    seed: Annotated[Integer, Field(ge=0)] | None = None
    stop: Annotated[list[StopWord], Field(max_length=MOST_STOPS)] | None = None
    stop_at_suffix: Flag | None = None
    trim: Names | None = None
    prefix_align: Length | None = None
    suffix_share: Share | None = None
    score_end: Flag | None = None
    order: Literal["prefix", "input"] | None = None
    columns: Annotated[dict[Name, Name], Field(max_length=FEW)] | None = None
    extra_columns: Names | None = None
    keep_columns: Annotated[list[Name], Field(max_length=MOST_COLUMNS)] | None = None
    rows_per_part: Annotated[int, Field(strict=True, ge=LEAST_PART, le=MOST_PART)] | None = None
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] | None = None
    limit: Annotated[Integer, Field(ge=1)] | None = None
    max_error_rate: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _are_known(cls, sent: Any) -> Any:
        unknown = [name for name in sent if name not in cls.model_fields] if isinstance(sent, dict) else []
        if unknown:
            what = {"name": str(unknown[0])[:MOST_NAMED], "options": ", ".join(cls.model_fields)}
            raise PydanticCustomError("unknown_option", "{name} is none; there are {options}", what)
        return sent

    def chosen(self) -> dict[str, Any]:
        """What is not left out; raises ``ConfigError`` for what does not go together."""
        chosen = self.model_dump(mode="json", exclude_none=True)
        try:
            JobSpec.parse({**chosen, "input": "input", "output": "output"}, where="options")
        except ConfigError as error:
            raise ConfigError(error.message, remedy=f"Options: {', '.join(JobOptions.model_fields)}.") from None
        return chosen
