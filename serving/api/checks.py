"""What may not be asked, whatever the dialect."""

from collections.abc import Sequence

from serving.api.ask import Ask, ServedModel
from serving.api.edge import MOST_BODY
from serving.errors import NoInfillError, UsageError
from serving.formats import Format

MOST_CHOICES = 1_024
"""Choices of one request, of all its prompts together."""

MOST_TEXT = MOST_BODY
"""Characters of all its prompts together: a body holds its suffix once, but each prompt is tokenised with it."""


def check(asks: Sequence[Ask], model: ServedModel, fmt: Format) -> None:
    """Raise ``UsageError`` for what cannot be asked of the model, ``NoInfillError`` where that is an infill."""
    check_size(asks)
    for ask in asks:
        _check_suffix(ask, model)
        _check_samples(ask)
        _check_biases(ask, fmt.tokenizer.vocab_size)


def check_size(asks: Sequence[Ask]) -> None:
    """Raise ``UsageError`` for more completions or text than a request, or a line of a batch, may ask for."""
    choices, text = sum(ask.n for ask in asks), sum(map(text_of, asks))
    if choices > MOST_CHOICES:
        raise UsageError(
            f"the request asks for {choices:,} completions, and {MOST_CHOICES:,} are the most.",
            remedy="Send fewer prompts at a time, or lower n.",
        )
    if text > MOST_TEXT:
        raise UsageError(
            f"the request has {text:,} characters, its suffix once for each prompt, and {MOST_TEXT:,} are the most.",
            remedy="Send fewer prompts at a time, or a shorter suffix.",
        )


def text_of(ask: Ask) -> int:
    """Characters of an ask that are to be tokenised."""
    return len(ask.prefix) + len(ask.suffix or "") + len(ask.behind)


def _check_suffix(ask: Ask, model: ServedModel) -> None:
    if ask.suffix is None:
        return
    if not model.can_infill:
        raise NoInfillError(
            f"{model.name} cannot infill.",
            remedy="Leave the suffix out, or name a model that can: GET /v1/models tells which.",
        )
    if ask.echo:
        raise UsageError(
            "echo and suffix exclude each other: between the two there is no one text to repeat.",
            remedy="Leave one of them out.",
        )


def _check_samples(ask: Ask) -> None:
    if ask.n > 1 and ask.max_tokens and ask.decoding.temperature == 0:
        raise UsageError(
            f"n = {ask.n} at temperature 0 would make the same completion {ask.n} times.",
            remedy="Send a temperature above 0, or n = 1.",
        )


def _check_biases(ask: Ask, vocabulary: int) -> None:
    wrong = [token_id for token_id, _ in ask.decoding.logit_bias if token_id >= vocabulary]
    if wrong:
        raise UsageError(
            f"logit_bias names token id {wrong[0]}, which is not of 0 to {vocabulary - 1}.",
            remedy="Name ids of this model's tokenizer.",
        )
