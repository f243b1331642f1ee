"""Likelihood: from a row to what an engine must score, and from its answers to the columns of the output. Pure."""

import array
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from jobs.journal import Sample
from jobs.rows import PromptFacts, role_values, text_error
from jobs.spec import JobSpec
from jobs.tally import Tally
from jobs.windows import SPARE
from serving.errors import ConfigError, InputError, PromptTooLongError, SpanfillError
from serving.formats import Format, Ids, Prompt
from serving.protocol import Sampling

SCORING = Sampling(max_tokens=SPARE, ignore_eos=True, prompt_logprobs=True)
"""Nothing is wanted but the prompt's logarithms."""

KINDS = {"middle": ("prefix", "suffix", "middle"), "text": ("text",)}
"""What can be scored, and the roles of each."""


def settle_columns(spec: JobSpec, present: Sequence[str]) -> JobSpec:
    """The job with the columns of what it scores alone, a middle or a text: what the user named, else what is there.

    ``present`` are the input's columns. Raises ``InputError`` where there is neither or both.
    """
    named = [kind for kind, roles in KINDS.items() if any(spec.columns.get(role) for role in roles)]
    found = named or [kind for kind in KINDS if spec.column(kind) in present]
    if len(found) > 1:
        raise InputError(
            "a middle and a text are there, either could be scored.",
            remedy="Leave one out: --column text= or --column middle=.",
        )
    if not found:
        raise InputError(
            f"nothing to score is there, no column middle and no column text; the input has {', '.join(present)}.",
            remedy="Name the column that holds it: --column middle=NAME or --column text=NAME.",
        )
    if spec.score_end and found == ["text"]:
        raise InputError("a plain text has no end of an infill to score.", remedy="Leave --score-end out.")
    others = [role for kind, roles in KINDS.items() if kind not in found for role in roles]
    return spec.model_copy(update={"columns": spec.columns | dict.fromkeys(others, "")})


