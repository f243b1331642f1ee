"""Log probabilities in the shape of OpenAI's legacy completions."""

from collections.abc import Sequence

from pydantic import BaseModel

from serving.api.ask import Token

LEAST = -9_999.0
"""What is told instead of minus infinity, which JSON has not."""


class Logprobs(BaseModel):
    """Natural logarithms, one entry a token; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def logprobs_of(tokens: Sequence[Token]) -> Logprobs:
    """The tokens' texts, logarithms, alternatives, and characters where they begin."""
    return Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[None if token.logprob is None else max(token.logprob, LEAST) for token in tokens],
        top_logprobs=[_alternatives(token) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def _alternatives(token: Token) -> dict[str, float] | None:
    """By their texts; of several tokens with one text, as parts of a character have, the likeliest is told."""
    found: dict[str, float] = {}
    for text, logprob in token.top:
        found.setdefault(text, max(logprob, LEAST))
    return found or None
