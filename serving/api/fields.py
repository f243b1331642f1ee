"""Fields that clients of several dialects send: their types and bounds, and what is made of them.

Fields that no dialect names are accepted and ignored, as the servers do for which these clients were written, and null
is as good as absent. A value of a wrong type is refused, never converted: no text for a number, no number for a flag.
Lists and numbers are bounded here, texts by the size of the body.
"""

from dataclasses import fields, replace
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from serving.api.ask import Decoding

MOST_STOPS = 16
MOST_STOP_CHARS = 256
MOST_NAME_CHARS = 256

MOST_TOKENS = 1_048_576
"""Token ids of one prompt, and tokens of an answer, that may be asked for; a model's context is the closer bound."""

OPEN_END = 256
"""Tokens of an answer whose client sets no end, where its own server would go on to the end of the context."""

DECODED = {field.name for field in fields(Decoding)} - {"logit_bias"}


def said(wanted: str) -> WrapValidator:
    """One message for whatever is wrong with a field; a union alone would give one for each of its members."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("wrong_value", "Input should be {wanted}", {"wanted": wanted}) from None

    return WrapValidator(validate)


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "Input should hold no half of a surrogate pair") from None
    return text


def _integral(value: Any) -> Any:
    """``1.0`` is an integer in JSON, and some languages write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


INTEGRAL = BeforeValidator(_integral)

Text = Annotated[str, AfterValidator(_whole)]
Name = Annotated[str, Field(max_length=MOST_NAME_CHARS), AfterValidator(_whole)]
Flag = Annotated[bool, Field(strict=True)]
Integer = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1), INTEGRAL]
Tokens = Annotated[int, Field(strict=True, ge=0, le=MOST_TOKENS), INTEGRAL]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Repetition = Annotated[Number, Field(ge=0.01, le=10)]
"""Not down to 0: an engine divides by it, and what is no number in its logits may end it."""

Temperature = Annotated[Number, Field(ge=0, le=2)]
"""vLLM's bounds."""

StopWord = Annotated[str, Field(max_length=MOST_STOP_CHARS), AfterValidator(_whole)]
Stop = Annotated[
    StopWord | Annotated[list[StopWord], Field(max_length=MOST_STOPS, fail_fast=True)],
    said(f"a string, or a list of at most {MOST_STOPS}, of at most {MOST_STOP_CHARS} characters each"),
]


class Sampled(BaseModel):
    """How to decode, as most dialects spell it; meanings are those of ``Decoding``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Integer | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Integer | None = None
    stop: Stop | None = None


def decoding(sent: Sampled, default: Decoding, **more: Any) -> Decoding:
    """The ``default``, changed by what was sent and by ``more``.

    A ``top_k`` below 1 is none. ``top_p`` 0 leaves the likeliest token alone, which is greedy decoding.
    """
    given = sent.model_dump(include=DECODED, exclude_none=True) | more
    if "top_k" in given:
        given["top_k"] = min(max(0, given["top_k"]), 2**31 - 1)
    if given.get("top_p") == 0:
        given |= {"temperature": 0.0, "top_p": 1.0}
    return replace(default, **given)


def stop_words(stop: str | list[str] | None) -> tuple[str, ...]:
    """The strings that end an answer; an empty one ends nothing."""
    words = [stop] if isinstance(stop, str) else stop or []
    return tuple(word for word in words if word)


def seed_of(seed: int | None) -> int | None:
    """A seed as llama.cpp and Ollama read it: a negative one, or -1 in 32 bits, is none."""
    return None if seed is None or seed < 0 or seed == 2**32 - 1 else seed


def within(tokens: int | None, context: int) -> int:
    """Tokens of an answer at most: ``tokens`` or ``OPEN_END``, but no more than half of the model's context."""
    return min(OPEN_END if tokens is None else tokens, context // 2)
