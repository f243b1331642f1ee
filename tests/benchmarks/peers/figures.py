"""What one contestant measured in one round."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.sharing import ideal_cached_share


@dataclass
class Measured:
    """A contestant's raw answer: seconds, tokens, outputs by row; ``prompts`` are in the order in which they were sent.

    ``busy`` runs from the first request sent to the last answer held; ``cached`` is None where the contestant does not
    tell. ``answered`` and ``output_tokens`` are told where the outputs are not; ``different`` prompts and the sum
    ``prompt_tokens`` are what the contestant says of those it worked on. ``note`` says what differs from the others.
    """

    startup: float
    busy: float
    prompts: Sequence[Sequence[int]]
    outputs: dict[int, list[int]]
    cached: int | None
    answered: int = 0
    output_tokens: int = 0
    different: int = 0
    prompt_tokens: int | None = None
    errors: int = 0
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """What the table shows of one round; ``failure`` says why they do not count."""

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
    """Rates and shares of what was measured; rates are of the rows that were answered."""
    tokens, rows = sum(map(len, measured.prompts)), len(measured.prompts)
    answered = measured.answered or len(measured.outputs)
    output = measured.output_tokens or sum(map(len, measured.outputs.values()))
    return Figures(
        rows=rows,
        errors=measured.errors,
        startup_seconds=round(measured.startup, 2),
        busy_seconds=round(measured.busy, 3),
        rows_per_second=round(answered / measured.busy, 4),
        output_tokens_per_second=round(output / measured.busy, 3),
        mean_prompt_tokens=round(tokens / rows, 2),
        mean_output_tokens=round(output / max(1, answered), 2),
        cached_tokens=measured.cached,
        cached_share=None if measured.cached is None else round(measured.cached / tokens, 4),
        ideal_share=round(ideal_cached_share(measured.prompts, block_size), 4),
        note=measured.note,
        failure=_failure(measured, answered, tokens),
        extra=measured.extra,
    )


def _failure(measured: Measured, answered: int, tokens: int) -> str:
    """Why the rate is not one of these rows and prompts, or an empty string."""
    missing = len(measured.prompts) - answered - measured.errors
    told = tokens if measured.prompt_tokens is None else measured.prompt_tokens
    faults = (
        (measured.errors, f"{measured.errors:,} error rows"),
        (missing, f"{missing:,} rows without an answer"),
        (measured.different, f"{measured.different:,} prompts that differ from those it was given"),
        (told - tokens, f"{told:,} prompt tokens where {tokens:,} were given"),
    )
    return ", ".join(text for wrong, text in faults if wrong)


def until_stop(token_ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Output tokens without the stop token that ended them, which some contestants keep."""
    ids = list(token_ids)
    return ids[:-1] if ids and ids[-1] in stops else ids
