"""OpenAI's completions and models, and DeepSeek's FIM beta, which has the same shape.

Where a client sends no temperature it is 1, OpenAI's documented default. A ``suffix`` of null is a causal completion,
an empty one an infill at the end of the text. vLLM's fields for sampling count; ``user``, ``cache_salt``, ``priority``
and whatever else is sent do not.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from serving.api.ask import Answer, Ask, Choice, Decoding, End, Piece, Reason, Service
from serving.api.events import DONE, SSE, described, event, stream
from serving.api.fields import (
    INTEGRAL,
    MOST_TOKENS,
    Flag,
    Name,
    Number,
    Repetition,
    Sampled,
    Text,
    Tokens,
    decoding,
    said,
    stop_words,
)
from serving.api.listing import ModelCard, ModelCards, card_of, usable
from serving.api.logprobs import Logprobs, logprobs_of
from serving.api.parts import FINISH, Finish, TokenUsage, WhoCalls, new_id, token_usage
from serving.api.replies import POSTED, READ, apology, documented
from serving.tenants.caller import Caller

MOST_PROMPTS = 128
MOST_SAMPLES = 128
MOST_BIASES = 1_024
MAX_TOKENS = 16
"""OpenAI's default."""

DEFAULT = Decoding(temperature=1.0)

TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
Prompts = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)],
    said(f"a string, a list of token ids, or a list of 1 to {MOST_PROMPTS} of either"),
]
Samples = Annotated[int, Field(strict=True, ge=1, le=MOST_SAMPLES), INTEGRAL]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]],
    Field(max_length=MOST_BIASES),
    said(f"an object of at most {MOST_BIASES} token ids with numbers from -100 to 100"),
]


class StreamOptions(BaseModel):
    """What a stream tells besides its choices."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: Flag | None = None


class CompletionRequest(Sampled):
    """OpenAI's legacy completion with vLLM's additions; ``n`` samples of each prompt, ``best_of`` as many."""

    model: Name | None = None
    prompt: Prompts | None
    suffix: Text | None = None
    max_tokens: Tokens | None = None
    n: Samples | None = None
    best_of: Samples | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=5), INTEGRAL] | None = None
    echo: Flag | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    logit_bias: LogitBias | None = None
    repetition_penalty: Repetition | None = None
    min_tokens: Tokens | None = None
    ignore_eos: Flag | None = None

    @field_validator("best_of")
    @classmethod
    def _is_n(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of not in (None, info.data.get("n") or 1):
            raise PydanticCustomError("best_of", "Input should equal n, because only what is returned is made")
        return best_of

    @field_validator("suffix")
    @classmethod
    def _is_of_text(cls, suffix: str | None, info: ValidationInfo) -> str | None:
        prompt = info.data.get("prompt")
        if suffix is not None and isinstance(prompt, list) and not isinstance(prompt[0], str):
            raise PydanticCustomError("suffix", "Input should be null with a prompt of token ids, which are used as is")
        return suffix


class CompletionChoice(BaseModel):
    """One completion, or the next part of it; ``spanfill_reason`` tells eom from eos and time from length."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Finish | None
    spanfill_reason: Reason | None


