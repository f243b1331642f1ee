"""Mistral's ``/v1/fim/completions``, as its own client and Continue use it.

Where a client sends no temperature the answer is greedy: Mistral's default depends on the model. Without ``max_tokens``
an answer ends at ``OPEN_END`` tokens. A ``suffix`` of null is a causal completion, an empty one an infill at the end of
the text. No chunk is without a choice: Continue breaks on one, so the usage comes with the end of the choice.
"""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from serving.api.ask import Answer, Ask, Decoding, End, Piece, Reason, ServedModel, Service
from serving.api.events import DONE, SSE, Stream, described, event, stream
from serving.api.fields import Flag, Integer, Name, Sampled, Text, Tokens, decoding, stop_words, within
from serving.api.parts import FINISH, Finish, TokenUsage, WhoCalls, new_id, token_usage
from serving.api.replies import POSTED, apology, documented
from serving.tenants.caller import Caller

DEFAULT = Decoding()


class FimRequest(Sampled):
    """Mistral's FIM request; ``metadata`` and unknown fields are ignored."""

    model: Name | None = None
    prompt: Text
    suffix: Text | None = None
    max_tokens: Tokens | None = None
    min_tokens: Tokens | None = None
    seed: Integer | None = Field(None, alias="random_seed")
    stream: Flag | None = None


class FimMessage(BaseModel):
    """The infill."""

    role: Literal["assistant"] = "assistant"
    content: str


class FimChoice(BaseModel):
    """The one choice; ``spanfill_reason`` tells eom from eos and time from length."""

    index: int = 0
    message: FimMessage
    finish_reason: Finish
    spanfill_reason: Reason


class FimCompletion(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[FimChoice]
    usage: TokenUsage


class FimDelta(BaseModel):
    """The next part of the choice, or its end."""

    index: int = 0
    delta: FimMessage
    finish_reason: Finish | None = None
    spanfill_reason: Reason | None = None


class FimChunk(BaseModel):
    """A part of a streamed answer; the last one has the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[FimDelta]
    usage: TokenUsage | None = None


def ask_of(sent: FimRequest, model: ServedModel) -> Ask:
    """What is asked."""
    tokens = sent.max_tokens
    if tokens is None or tokens >= model.context:  # Continue asks for 4,096 of whatever model.
        tokens = within(tokens, model.context)
    return Ask(
        prefix=sent.prompt,
        suffix=sent.suffix,
        max_tokens=tokens,
        seed=sent.seed,
        stop=stop_words(sent.stop),
        decoding=decoding(sent, DEFAULT, min_tokens=min(sent.min_tokens or 0, tokens)),
    )


def _whole(answer: Answer, model: str) -> FimCompletion:
    choice = answer.choices[0]
    told = FimChoice(
        message=FimMessage(content=choice.text), finish_reason=FINISH[choice.reason], spanfill_reason=choice.reason
    )
    usage = token_usage(answer.usage)
    return FimCompletion(id=new_id("fim"), created=int(time.time()), model=model, choices=[told], usage=usage)


class _Chunks:
    """The chunks of one stream; the end of the choice waits for the usage."""

    def __init__(self, model: str) -> None:
        self._model, self._id, self._created = model, new_id("fim"), int(time.time())
        self._reason: Reason = "length"

    def events(self, part: Piece | End) -> list[str]:
        """The chunk of a part."""
        if isinstance(part, End):
            message = FimMessage(content="")
            last = FimDelta(delta=message, finish_reason=FINISH[self._reason], spanfill_reason=self._reason)
            return [self._chunk(last, token_usage(part.usage)), DONE]
        self._reason = part.reason or self._reason
        return [self._chunk(FimDelta(delta=FimMessage(content=part.text)))] if part.text else []

    def _chunk(self, delta: FimDelta, usage: TokenUsage | None = None) -> str:
        chunk = FimChunk(id=self._id, created=self._created, model=self._model, choices=[delta], usage=usage)
        return event(chunk.model_dump(exclude=None if usage else {"usage"}))


COMPLETED: dict[int | str, dict[str, Any]] = {
    **described(SSE, "The infill; streamed: `chat.completion.chunk` events with `delta`, then `data: [DONE]`."),
    **documented(*POSTED),
}


def router(service: Service, caller: WhoCalls) -> APIRouter:
    """The route; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["Mistral"])

    @routes.post("/v1/fim/completions", response_model=FimCompletion, responses=COMPLETED)
    async def fim(sent: FimRequest, who: Annotated[Caller, Depends(caller)]) -> FimCompletion | Stream:
        """Infill between `prompt` and `suffix`."""
        model = service.model(sent.model, who)
        asks = [ask_of(sent, model)]
        if sent.stream:
            return await stream(service.stream(asks, who, model.name), _Chunks(model.name).events, apology)
        return _whole(await service.answer(asks, who, model.name), model.name)

    return routes
