"""One row's way, without I/O: its seed, its prompt, and from the engine's answer to the columns of the output."""

import array
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.journal import Sample, token_lists
from jobs.reader import TooLong, is_text, short_texts, texts
from jobs.spec import ROLES, JobSpec
from jobs.tally import Tally, count
from serving.errors import InputError, SpanfillError
from serving.formats import Format, Prompt
from serving.protocol import Result
from serving.stopping import suffix_beginning
from serving.trimming import OVERLAPS, TRIMMINGS


@dataclass(slots=True)
class PromptFacts:
    """What a row's prompt was, without its token ids; ``scored`` of its last tokens are a text to be scored."""

    prompt_tokens: int
    prefix_chars: int
    suffix_chars: int
    truncated: bool
    scored: int = 0


def facts_of(prompt: Prompt) -> PromptFacts:
    """What is kept of a prompt."""
    return PromptFacts(len(prompt.token_ids), prompt.prefix_chars, prompt.suffix_chars, prompt.truncated, prompt.scored)


def row_seeds(spec: JobSpec, identity: str) -> tuple[int, ...]:
    """One 63-bit seed a sample: a hash of the job's seed, the row's id (else its file and number) and the sample."""
    if spec.temperature == 0:
        return (0,)
    texts = (f"{spec.seed}\0{identity}\0{sample}" for sample in range(spec.n))
    return tuple(int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest()) >> 1 for t in texts)


def row_prompts(
    spec: JobSpec, fmt: Format, max_context: int, batch: pa.RecordBatch
) -> list[tuple[Any, Prompt | SpanfillError]]:
    """Of each row of a batch its id, None where it has none, and its prompt, or the error that makes it an error row.

    Token ids are 32-bit arrays. An id that is not UTF-8 is the error that decoding it gave.
    """
    pairs: list[tuple[str, str | None]] = []
    errors: dict[int, SpanfillError] = {}
    prefixes, suffixes, identities = (role_values(spec, batch, role) for role in ROLES)
    for row, (before, after, identity) in enumerate(zip(prefixes, suffixes, identities, strict=True)):
        error = (
            text_error(spec, "prefix", before, required=True)
            or text_error(spec, "suffix", after, required=False)
            or text_error(spec, "id", identity, required=False)
        )
        if error is not None:
            errors[row] = error
        pairs.append(("", "") if error is not None else (before, after))
    prompts = fmt.prompt_batch(
        pairs,
        max_tokens=spec.max_tokens,
        max_context=max_context,
        prefix_align=spec.prefix_align,
        suffix_share=spec.suffix_share,
    )
    return [(identities[row], errors.get(row, prompt)) for row, prompt in enumerate(prompts)]


def row_untils(spec: JobSpec, batch: pa.RecordBatch) -> list[str | None]:
    """What ends each row's infill when it runs into the suffix: None unless the job asks for that."""
    if not spec.stop_at_suffix:
        return [None] * batch.num_rows
    suffixes = role_values(spec, batch, "suffix")
    return [suffix_beginning(text) if isinstance(text, str) else None for text in suffixes]


def role_values(spec: JobSpec, batch: pa.RecordBatch, role: str) -> list[Any]:
    """The values of the column that plays ``role``: None where there is no such column, errors for broken text.

    One that is longer than the job's ``most_text`` comes back as ``TooLong``.
    """
    name = spec.column(role)
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(name)
    if not is_text(column.type):
        return list(column.to_pylist())
    return list(texts(column) if spec.most_text is None else short_texts(column, spec.most_text))


def text_error(
    spec: JobSpec, role: str, value: str | UnicodeDecodeError | TooLong | None, *, required: bool
) -> InputError | None:
    """What is wrong with a row's value of the column that plays ``role``, if anything is."""
    if isinstance(value, UnicodeDecodeError):
        return InputError(f"column {spec.column(role)} is not UTF-8 at byte {value.start}.", remedy="Decode it before.")
    if isinstance(value, TooLong):
        return InputError(
            f"column {spec.column(role)} has a text of {value.bytes:,} bytes, more than {spec.most_text:,}.",
            remedy="Send less text.",
        )
    if value is None and required:
        return InputError(f"column {spec.column(role)} is null.", remedy=f"Give a {role}; an empty one is allowed.")
    return None


def to_samples(result: Result, row: int, *, replica: str, attempts: int) -> list[Sample]:
    """What must be kept of an engine's answer; the row's cached tokens are kept with its first sample."""
    if result.error_code is not None:
        error = Sample(row, 0, [], replica=replica, attempts=attempts)
        error.error_code, error.error_message = result.error_code, result.error_message
        return [error]
    told = [(array.array("i", c.token_ids), c.stop_token_id, _mean(c.logprobs)) for c in result.completions]
    samples = [Sample(row, number, *made, replica=replica, attempts=attempts) for number, made in enumerate(told)]
    samples[0].cached_tokens = result.cached_tokens
    return samples


def _mean(logprobs: Sequence[float] | None) -> float | None:
    return sum(logprobs) / len(logprobs) if logprobs else None


def output_columns(
    spec: JobSpec,
    fmt: Format,
    facts: Sequence[PromptFacts],
    pairs: Sequence[tuple[str, str | None]],
    samples: Sequence[Sample],
    sources: Sequence[tuple[str, int]],
    tally: Tally,
) -> dict[str, Any]:
    """The added columns, one value a sample, and their sums in ``tally``; all sequences run in parallel."""
    infills = [_finish(spec, fmt, s, *pair) for s, pair in zip(samples, pairs, strict=True)]
    for sample, fact, (text, reason) in zip(samples, facts, infills, strict=True):
        tally.samples += 1
        tally.prompt_tokens += fact.prompt_tokens
        tally.completion_tokens += len(sample.token_ids)
        tally.stopped += sample.stop_token_id is not None
        tally.empty += not text
        tally.truncated += fact.truncated
        count(tally.finish_reasons, reason)
    columns: dict[str, Any] = {
        "infill": pa.array([text for text, _ in infills], pa.string()),
        "finish_reason": pa.array([reason for _, reason in infills], pa.string()),
        "prompt_tokens": pa.array([f.prompt_tokens for f in facts], pa.int32()),
        "completion_tokens": pa.array([len(s.token_ids) for s in samples], pa.int32()),
        "prefix_chars": pa.array([f.prefix_chars for f in facts], pa.int32()),
        "suffix_chars": pa.array([f.suffix_chars for f in facts], pa.int32()),
        "truncated": pa.array([f.truncated for f in facts], pa.bool_()),
        "sample": pa.array([s.sample for s in samples], pa.int32()),
    }
    extra = {
        "mean_logprob": lambda: pa.array([s.mean_logprob for s in samples], pa.float32()),
        "token_ids": lambda: token_lists(samples),
        "source_file": lambda: pa.array([name for name, _ in sources], pa.string()),
        "source_row": lambda: pa.array([row for _, row in sources], pa.int64()),
    }
    return columns | {name: extra[name]() for name in spec.extra_columns}


def _finish(spec: JobSpec, fmt: Format, sample: Sample, prefix: str, suffix: str | None) -> tuple[str, str]:
    until = suffix_beginning(suffix) if spec.stop_at_suffix else None
    infill = fmt.infill(sample.token_ids, stop_token_id=sample.stop_token_id, stop=spec.stop, until=until)
    text, reason = infill.text, infill.finish_reason
    for name in spec.trim:
        trimmed = TRIMMINGS[name](text, prefix, suffix or "")
        if name in OVERLAPS and trimmed != text:
            reason = "overlap"
        text = trimmed
    return text, reason