class Completion(BaseModel):
    """An answer; a stream's chunks have the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None


def asks_of(sent: CompletionRequest) -> list[Ask]:
    """One ask for each prompt."""
    tokens = MAX_TOKENS if sent.max_tokens is None else sent.max_tokens
    biases = tuple((int(token), bias) for token, bias in (sent.logit_bias or {}).items())
    ask = Ask(
        suffix=sent.suffix,
        max_tokens=tokens,
        n=sent.n or 1,
        seed=sent.seed,
        stop=stop_words(sent.stop),
        decoding=decoding(sent, DEFAULT, min_tokens=min(sent.min_tokens or 0, tokens), logit_bias=biases),
        logprobs=sent.logprobs,
        echo=bool(sent.echo),
    )
    return [
        replace(ask, prefix=prompt) if isinstance(prompt, str) else replace(ask, token_ids=prompt)
        for prompt in _prompts(sent.prompt or "")
    ]


def _prompts(prompt: str | Sequence[str | int | list[int]]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = tuple(item for item in prompt if isinstance(item, int))
    if ids:
        return [ids]
    return [item if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)]


def _choice(index: int, part: Piece | Choice, *, logprobs: bool) -> CompletionChoice:
    return CompletionChoice(
        index=index,
        text=part.text,
        logprobs=logprobs_of(part.tokens) if logprobs else None,
        finish_reason=FINISH[part.reason] if part.reason else None,
        spanfill_reason=part.reason,
    )


@dataclass(frozen=True, slots=True)
class _Telling:
    """How one request's answer is told, whole or in chunks; ``usage`` is whether a stream ends with it."""

    model: str
    logprobs: bool
    usage: bool
    id: str
    created: int

    def whole(self, answer: Answer) -> Completion:
        """The answer at once."""
        choices = [_choice(index, each, logprobs=self.logprobs) for index, each in enumerate(answer.choices)]
        return self._completion(choices, token_usage(answer.usage))

    def encoded(self, answer: Answer) -> bytes:
        """The answer at once, as JSON, encoded choice by choice: while one is encoded no other thread can run."""
        choices = (_choice(index, each, logprobs=self.logprobs) for index, each in enumerate(answer.choices))
        texts = ",".join(choice.model_dump_json() for choice in choices)
        around = self._completion([], token_usage(answer.usage)).model_dump_json()
        return around.replace('"choices":[]', f'"choices":[{texts}]').encode()

    def events(self, part: Piece | End) -> list[str]:
        """The chunk of a part; a chunk without choices has the usage and comes only where it was asked for."""
        if isinstance(part, End):
            return [self._chunk([], token_usage(part.usage)), DONE] if self.usage else [DONE]
        if not (part.text or part.tokens or part.reason):
            return []
        return [self._chunk([_choice(part.index, part, logprobs=self.logprobs)], None)]

    def _chunk(self, choices: list[CompletionChoice], usage: TokenUsage | None) -> str:
        return event(self._completion(choices, usage).model_dump(exclude=None if self.usage else {"usage"}))

    def _completion(self, choices: list[CompletionChoice], usage: TokenUsage | None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def _telling(sent: CompletionRequest, model: str) -> _Telling:
    usage = sent.stream_options is not None and bool(sent.stream_options.include_usage)
    return _Telling(model, sent.logprobs is not None, usage, new_id("cmpl"), int(time.time()))


COMPLETED: dict[int | str, dict[str, Any]] = {
    **described(SSE, "The completions; streamed: events of the same shape, then `data: [DONE]`."),
    **documented(*POSTED),
}


def router(service: Service, caller: WhoCalls) -> APIRouter:
    """The routes; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", response_model=Completion, responses=COMPLETED)
    @routes.post("/beta/completions", response_model=Completion, responses=COMPLETED)
    async def complete(sent: CompletionRequest, who: Annotated[Caller, Depends(caller)]) -> Completion | Response:
        """Complete prompts, or infill between each of them and the suffix; `max_tokens` 0 with `echo` scores them."""
        model = service.model(sent.model, who).name
        asks, telling = asks_of(sent), _telling(sent, model)
        if sent.stream:
            return await stream(service.stream(asks, who, model), telling.events, apology)
        answer = await service.answer(asks, who, model)
        if not telling.logprobs:
            return telling.whole(answer)
        # Those of a thousand choices take seconds: not on the loop that others' tokens come by.
        return Response(await asyncio.to_thread(telling.encoded, answer), media_type="application/json")

    @routes.get("/v1/models", response_model=ModelCards, responses=documented(*READ))
    async def models(who: Annotated[Caller, Depends(caller)]) -> ModelCards:
        """The models that the key may use, the default first."""
        return ModelCards(data=[card_of(model) for model in usable(service, who)])

    @routes.get("/v1/models/{name:path}", response_model=ModelCard, responses=documented(400, *READ))
    async def model(name: Annotated[str, Path(min_length=1)], who: Annotated[Caller, Depends(caller)]) -> ModelCard:
        """One model."""
        return card_of(service.model(name, who))

    return routes
