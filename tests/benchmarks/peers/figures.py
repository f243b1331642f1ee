"""What one contestant measured in one round."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.sharing import ideal_cached_share


@dataclass
class Measured:
    """A contestant's raw answer: seconds, tokens, outputs by row; ``prompts`` are in the order in which they were sent.

    ``busy`` runs from the first request sent to the last answer held; ``cached`` is None where the contestant does not
    tell. ``note`` says what differs from the others.
    """

    startup: float
    busy: float
    prompts: Sequence[Sequence[int]]
    outputs: dict[int, list[int]]
    cached: int | None
    output_tokens: int = 0
    errors: int = 0
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """What the table shows of one round; ``failure`` says why there are none."""

    rows: int = 0
    errors: int = 0
    startup_seconds: float = 0.0
    busy_seconds: float = 0.0
    rows_per_second: float = 0.0
    output_tokens_per_second: float = 0.0
    mean_prompt_tokens: float = 0.0
    mean_output_tokens: float = 0.0
    cached_tokens: int | None = None
    cached_share: float | None = None
    ideal_share: float = 0.0
    note: str = ""
    failure: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def figures_of(measured: Measured, block_size: int) -> Figures:
    """Rates and shares of what was measured."""
    tokens, rows = sum(map(len, measured.prompts)), len(measured.prompts)
    output = measured.output_tokens or sum(map(len, measured.outputs.values()))
    return Figures(
        rows=rows,
        errors=measured.errors,
        startup_seconds=round(measured.startup, 2),
        busy_seconds=round(measured.busy, 3),
        rows_per_second=round(rows / measured.busy, 4),
        output_tokens_per_second=round(output / measured.busy, 3),
        mean_prompt_tokens=round(tokens / rows, 2),
        mean_output_tokens=round(output / rows, 2),
        cached_tokens=measured.cached,
        cached_share=None if measured.cached is None else round(measured.cached / tokens, 4),
        ideal_share=round(ideal_cached_share(measured.prompts, block_size), 4),
        note=measured.note,
        extra=measured.extra,
    )


def until_stop(token_ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Output tokens without the stop token that ended them, which some contestants keep."""
    ids = list(token_ids)
    return ids[:-1] if ids and ids[-1] in stops else ids