def check_logprobs_mode(arguments: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an engine argument that puts logits where scoring takes logarithms."""
    mode = str(arguments.get("logprobs_mode", ""))
    if mode.endswith("logits"):
        raise ConfigError(
            f"engine argument logprobs_mode = {mode!r} gives no logarithms to score with.", remedy="Leave it out."
        )


def score_prompts(
    spec: JobSpec, fmt: Format, max_context: int, batch: pa.RecordBatch
) -> list[tuple[Any, Prompt | SpanfillError]]:
    """As ``jobs.rows.row_prompts``: the prompts end with what is to be scored, and a text may be longer than a context.

    The columns of the job must be settled.
    """
    values = {role: role_values(spec, batch, role) for role in spec.roles}
    errors = [_row_error(spec, values, row) for row in range(batch.num_rows)]
    good = [row for row, error in enumerate(errors) if error is None]
    texts = {role: [values[role][row] for row in good] for role in ("prefix", "suffix", *spec.required_roles)}
    if "middle" in texts:
        pairs = list(zip(texts["prefix"], texts["suffix"], strict=True))
        prompts = iter(middle_prompts(spec, fmt, max_context, pairs, texts["middle"]))
    else:
        prompts = iter(text_prompts(fmt, texts["text"]))
    return [(identity, error or next(prompts)) for identity, error in zip(values["id"], errors, strict=True)]


def _row_error(spec: JobSpec, values: Mapping[str, Sequence[Any]], row: int) -> InputError | None:
    required = spec.required_roles
    found = (text_error(spec, role, column[row], required=role in required) for role, column in values.items())
    return next(filter(None, found), None)


def text_prompts(fmt: Format, texts: Sequence[str]) -> list[Prompt | SpanfillError]:
    """Each text behind the token that begins a document, BOS or else EOS; a text's error in its place."""
    begin = fmt.prompt("", max_tokens=1)
    encoded = fmt.tokenizer.encode_arrays(texts)
    return [ids if isinstance(ids, SpanfillError) else _behind(begin, ids) for ids in encoded]


def middle_prompts(
    spec: JobSpec, fmt: Format, max_context: int, pairs: Sequence[tuple[str, str | None]], middles: Sequence[str]
) -> list[Prompt | SpanfillError]:
    """Each middle behind the infill prompt of its prefix and suffix; a row's error in its place."""
    prompts, encoded = fmt.prompt_batch(pairs, max_tokens=1), fmt.completions(middles)
    found: list[Prompt | SpanfillError] = []
    for pair, prompt, ids in zip(pairs, prompts, encoded, strict=True):
        if isinstance(ids, SpanfillError):
            found.append(ids)
            continue
        scored = ids + array.array("i", [fmt.end_token_id]) if spec.score_end else ids
        fitting = _fitting(spec, fmt, max_context, pair, prompt, len(scored))
        found.append(_behind(fitting, scored) if isinstance(fitting, Prompt) else fitting)
    return found


def _fitting(
    spec: JobSpec,
    fmt: Format,
    max_context: int,
    pair: tuple[str, str | None],
    prompt: Prompt | SpanfillError,
    scored: int,
) -> Prompt | SpanfillError:
    """The prompt, cut as an infill's is where it is too long for ``scored`` tokens and the one that an engine makes."""
    room = scored + SPARE
    if isinstance(prompt, SpanfillError) or len(prompt.token_ids) + room <= max_context:
        return prompt
    if fmt.control_count + room >= max_context:
        return PromptTooLongError(
            f"the middle of {scored:,} tokens leaves no room for a prompt in a context of {max_context:,}.",
            remedy="Score a shorter one, or the whole as a plain text.",
        )
    (cut,) = fmt.prompt_batch(
        [pair],
        max_tokens=room,
        max_context=max_context,
        prefix_align=spec.prefix_align,
        suffix_share=spec.suffix_share,
    )
    return cut


def _behind(prompt: Prompt, ids: Ids) -> Prompt:
    joined = array.array("i", prompt.token_ids)
    joined.extend(ids)
    return replace(prompt, token_ids=joined, scored=len(ids))


def nothing_scored(row: int) -> Sample:
    """The sample of a row without a token to score, for which no engine need be asked."""
    return Sample(row, 0, [], sum_logprob=0.0, attempts=0)


def score_columns(
    spec: JobSpec,
    facts: Sequence[PromptFacts],
    samples: Sequence[Sample],
    texts: Sequence[str],
    sources: Sequence[tuple[str, int]],
    tally: Tally,
) -> dict[str, Any]:
    """The added columns, one value a row, and their sums in ``tally``; all sequences run in parallel.

    ``texts`` are what was scored. Without a token there is no mean, without a byte no bits per byte: null.
    """
    sizes = [len(text.encode()) for text in texts]
    _add_up(facts, samples, sizes, tally)
    told = [(sample.sum_logprob or 0.0, sample.scored) for sample in samples]
    columns = {
        "sum_logprob": pa.array([value for value, _ in told], pa.float64()),
        "mean_logprob": pa.array([_mean(value, tokens) for value, tokens in told], pa.float32()),
        "tokens": pa.array([tokens for _, tokens in told], pa.int32()),
        "bits_per_byte": pa.array(
            [_bits_per_byte(value, size) for (value, _), size in zip(told, sizes, strict=True)], pa.float32()
        ),
    }
    extra = {
        "truncated": lambda: pa.array([fact.truncated for fact in facts], pa.bool_()),
        "source_file": lambda: pa.array([name for name, _ in sources], pa.string()),
        "source_row": lambda: pa.array([row for _, row in sources], pa.int64()),
    }
    return columns | {name: extra[name]() for name in spec.extra_columns}


def _add_up(facts: Sequence[PromptFacts], samples: Sequence[Sample], sizes: Sequence[int], tally: Tally) -> None:
    tally.samples += len(samples)
    for fact, sample, size in zip(facts, samples, sizes, strict=True):
        tally.prompt_tokens += fact.prompt_tokens
        tally.truncated += fact.truncated
        tally.scored_tokens += sample.scored
        tally.scored_bytes += size
        tally.sum_logprob += sample.sum_logprob or 0.0


def score_totals(total: Tally) -> dict[str, Any]:
    """What the manifest says of all scored texts together: their tokens, and the means over tokens and over bytes."""
    return {
        "scored_tokens": total.scored_tokens,
        "mean_logprob": _mean(total.sum_logprob, total.scored_tokens),
        "bits_per_byte": _bits_per_byte(total.sum_logprob, total.scored_bytes),
    }


def _mean(logprob: float, tokens: int) -> float | None:
    return logprob / tokens if tokens else None


def _bits_per_byte(logprob: float, size: int) -> float | None:
    """-sum_logprob / ln 2 / UTF-8 bytes, as the Language Model Evaluation Harness has it (github.com/EleutherAI)."""
    return -logprob / math.log(2) / size if size else None
