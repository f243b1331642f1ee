"""llama.cpp's ``/infill``, as its plug-ins for Vim and VS Code use it.

Where a client sends no temperature the answer is greedy. llama.cpp would take 0.8, but the plug-ins send none, name
samplers without it, and want the same answer to the same text. ``samplers``, ``cache_prompt``, ``id_slot``, ``lora``,
``t_max_prompt_ms`` and unknown fields are accepted and change nothing: the prefix cache is always on. An answer is one
line of compact JSON, because the Vim plug-in looks for ``"content":"``.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field

from serving.api.ask import Answer, Ask, Choice, Decoding, End, Piece, Reason, ServedModel, Service
from serving.api.bodies import JsonRoute
from serving.api.events import SSE, described, encoded, event, stream
from serving.api.fields import (
    Flag,
    Integer,
    Name,
    Number,
    Repetition,
    Sampled,
    Text,
    decoding,
    seed_of,
    stop_words,
    within,
)
from serving.api.infilled import Infilled, infilled, picked
from serving.api.margin import Margin
from serving.api.parts import WhoCalls
from serving.api.replies import POSTED, LlamaCppErrorReply, documented, llamacpp_error, problem_of
from serving.errors import NoInfillError, SpanfillError
from serving.tenants.caller import Caller

MOST_EXTRA = 1_024
MOST_RESPONSE_FIELDS = 128

DEFAULT = Decoding()

SNIPPET = "\n\n--- snippet ---\n\n"
"""What llama.cpp puts before each piece of extra context where a model has no token for it."""


class NotSupportedError(NoInfillError):
    """As ``NoInfillError``: llama.cpp's clients know it by this status."""

    http_status = 501


class ExtraText(BaseModel):
    """A piece of context from elsewhere; its file name and time are not used."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    text: Text


class InfillRequest(Sampled):
    """llama.cpp's infill request; ``prompt`` is what stands before the cursor in its line.

    ``n_predict`` 0 only computes the prompt; below 0 or absent it is ``OPEN_END``. Times are in milliseconds.
    """

    model: Name | None = None
    input_prefix: Text
    input_suffix: Text
    input_extra: Annotated[list[ExtraText], Field(max_length=MOST_EXTRA, fail_fast=True)] | None = None
    prompt: Text | None = None
    n_predict: Integer | None = None
    n_indent: Integer | None = None
    t_max_predict_ms: Number | None = None
    repetition_penalty: Repetition | None = Field(None, alias="repeat_penalty")
    stream: Flag | None = None
    response_fields: Annotated[list[Name], Field(max_length=MOST_RESPONSE_FIELDS, fail_fast=True)] | None = None


def ask_of(sent: InfillRequest, model: ServedModel) -> Ask:
    """What is asked: the extra context before the prefix, the prompt behind the middle token."""
    extra = "".join(SNIPPET + each.text for each in sent.input_extra or ())
    open_ended = sent.n_predict is None or sent.n_predict < 0
    limit = sent.t_max_predict_ms or 0
    return Ask(
        prefix=extra + sent.input_prefix,
        suffix=sent.input_suffix,
        behind=sent.prompt or "",
        max_tokens=within(None if open_ended else sent.n_predict, model.context),
        seed=seed_of(sent.seed),
        stop=stop_words(sent.stop),
        decoding=decoding(sent, DEFAULT),
        seconds=limit / 1_000 if limit > 0 else None,
        indent=max(0, sent.n_indent or 0),
        reported=True,
    )


class _Telling:
    """How one request's answer is told, whole or in events; its text ends where it leaves its block."""

    def __init__(self, sent: InfillRequest, ask: Ask, model: str) -> None:
        self._fields = sent.response_fields
        self._ask, self._model = ask, model
        self._margin = Margin(ask.indent)
        self._new_line = False
        self._reason: Reason = "length"
        self._stop_word = ""

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer at once, or the fields of it that were asked for."""
        return self._end(self._take(answer.choices[0]), answer)

    def events(self, part: Piece | End) -> list[str]:
        """The event of a part; the last one holds all but the text, or what of it was asked for."""
        if isinstance(part, End):
            return [event(self._end("", part))]
        kept = self._take(part)
        return [event({"index": 0, "content": kept, "tokens": [], "stop": False, "id_slot": 0})] if kept else []

    def _take(self, part: Piece | Choice) -> str:
        kept = self._margin.keep(part.text)
        self._new_line = self._new_line or "\n" in kept
        if self._margin.crossed:
            self._reason, self._stop_word = "length", ""
        elif part.reason:
            self._reason, self._stop_word = part.reason, part.stop_word
        return kept

    def _end(self, content: str, told: Answer | End) -> dict[str, Any]:
        end = infilled(
            content,
            told,
            self._ask,
            self._model,
            has_new_line=self._new_line,
            reason=self._reason,
            stop_word=self._stop_word,
        ).model_dump()
        return picked(end, self._fields) if self._fields else end


def _apology(error: SpanfillError) -> str:
    return event(llamacpp_error(problem_of(error)))


ANSWERED: dict[int | str, dict[str, Any]] = {
    **described(
        SSE, "The infill, or the fields of it that were asked for; streamed: events, those fields in the last."
    ),
    **documented(*POSTED, 501, model=LlamaCppErrorReply),
}


def router(service: Service, caller: WhoCalls) -> APIRouter:
    """The route; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["llama.cpp"], route_class=JsonRoute)

    @routes.post("/infill", response_model=Infilled | dict[str, Any], responses=ANSWERED)
    async def infill(sent: InfillRequest, who: Annotated[Caller, Depends(caller)]) -> Response:
        """Infill between `input_prefix` with `prompt`, and `input_suffix`."""
        model = service.model(sent.model, who)
        if not model.can_infill:
            raise NotSupportedError(f"{model.name} cannot infill.", remedy="GET /v1/models tells which models can.")
        ask = ask_of(sent, model)
        telling = _Telling(sent, ask, model.name)
        if sent.stream:
            return await stream(service.stream([ask], who, model.name), telling.events, _apology)
        answer = await service.answer([ask], who, model.name)
        return Response(encoded(telling.whole(answer)), media_type="application/json")

    return routes
