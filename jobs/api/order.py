"""What crosses to a work's own process and back, and the folder that it works in: a process knows no database."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue

from jobs.spec import JobSpec
from serving.api.ask import ServedModel
from serving.api.edge import MOST_BODY
from serving.config import Frozen

Kind = Literal["batch", "job"]
Cut = Literal["cancelled", "expired"]
Mode = Literal["run", "cancelled", "expired", "count"]
"""What a process is to do: run the work to its end, deliver what is done of a batch that was cut short, or count what a
work's unfinished units used."""

EXIT_HELD = 75
"""Another process works in the folder still (EX_TEMPFAIL of sysexits.h)."""

GRACE_SECONDS = 45.0
"""A process that was asked to stop lets what is in flight finish first; after so long it is killed."""


class Order(Frozen):
    """A work as its process is told of it; all that the work itself says is the same for every process of the work.

    ``app`` is the application whose replicas do it, ``engine`` the fields of a spec that name theirs, ``source`` a path
    or URI. ``began`` is in seconds since 1970. ``weight`` is the tenant's share when the work was asked for.
    """

    id: str
    kind: Kind
    tenant: str
    app: str
    model: str
    format: str
    context: int
    can_infill: bool
    engine: dict[str, JsonValue]
    source: str
    began: int
    endpoint: str = ""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    most_lines: int = 50_000
    weight: float = 1.0

    @property
    def served(self) -> ServedModel:
        """The model as the dialects know it."""
        return ServedModel(self.model, self.format, self.context, self.can_infill)

    def spec(self, source: str, output: Path, options: dict[str, Any]) -> JobSpec:
        """A job of this work, whose texts are no longer than a request may be; raises ``ConfigError``."""
        own = {"input": source, "output": str(output), "tenant": self.tenant, "weight": self.weight}
        own |= {"most_text": MOST_BODY} if self.kind == "job" else {}
        return JobSpec.parse({**self.engine, **options, **own}, where="options")


class Options(Frozen):
    """How to decode: what the lines of one job share."""

    max_tokens: int
    temperature: float
    n: int
    stop: tuple[str, ...]
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


class LineError(Frozen):
    """What is wrong with a line of a batch, counted from 1; None: with all of it."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Plan(Frozen):
    """A batch that was read: its lines, and the jobs that they make. With ``errors`` nothing is run.

    ``asking`` lines have ``prompts`` together; the others are refused as they are.
    """

    total: int = 0
    asking: int = 0
    prompts: int = 0
    groups: tuple[Options, ...] = ()
    errors: tuple[LineError, ...] = ()


class Problem(Frozen):
    """Why a process gave up; ``may_pass``: another try may help."""

    code: str
    message: str
    may_pass: bool


class UnitUsage(Frozen):
    """What a unit of a job used; ``name`` tells it from the work's others.

    A prompt counts once for all its samples, a stop token as one that was made: as requests are counted.
    """

    name: str
    rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def with_row(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> "UnitUsage":
        """This and one row more."""
        return UnitUsage(
            name=self.name,
            rows=self.rows + 1,
            prompt_tokens=self.prompt_tokens + prompt_tokens,
            cached_tokens=self.cached_tokens + cached_tokens,
            completion_tokens=self.completion_tokens + completion_tokens,
        )


class Outcome(Frozen):
    """How a process ended: ``completed`` and ``failed`` lines or rows, or why there are none.

    ``partial`` is what units used that were cut short: of a batch, for the rows that are delivered all the same.
    """

    completed: int = 0
    failed: int = 0
    errors: tuple[LineError, ...] = ()
    problem: Problem | None = None
    partial: tuple[UnitUsage, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """The files of one work."""

    path: Path

    @property
    def order(self) -> Path:
        return self.path / "order.json"

    @property
    def lock(self) -> Path:
        """Locked by the process that works here."""
        return self.path / "lock"

    @property
    def log(self) -> Path:
        """What the processes print."""
        return self.path / "log"

    @property
    def plan(self) -> Path:
        """A batch's ``Plan``, once it is read."""
        return self.path / "plan.json"

    @property
    def lines(self) -> Path:
        """A batch's ``Record`` of each line, in the order of the input."""
        return self.path / "lines.jsonl"

    @property
    def finalizing(self) -> Path:
        """There once a batch's results are being written."""
        return self.path / "finalizing"

    @property
    def output(self) -> Path:
        """A batch's answers."""
        return self.path / "output.jsonl"

    @property
    def errors(self) -> Path:
        """A batch's lines that have no answer."""
        return self.path / "errors.jsonl"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def groups(self) -> Path:
        return self.path / "groups"

    def source(self, kind: Kind) -> Path:
        """The input, where it is a file that the tenant stored."""
        return self.path / ("input.jsonl" if kind == "batch" else "input.parquet")

    def rows(self, group: int) -> Path:
        """What a job of a batch reads."""
        return self.groups / f"{group:03d}" / "rows.parquet"

    def results(self, group: int = 0) -> Path:
        """The output folder of a job; a work that is a job has one."""
        return self.groups / f"{group:03d}" / "out"

    def begun(self) -> list[tuple[int, Path]]:
        """The jobs that have an output folder, by their numbers."""
        return [(int(path.parent.name), path) for path in sorted(self.groups.glob("*/out"))]
