"""What llama.cpp's clients read of an infill."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from serving.api.ask import Answer, Ask, End, Reason, Timing, Usage

StopType = Literal["none", "eos", "limit", "word"]

STOP_TYPES: dict[Reason, StopType] = {"eom": "eos", "eos": "eos", "stop": "word", "length": "limit", "time": "limit"}


class Timings(BaseModel):
    """Tokens, and how long they took; ``prompt_n`` are those that were computed, ``cache_n`` those that were not."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class Infilled(BaseModel):
    """An infill, or the end of a streamed one.

    ``tokens_evaluated`` are the prompt's, ``tokens_cached`` those of them that the prefix cache held.
    """

    index: int = 0
    content: str
    tokens: list[int] = []
    id_slot: int = 0
    stop: bool = True
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: dict[str, Any]
    prompt: str
    has_new_line: bool
    truncated: bool
    stop_type: StopType
    stopping_word: str
    tokens_cached: int
    timings: Timings


def infilled(
    content: str, told: Answer | End, ask: Ask, model: str, *, has_new_line: bool, reason: Reason, stop_word: str
) -> Infilled:
    """The answer to ``ask``, or with its streamed text told before, its end."""
    return Infilled(
        content=content,
        model=model,
        tokens_predicted=told.usage.completion_tokens,
        tokens_evaluated=told.usage.prompt_tokens,
        generation_settings=_settings(ask),
        prompt=told.prompts[0] if told.prompts else "",
        has_new_line=has_new_line,
        truncated=told.truncated,
        stop_type=STOP_TYPES[reason],
        stopping_word=stop_word,
        tokens_cached=told.usage.cached_tokens,
        timings=_timings(told.usage, told.timing),
    )


def _settings(ask: Ask) -> dict[str, Any]:
    decoding = ask.decoding
    return {
        "n_predict": ask.max_tokens,
        "seed": -1 if ask.seed is None else ask.seed,
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "min_p": decoding.min_p,
        "presence_penalty": decoding.presence_penalty,
        "frequency_penalty": decoding.frequency_penalty,
        "repeat_penalty": decoding.repetition_penalty,
        "stop": list(ask.stop),
    }


def _timings(usage: Usage, timing: Timing) -> Timings:
    computed, made = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    return Timings(
        cache_n=usage.cached_tokens,
        prompt_n=computed,
        prompt_ms=1_000 * timing.prompt,
        prompt_per_token_ms=_ratio(1_000 * timing.prompt, computed),
        prompt_per_second=_ratio(computed, timing.prompt),
        predicted_n=made,
        predicted_ms=1_000 * timing.completion,
        predicted_per_token_ms=_ratio(1_000 * timing.completion, made),
        predicted_per_second=_ratio(made, timing.completion),
    )


def _ratio(amount: float, by: float) -> float:
    return amount / by if by else 0.0


def picked(values: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """``response_fields``: what ``timings/prompt_n`` leads to, under that very name; what leads nowhere is left out."""
    found = {}
    for path in paths:
        value: Any = values
        for step in path.split("/"):
            value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            found[path] = value
    return found
