"""The endpoints that a batch may name: what a line's body asks there, and the body of its answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from jobs.spec import PENALTIES, SAMPLED
from serving.api.ask import Answer, Ask, Decoding, ServedModel
from serving.api.mistral import FimChoice, FimCompletion, FimMessage, FimRequest, ask_of
from serving.api.openai import Completion, CompletionChoice, CompletionRequest, asks_of
from serving.api.parts import FINISH, token_usage
from serving.errors import ConfigError, UsageError
from serving.formats import Format

Sent = TypeVar("Sent", bound=BaseModel)

JOB_DECODING = ("temperature", "top_p", *SAMPLED, *PENALTIES)
"""The fields of ``Decoding`` that a job knows."""

WHOLE_REMEDY = "Leave it out, or send the request by itself."


@dataclass(frozen=True, slots=True)
class Heading:
    """What an answer says of itself; its id gets the endpoint's beginning."""

    id: str
    created: int
    model: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """``asks`` raises ``RequestValidationError`` as the endpoint does, and ``UsageError`` for a stream."""

    asks: Callable[[Mapping[str, Any], ServedModel], list[Ask]]
    body: Callable[[Answer, Heading], BaseModel]


def completion_asks(body: Mapping[str, Any], _: ServedModel) -> list[Ask]:
    """What a body asks of ``/v1/completions``."""
    sent = _checked(CompletionRequest, body)
    _refuse_stream(sent.stream)
    return asks_of(sent)


def completion_body(answer: Answer, heading: Heading) -> Completion:
    """The body of an answer of ``/v1/completions``."""
    choices = [
        CompletionChoice(
            index=index,
            text=choice.text,
            logprobs=None,
            finish_reason=FINISH[choice.reason],
            spanfill_reason=choice.reason,
        )
        for index, choice in enumerate(answer.choices)
    ]
    usage = token_usage(answer.usage, knows_cached=False)
    return Completion(
        id=f"cmpl-{heading.id}", created=heading.created, model=heading.model, choices=choices, usage=usage
    )


def fim_asks(body: Mapping[str, Any], model: ServedModel) -> list[Ask]:
    """What a body asks of ``/v1/fim/completions``."""
    sent = _checked(FimRequest, body)
    _refuse_stream(sent.stream)
    return [ask_of(sent, model)]


def fim_body(answer: Answer, heading: Heading) -> FimCompletion:
    """The body of an answer of ``/v1/fim/completions``."""
    choice = answer.choices[0]
    told = FimChoice(
        message=FimMessage(content=choice.text), finish_reason=FINISH[choice.reason], spanfill_reason=choice.reason
    )
    usage = token_usage(answer.usage, knows_cached=False)
    return FimCompletion(
        id=f"fim-{heading.id}", created=heading.created, model=heading.model, choices=[told], usage=usage
    )


DIALECTS = {
    "/v1/completions": Dialect(completion_asks, completion_body),
    "/v1/fim/completions": Dialect(fim_asks, fim_body),
}


def check_ask(ask: Ask, fmt: Format, context: int) -> None:
    """Raise ``UsageError`` for what a request by itself may ask and a line of a batch may not, or cannot."""
    unknown = [
        *(
            f.name
            for f in fields(Decoding)
            if f.name not in JOB_DECODING and getattr(ask.decoding, f.name) != f.default
        ),
        *(["logprobs"] if ask.logprobs is not None else []),
        *(["echo"] if ask.echo else []),
        *(["a prompt of token ids"] if ask.token_ids is not None else []),
    ]
    if unknown:
        raise UsageError(f"a batch does not know {', '.join(unknown)}.", remedy=WHOLE_REMEDY)
    _check_lengths(ask, fmt, context)


def _check_lengths(ask: Ask, fmt: Format, context: int) -> None:
    if ask.max_tokens < 1:
        raise UsageError("max_tokens is 0, which generates nothing.", remedy="Ask for 1 at least.")
    if ask.n > 1 and ask.decoding.temperature == 0:
        raise UsageError("n > 1 at temperature 0 would repeat one completion.", remedy="Set temperature, or n to 1.")
    if ask.suffix is not None and not fmt.can_infill:
        raise UsageError("the model cannot infill.", remedy="Leave the suffix out.")
    try:
        fmt.check_budget(ask.max_tokens, context)
    except ConfigError as error:
        raise UsageError(error.message, remedy="Ask for fewer max_tokens.") from None


def _refuse_stream(stream: bool | None) -> None:
    if stream:
        raise UsageError("a batch does not stream.", remedy="Leave stream out.")


def _checked(kind: type[Sent], body: Mapping[str, Any]) -> Sent:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        told = error.errors(include_url=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in told]) from None
