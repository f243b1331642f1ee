"""Ollama's ``/api/generate``.

Where a client sends no options they are Ollama's documented ones: temperature 0.8, ``top_k`` 40, ``top_p`` 0.9; its
repetition penalty of 1.1 is not, because code repeats itself. ``num_predict`` below 1 or absent is ``OPEN_END`` tokens.
A ``suffix`` of null is a causal completion, an empty one an infill at the end of the text. ``raw``, ``keep_alive``,
``system``, ``template`` and unknown fields change nothing. Durations are in nanoseconds.
"""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from serving.api import tags
from serving.api.ask import Answer, Ask, Decoding, End, Piece, Reason, ServedModel, Service
from serving.api.bodies import JsonRoute
from serving.api.events import NDJSON, Stream, described, line, stream
from serving.api.fields import Flag, Integer, Name, Repetition, Sampled, Text, decoding, seed_of, stop_words, within
from serving.api.parts import FINISH, WhoCalls
from serving.api.replies import POSTED, OllamaErrorReply, documented, ollama_error, problem_of
from serving.api.tags import TAG, rfc3339
from serving.errors import SpanfillError
from serving.tenants.caller import Caller

DEFAULT = Decoding(temperature=0.8, top_k=40, top_p=0.9)


class Options(Sampled):
    """Ollama's options that change an answer here."""

    num_predict: Integer | None = None
    repetition_penalty: Repetition | None = Field(None, alias="repeat_penalty")


class GenerateRequest(BaseModel):
    """Ollama's request; it streams unless told not to."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Name
    prompt: Text | None = None
    suffix: Text | None = None
    options: Options | None = None
    stream: Flag | None = None


class Generated(BaseModel):
    """An answer, or a part of it; the last part has what is null in the others, which is left out."""

    model: str
    created_at: str
    response: str
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


def ask_of(sent: GenerateRequest, model: ServedModel) -> Ask:
    """What is asked."""
    options = sent.options or Options()
    wanted = options.num_predict
    return Ask(
        prefix=sent.prompt or "",
        suffix=sent.suffix,
        max_tokens=within(None if wanted is None or wanted < 1 else wanted, model.context),
        seed=seed_of(options.seed),
        stop=stop_words(options.stop),
        decoding=decoding(options, DEFAULT),
    )


def _part(model: str, response: str) -> Generated:
    return Generated(model=model, created_at=rfc3339(datetime.now(UTC)), response=response, done=False)


def _done(model: str, response: str, reason: Reason, told: Answer | End) -> Generated:
    prompt, made = round(1e9 * told.timing.prompt), round(1e9 * told.timing.completion)
    return Generated(
        model=model,
        created_at=rfc3339(datetime.now(UTC)),
        response=response,
        done=True,
        done_reason=FINISH[reason],
        total_duration=prompt + made,
        load_duration=0,
        prompt_eval_count=told.usage.prompt_tokens,
        prompt_eval_duration=prompt,
        eval_count=told.usage.completion_tokens,
        eval_duration=made,
    )


class _Lines:
    """The lines of one stream."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._reason: Reason = "length"

    def lines(self, part: Piece | End) -> list[str]:
        """The line of a part."""
        if isinstance(part, End):
            return [line(_done(self._model, "", self._reason, part).model_dump(exclude_none=True))]
        self._reason = part.reason or self._reason
        return [line(_part(self._model, part.text).model_dump(exclude_none=True))] if part.text else []


def _apology(error: SpanfillError) -> str:
    return line(ollama_error(problem_of(error)))


GENERATED: dict[int | str, dict[str, Any]] = {
    **described(NDJSON, "The answer, with `stream` false; else lines of the same shape, the last with `done`."),
    **documented(*POSTED, model=OllamaErrorReply),
}


def router(service: Service, caller: WhoCalls) -> APIRouter:
    """The routes; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    @routes.post("/api/generate", response_model=Generated, response_model_exclude_none=True, responses=GENERATED)
    async def generate(sent: GenerateRequest, who: Annotated[Caller, Depends(caller)]) -> Generated | Stream:
        """Complete `prompt`, or infill between it and `suffix`; without either, tell that the model is loaded."""
        model = service.model(sent.model.removesuffix(TAG), who)
        if not (sent.prompt or sent.suffix):
            return _part(sent.model, "").model_copy(update={"done": True, "done_reason": "load"})
        asks = [ask_of(sent, model)]
        if sent.stream is not False:
            return await stream(service.stream(asks, who, model.name), _Lines(sent.model).lines, _apology, NDJSON)
        answer = await service.answer(asks, who, model.name)
        choice = answer.choices[0]
        return _done(sent.model, choice.text, choice.reason, answer)

    routes.include_router(tags.router(service, caller))
    return routes
