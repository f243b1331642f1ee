"""From what a client asks to token ids: rendered, bounded by the context, never silently where that would mislead."""

import hashlib
import secrets
from dataclasses import dataclass

from serving.api.ask import Ask
from serving.errors import ConfigError, PromptTooLongError, SpanfillError, UsageError
from serving.formats import Format
from serving.protocol import Request, Sampling


@dataclass(frozen=True, slots=True)
class Rendered:
    """An ask's prompt; ``truncated``: its texts did not fit and were cut as a job would cut them."""

    ask: Ask
    token_ids: tuple[int, ...]
    truncated: bool

    @property
    def samples(self) -> int:
        """Samples that the engine makes: one of a prompt alone, which all choices show."""
        return self.ask.n if self.ask.max_tokens else 1

    @property
    def output_tokens(self) -> int:
        """Tokens that the engine may come to make, of all samples."""
        return self.samples * self.sample_tokens

    @property
    def sample_tokens(self) -> int:
        """Tokens that the engine may come to make of one sample; vLLM makes one at least."""
        return max(1, self.ask.max_tokens)


def render(ask: Ask, fmt: Format, context: int) -> Rendered:
    """The prompt of an ask.

    Texts that do not fit the context are cut as in a job, unless the prompt is echoed: half an echo would mislead.
    Raises ``PromptTooLongError`` for an echo or token ids that do not fit, ``UsageError`` for what cannot be asked.
    """
    room = context - max(1, ask.max_tokens)
    if room < 1:
        raise UsageError(
            f"max_tokens = {ask.max_tokens} leaves no room for a prompt in a context of {context:,} tokens.",
            remedy=f"Ask for {context - 1 - fmt.control_count} at most.",
        )
    if ask.token_ids is not None:
        return Rendered(ask, _checked(ask.token_ids, fmt, room), truncated=False)
    behind = _behind(ask, fmt, context) if ask.behind else ()
    try:
        prompt = fmt.prompt(
            ask.prefix, ask.suffix, max_tokens=max(1, ask.max_tokens) + len(behind), max_context=context
        )
    except ConfigError as error:
        raise UsageError(error.message, remedy="Ask for fewer max_tokens.") from None
    if prompt.truncated and ask.echo:
        raise _too_long("the prompt does not fit", context, ask.max_tokens)
    return Rendered(ask, (*prompt.token_ids, *behind), prompt.truncated)


def _behind(ask: Ask, fmt: Format, context: int) -> tuple[int, ...]:
    """The ids of the text that stands where a completion begins; never cut, since the answer goes on from its end."""
    (ids,) = fmt.completions([ask.behind])
    if isinstance(ids, SpanfillError):
        raise ids
    tokens = max(1, ask.max_tokens)
    most = max(0, context - tokens - fmt.control_count - 1)
    if len(ids) > most:
        raise UsageError(
            f"prompt: its {len(ids):,} tokens stand behind the gap, where a context of {context:,} tokens has room for "
            f"{most:,} beside {tokens:,} of the answer.",
            remedy="Shorten it, or ask for fewer tokens.",
        )
    return tuple(ids)


def _checked(token_ids: tuple[int, ...], fmt: Format, room: int) -> tuple[int, ...]:
    vocabulary = fmt.tokenizer.vocab_size
    if not token_ids:
        raise UsageError("the prompt holds no token ids.", remedy="Give one at least.")
    if wrong := [token_id for token_id in token_ids if not 0 <= token_id < vocabulary]:
        raise UsageError(
            f"token id {wrong[0]} is not of 0 to {vocabulary - 1}.", remedy="Encode with this model's tokenizer."
        )
    if len(token_ids) > room:
        raise _too_long(f"{len(token_ids):,} token ids do not fit", room, 0)
    return token_ids


def _too_long(what: str, context: int, max_tokens: int) -> PromptTooLongError:
    left = f" with max_tokens = {max_tokens}" if max_tokens else " beside max_tokens"
    return PromptTooLongError(f"{what} into {context:,} tokens{left}.", remedy="Shorten it, or ask for fewer tokens.")


def sampling_of(ask: Ask, fmt: Format, *, format_name: str, tokenizer: str) -> Sampling:
    """How the engine decodes an ask."""
    decoding = ask.decoding
    scored = ask.echo and ask.logprobs is not None
    return Sampling(
        max_tokens=max(1, ask.max_tokens),
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        stop_token_ids=() if decoding.ignore_eos else fmt.stop_token_ids,
        ignore_eos=decoding.ignore_eos,
        logprobs=ask.logprobs is not None,
        prompt_logprobs=scored,
        stop=ask.stop,
        format=format_name,
        tokenizer=tokenizer,
        alternatives=ask.logprobs or 0,
        top_k=decoding.top_k,
        min_p=decoding.min_p,
        presence_penalty=decoding.presence_penalty,
        frequency_penalty=decoding.frequency_penalty,
        repetition_penalty=decoding.repetition_penalty,
        min_tokens=min(decoding.min_tokens, max(1, ask.max_tokens)),
        logit_bias=decoding.logit_bias,
    )


def request_of(rendered: Rendered, key: int, samples: range) -> Request:
    """The engine's request of a prompt, one seed for each of these samples."""
    seeds = tuple(_seed(rendered.ask, sample) for sample in samples)
    return Request(key, list(rendered.token_ids), seeds)


def _seed(ask: Ask, sample: int) -> int:
    """63 bits: drawn where the client gives no seed, else a hash of its seed and the sample, so that none collide."""
    if ask.decoding.temperature == 0:
        return 0
    if ask.seed is None:
        return secrets.randbits(63)
    digest = hashlib.blake2b(f"{ask.seed}\0{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def visible(rendered: Rendered, fmt: Format) -> str:
    """A prompt's text with its control tokens visible."""
    special, parts, run = fmt.tokenizer.special_ids, list[str](), list[int]()
    for token_id in rendered.token_ids:
        if token_id not in special:
            run.append(token_id)
            continue
        parts += [fmt.decode(run), fmt.tokenizer.token(token_id)]
        run = []
    return "".join([*parts, fmt.decode(run)])
