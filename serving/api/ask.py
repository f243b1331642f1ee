"""One request as every dialect asks it, and what its answer is made of; the dialects only translate.

A dialect makes ``Ask`` of what its clients send, gives them to a ``Service``, and makes what its clients read of
``Answer`` or, streaming, of ``Piece``. It knows neither engines nor tokenizers nor tenants' limits.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from serving.tenants.caller import Caller

Reason = Literal["eom", "eos", "length", "stop", "time"]
"""Why a completion ended: the model's end of infill, another end token, its length, a stop string, its time."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to decode; the defaults decode greedily. Meanings are vLLM's ``SamplingParams``'."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt and what is wanted for it.

    The prompt is ``token_ids`` as they are, else the texts: ``suffix`` None is a causal completion, an empty one an
    infill at the end of the text; ``behind`` follows the prompt's last control token (llama.cpp's ``prompt``).
    ``max_tokens`` 0 computes the prompt and generates nothing. ``logprobs`` is the number of alternatives beside each
    token (0: the token's own), None for none. ``seconds`` is when the answer is cut once it holds a line feed; a line
    that less than ``indent`` blanks begin ends it too. What is ``reported`` tells its prompt as the engine saw it.
    """

    prefix: str = ""
    suffix: str | None = None
    behind: str = ""
    token_ids: tuple[int, ...] | None = None
    max_tokens: int = 128
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    decoding: Decoding = Decoding()
    logprobs: int | None = None
    echo: bool = False
    seconds: float | None = None
    indent: int = 0
    reported: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer: its text, and natural logarithms where they were asked for.

    ``offset`` is the character of the choice's text where it begins. The first token of an echoed prompt has no
    logprob. ``top`` holds alternatives, the likeliest first, with the token itself where it is none of them.
    """

    token_id: int
    text: str
    offset: int = 0
    logprob: float | None = None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a choice's text, or its end, which has a ``reason``; text is whole characters, no part of a stop.

    ``index`` is the choice's: choices of the first ask come first. ``stop_word`` is the string that ended it.
    """

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    reason: Reason | None = None
    stop_word: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion, whole; ``tokens`` has those of ``text``, an echoed prompt's included."""

    text: str
    reason: Reason
    tokens: tuple[Token, ...] = ()
    stop_word: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, summed over its asks: a prompt counts once, however many samples are made of it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    def beyond(self, earlier: "Usage") -> "Usage":
        """What came to it since ``earlier``."""
        return Usage(
            self.prompt_tokens - earlier.prompt_tokens,
            self.completion_tokens - earlier.completion_tokens,
            self.cached_tokens - earlier.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: until the first token came, and from there to the end; all in the first of what comes in one piece."""

    prompt: float = 0.0
    completion: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """All choices of a request; ``prompts`` are the prompts' texts, control tokens visible, of a reported one."""

    choices: tuple[Choice, ...]
    usage: Usage
    truncated: bool = False
    timing: Timing = Timing()
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """What a stream ends with, behind its last piece; ``prompts`` are as in ``Answer``."""

    usage: Usage
    truncated: bool = False
    timing: Timing = Timing()
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as clients list it; ``context`` in tokens, ``created`` in seconds since 1970."""

    name: str
    format: str
    context: int
    can_infill: bool
    created: int = 0
    licence: str | None = None
    notice: str | None = None


class Service(Protocol):
    """What the dialects' routes call."""

    @property
    def models(self) -> Sequence[ServedModel]:
        """The models that are served, the default first."""

    def model(self, name: str | None, caller: Caller) -> ServedModel:
        """The model that a client names, the default for None or an empty name.

        Raises ``ModelNotFoundError`` where there is none of that name or the caller may not use it.
        """

    async def answer(self, asks: Sequence[Ask], caller: Caller, model: str) -> Answer:
        """Answer all at once.

        Raises ``UsageError`` for what cannot be asked (``NoInfillError``: a suffix where the model cannot infill),
        ``LimitError`` above a limit, ``OverloadedError`` when too many wait, ``EngineError`` when the engine fails.
        Cancelling it frees the engine.
        """

    def stream(self, asks: Sequence[Ask], caller: Caller, model: str) -> AsyncIterator[Piece | End]:
        """As ``answer``, piece by piece; errors before the first piece are raised at the first step."""
