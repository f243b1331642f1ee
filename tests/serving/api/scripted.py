"""A ``Service`` that answers as it is told and remembers what it was asked; an application around a dialect."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import FastAPI, Header
from starlette.testclient import TestClient

from serving.api import llamacpp, mistral, ollama, openai
from serving.api.ask import Answer, Ask, Choice, End, Piece, Reason, ServedModel, Timing, Token, Usage
from serving.api.replies import install
from serving.errors import AuthenticationError, ModelNotFoundError, SpanfillError
from serving.tenants.caller import Caller

DEMO = ServedModel(
    "demo", "codegen25", 2_048, can_infill=True, created=1_700_000_000, licence="Apache-2.0", notice="A toy."
)
PLAIN = ServedModel("org/plain", "plain", 1_024, can_infill=False)

PIECES = (Piece(0, "a = 1\n"), Piece(0, "b"), Piece(0, reason="eom"))
END = End(Usage(7, 3, 4), timing=Timing(0.25, 0.5), prompts=("<prompt>",))


class Scripted:
    """Answers every request with ``pieces``; raises ``refuse`` before the first of them, ``fail`` behind the last."""

    def __init__(
        self,
        *pieces: Piece,
        end: End = END,
        refuse: Exception | None = None,
        fail: SpanfillError | None = None,
        models: Sequence[ServedModel] = (DEMO, PLAIN),
    ) -> None:
        self.models = models
        self.asked: list[Ask] = []
        self.callers: list[Caller] = []
        self.served: list[str] = []
        self.closed = 0
        self._pieces, self._end = pieces or PIECES, end
        self._refuse, self._fail = refuse, fail

    def model(self, name: str | None, caller: Caller) -> ServedModel:
        """As ``Service``."""
        for model in self.models:
            if (not name or model.name == name) and (caller.models is None or model.name in caller.models):
                return model
        raise ModelNotFoundError("The model is not served here.", remedy="GET /v1/models lists those that are.")

    async def answer(self, asks: Sequence[Ask], caller: Caller, model: str) -> Answer:
        """As ``Service``."""
        self._remember(asks, caller, model)
        if self._fail:
            raise self._fail
        count = 1 + max(piece.index for piece in self._pieces)
        choices = tuple(self._choice(index) for index in range(count))
        end = self._end
        return Answer(choices, end.usage, truncated=end.truncated, timing=end.timing, prompts=end.prompts)

    async def stream(self, asks: Sequence[Ask], caller: Caller, model: str) -> AsyncIterator[Piece | End]:
        """As ``Service``."""
        try:
            self._remember(asks, caller, model)
            for piece in self._pieces:
                yield piece
            if self._fail:
                raise self._fail
            yield self._end
        finally:
            self.closed += 1

    def _remember(self, asks: Sequence[Ask], caller: Caller, model: str) -> None:
        if self._refuse:
            raise self._refuse
        self.asked.extend(asks)
        self.callers.append(caller)
        self.served.append(model)

    def _choice(self, index: int) -> Choice:
        own = [piece for piece in self._pieces if piece.index == index]
        tokens: tuple[Token, ...] = tuple(token for piece in own for token in piece.tokens)
        reason: Reason = next(piece.reason for piece in own if piece.reason)
        return Choice("".join(piece.text for piece in own), reason, tokens, own[-1].stop_word)


async def who_calls(authorization: Annotated[str, Header()] = "Bearer ada") -> Caller:
    """A caller by the name in the key; ``nobody`` is refused, ``narrow`` may use the model ``demo`` alone."""
    name = authorization.removeprefix("Bearer ")
    if name == "nobody":
        raise AuthenticationError("The key is unknown.", remedy="Ask for one.")
    return Caller("acme", name, models=("demo",) if name == "narrow" else None)


def app_of(service: Scripted) -> FastAPI:
    """All dialects over one service."""
    app = FastAPI()
    install(app)
    for router in (openai.router, mistral.router, llamacpp.router, ollama.router):
        app.include_router(router(service, who_calls))
    return app


def client_of(service: Scripted) -> TestClient:
    """A client of all dialects over one service."""
    return TestClient(app_of(service), raise_server_exceptions=False)


def events_of(body: str) -> list[str]:
    """The data of each server-sent event."""
    assert body.endswith("\n\n")
    told = body.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in told)
    return [event.removeprefix("data: ") for event in told]
