"""The exact prompt of one row, for human eyes; no engine."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.segment import Segments

from jobs.job import feeder_config, prepare_job
from jobs.plan import Unit
from jobs.reader import UnitReader
from jobs.rows import row_prompts
from jobs.spec import parse_spec
from jobs.visible import LEGEND, styled, visible
from serving.errors import InputError
from serving.formats import Format, load_format


@dataclass(frozen=True)
class Explained:
    """One prompt: its pieces in order, each ordinary text or one control token, and the facts about it."""

    pieces: list[tuple[str, bool]]
    token_ids: list[int]
    stop_tokens: dict[str, int]
    truncated: bool
    prefix_chars: int
    suffix_chars: int
    prefix_cut: int
    suffix_cut: int
    max_tokens: int
    max_context: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"prompt": "".join(text for text, _ in self.pieces)}

    def render(self) -> Segments:
        """For the terminal: control tokens stand out, in plain text too."""
        prompt = [
            (f"⟦{visible(text)}⟧", "bold white on red") if control else (visible(text, exact=True), "")
            for text, control in self.pieces
        ]
        cut = f"cut: {self.prefix_cut:,} characters from the prefix's start, {self.suffix_cut:,} from the suffix's end"
        stops = ", ".join(f"{token} ({number})" for token, number in self.stop_tokens.items())
        facts = (
            f"{LEGEND}\n"
            f"{len(self.token_ids):,} prompt tokens + {self.max_tokens:,} to generate, context {self.max_context:,}\n"
            f"{cut if self.truncated else 'nothing was cut'}\nstops at: {stops}\n"
        )
        return styled(*prompt, (f"\n\n{facts}", "dim"))


def explain_row(options: dict[str, Any], row: int) -> Explained:
    """Explain input row number ``row`` of a job with these options; raises ``InputError`` if there is none."""
    job = prepare_job(parse_spec(options), weights=False)
    fmt = load_format(job.format_name, tokenizer_of=job.spec.model)
    at = row
    for file in job.inputs.files:
        if at < file.rows:
            break
        at -= file.rows
    else:
        raise InputError(f"{job.inputs.root} has {job.inputs.rows} rows, no row {row}.", remedy="Rows count from 0.")
    reader = UnitReader(job.inputs.root, feeder_config(job).schema.names)
    batch = next(reader.read(file, Unit(0, 0, at, at + 1)))
    _, prompt = row_prompts(job.spec, fmt, job.engine.max_model_len, batch)[0]
    if isinstance(prompt, Exception):
        raise InputError(f"{file.name}, row {at}: {prompt}")
    lengths = [len(batch.column(n)[0].as_py() or "") if n in batch.schema.names else 0 for n in _texts(job.spec)]
    return Explained(
        pieces=pieces(fmt, list(prompt.token_ids)),
        token_ids=list(prompt.token_ids),
        stop_tokens={fmt.tokenizer.token(i): i for i in prompt.stop_token_ids},
        truncated=prompt.truncated,
        prefix_chars=prompt.prefix_chars,
        suffix_chars=prompt.suffix_chars,
        prefix_cut=lengths[0] - prompt.prefix_chars,
        suffix_cut=lengths[1] - prompt.suffix_chars,
        max_tokens=job.spec.max_tokens,
        max_context=job.engine.max_model_len,
    )


def _texts(spec: Any) -> tuple[str, str]:
    return spec.column("prefix"), spec.column("suffix")


def pieces(fmt: Format, token_ids: list[int]) -> list[tuple[str, bool]]:
    """Runs of ordinary tokens as text, control tokens by their names, flagged."""
    found: list[tuple[str, bool]] = []
    run: list[int] = []
    for token_id in token_ids:
        if token_id not in fmt.tokenizer.special_ids:
            run.append(token_id)
            continue
        if run:
            found.append((fmt.tokenizer.decode(run), False))
            run = []
        found.append((fmt.tokenizer.token(token_id), True))
    return [*found, (fmt.tokenizer.decode(run), False)] if run else found
