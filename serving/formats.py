"""Infill formats as data, and the way from (prefix, suffix) to prompt ids and from completion ids to an infill."""

import array
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TypeAlias

from serving.errors import FormatError, SpanfillError
from serving.models import resolve_model
from serving.stopping import StopWatch, find_cut
from serving.tokenizer import CODEGEN25, Tokenizer, codegen25, load_tokenizer
from serving.truncation import DEFAULT_PREFIX_ALIGN, room_for_text, window


class Part(Enum):
    """Where the texts stand in a layout."""

    PREFIX = "prefix"
    SUFFIX = "suffix"


Ids: TypeAlias = "array.array[int]"
P, S = Part.PREFIX, Part.SUFFIX
CHARACTER_TOKENS = 4
"""A character has four bytes at most, so no more tokens."""

BROKEN = "\ufffd"
MARKER = "☺"
"""What is encoded before a SentencePiece text so that it gets no leading blank, as in Code Llama's own code."""


@dataclass(frozen=True)
class FormatSpec:
    """One family's format: control tokens and texts in order, what ends an infill, and who says so.

    ``end`` is the model's own end of infill (None: the tokenizer's EOS). The layout's control tokens end one too, and
    ``stops`` where they exist.
    """

    name: str
    layout: tuple[str | Part, ...]
    end: str | None
    source: str
    stops: tuple[str, ...] = ()
    bos: bool = False
    sentencepiece: bool = False

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The layout's control tokens."""
        return tuple(item for item in self.layout if isinstance(item, str))

    @property
    def prefix_align(self) -> int:
        """Where cut prefixes begin unless told otherwise; 1 behind a suffix, where rows cannot share them anyway."""
        return 1 if self.text_order[0] == S.value else DEFAULT_PREFIX_ALIGN

    @property
    def text_order(self) -> list[str]:
        """``prefix`` and ``suffix`` in the order in which they stand in a prompt."""
        return [item.value for item in self.layout if isinstance(item, Part)]


_MASK = (P, "<mask_1>", S, "<|endoftext|>", "<sep>", "<mask_1>")
_MASK_STOPS = ("<mask_2>",)
_FIM = ("<fim_prefix>", P, "<fim_suffix>", S, "<fim_middle>")
_FIM_STOPS = ("<file_sep>", "<fim_pad>")
_BAR_FIM = ("<|fim_prefix|>", P, "<|fim_suffix|>", S, "<|fim_middle|>")
_BAR_STOPS = ("<|fim_pad|>",)

FORMATS: dict[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        FormatSpec(CODEGEN25, _MASK, "<eom>", "hf.co/Salesforce/codegen25-7b-multi_P, README", _MASK_STOPS),
        FormatSpec("codegen2", _MASK, "<eom>", "hf.co/Salesforce/codegen2-7B_P, README", _MASK_STOPS),
        FormatSpec("starcoder", _FIM, "<|endoftext|>", "hf.co/bigcode/starcoder, README", _FIM_STOPS),
        FormatSpec("starcoder2", _FIM, "<|endoftext|>", "hf.co/bigcode/starcoder2-15b, discussion 6", _FIM_STOPS),
        FormatSpec(
            "qwen2.5-coder",
            _BAR_FIM,
            "<|endoftext|>",
            "github.com/QwenLM/Qwen2.5-Coder, README, fill in the middle",
            ("<|im_end|>", "<|file_sep|>", "<|repo_name|>", *_BAR_STOPS),
        ),
        FormatSpec(
            "codegemma",
            _BAR_FIM,
            "<|file_separator|>",
            "ai.google.dev/gemma/docs/codegemma/prompt-structure",
            ("<eos>", *_BAR_STOPS),
            bos=True,
        ),
        FormatSpec(
            "deepseek-coder",
            ("<｜fim▁begin｜>", P, "<｜fim▁hole｜>", S, "<｜fim▁end｜>"),
            None,
            "github.com/deepseek-ai/DeepSeek-Coder, README, code insertion",
            bos=True,
        ),
        FormatSpec(
            "codellama",
            ("<PRE>", P, "<SUF>", S, "<MID>"),
            "<EOT>",
            "github.com/meta-llama/codellama, llama/generation.py, infilling_prompt_tokens",
            ("</s>",),
            bos=True,
            sentencepiece=True,
        ),
        FormatSpec(
            "codellama-spm",
            ("<PRE>", "<SUF>", S, "<MID>", P),
            "<EOT>",
            "github.com/meta-llama/codellama, llama/generation.py, suffix_first",
            ("</s>",),
            bos=True,
            sentencepiece=True,
        ),
        FormatSpec(
            "codestral",
            ("[SUFFIX]", S, "[PREFIX]", P),
            None,
            "github.com/mistralai/mistral-common, InstructTokenizerV2.encode_fim",
            bos=True,
            sentencepiece=True,
        ),
        FormatSpec(
            "seed-coder",
            ("<[fim-suffix]>", S, "<[fim-prefix]>", P, "<[fim-middle]>"),
            None,
            "github.com/ByteDance-Seed/Seed-Coder, README, fill in the middle",
        ),
        FormatSpec("causal", (P,), None, "any causal language model: the prefix and nothing else"),
    )
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine, and how many characters of each text it really holds.

    ``token_ids`` is a list from ``Format.prompt`` and a 32-bit array from ``prompt_batch``, which pickles faster. The
    last ``scored`` of them are no prompt but a text whose likelihood is asked for.
    """

    token_ids: Sequence[int]
    stop_token_ids: tuple[int, ...]
    truncated: bool
    prefix_chars: int
    suffix_chars: int
    scored: int = 0


@dataclass(frozen=True, slots=True)
class Infill:
    """What fills the gap, and why it ended: ``eom``, ``eos``, ``length``, ``stop`` or ``overlap``."""

    text: str
    finish_reason: str


def load_format(model: str, *, tokenizer_of: str | None = None) -> "Format":
    """The format of a known model, a folder, a hub id, or a format's own name.

    ``tokenizer_of`` names the model whose tokenizer is used; ``codegen25`` brings its own. Raises ``FormatError`` when
    the tokenizer lacks a control token, naming it.
    """
    name = model if model in FORMATS or tokenizer_of else resolve_model(model, weights=False).format
    if name not in FORMATS:
        raise FormatError(f"format {name} is unknown.", remedy=f"Known formats: {', '.join(FORMATS)}.")
    if name == CODEGEN25:
        return Format(FORMATS[name], codegen25())
    source = tokenizer_of or model
    if source in FORMATS:
        raise FormatError(f"format {name} needs its model's tokenizer.", remedy="Name the model as well.")
    return Format(FORMATS[name], load_tokenizer(source))


class Format:
    """A format with its ids resolved from one tokenizer."""

    def __init__(self, spec: FormatSpec, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        try:
            self._ids = {token: self._resolve(token) for token in spec.control_tokens}
            self._end = self._resolve(spec.end) if spec.end else tokenizer.eos_id
        except FormatError as error:
            raise FormatError(
                f"{error.message} Format {spec.name} needs {', '.join(spec.control_tokens)}.", remedy=error.remedy
            ) from None
        if self._end is None:
            raise FormatError(
                f"format {spec.name} ends at EOS, which the tokenizer lacks.", remedy="Choose another model."
            )
        if spec.bos and tokenizer.bos_id is None:
            raise FormatError(
                f"format {spec.name} begins with BOS, which the tokenizer lacks.", remedy="Choose another model."
            )
        # Text ends at any control token: a model that begins another prompt by itself need not go on with it.
        self.stop_token_ids = tuple(dict.fromkeys([self._end, *self._known_stops(), *self._ids.values()]))
        self._head = [tokenizer.bos_id] if spec.bos and tokenizer.bos_id is not None else []
        self._marker = tokenizer.encode(MARKER) if spec.sentencepiece else []
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        self._empty = [begin] if begin is not None else [self._end]

    def _resolve(self, token: str) -> int:
        if self.spec.sentencepiece:
            try:
                return self.tokenizer.special_id(f"▁{token}")
            except FormatError:
                pass
        return self.tokenizer.special_id(token)

    def _known_stops(self) -> list[int]:
        found = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        for token in self.spec.stops:
            try:
                found.append(self._resolve(token))
            except FormatError:
                continue
        return found

    @property
    def can_infill(self) -> bool:
        """Whether the layout has a place for a suffix."""
        return S in self.spec.layout

    def check_infill(self) -> None:
        """Raise ``FormatError`` when the format takes no suffix."""
        if not self.can_infill:
            raise FormatError(
                f"format {self.spec.name} has no suffix support.",
                remedy="Leave the suffix out with --column suffix=, or use a model that infills.",
            )

    @property
    def end_token_id(self) -> int:
        """The model's own end of an infill."""
        return self.stop_token_ids[0]

    @property
    def control_count(self) -> int:
        """Control tokens of an infill prompt."""
        return len(self._head) + len(self.spec.control_tokens)

    def check_budget(self, max_tokens: int, max_context: int) -> None:
        """Raise ``ConfigError`` when a completion of ``max_tokens`` leaves no room for a prompt."""
        room_for_text(max_context, max_tokens, self.control_count)

    def prompt(
        self,
        prefix: str,
        suffix: str | None = None,
        *,
        max_tokens: int,
        max_context: int | None = None,
        prefix_align: int | None = None,
        suffix_share: float | None = None,
    ) -> Prompt:
        """The prompt of one row; ``suffix`` None is a causal completion, an empty one an infill at the text's end.

        A causal prompt of an empty prefix is the token that begins a document: BOS, else EOS (``<|endoftext|>``).
        Lengths are in tokens; ``max_context`` None never cuts. Raises ``ConfigError`` when there is no room and
        ``InputError`` for text that is not valid Unicode.
        """
        found = self.prompt_batch(
            [(prefix, suffix)],
            max_tokens=max_tokens,
            max_context=max_context,
            prefix_align=prefix_align,
            suffix_share=suffix_share,
        )[0]
        if isinstance(found, SpanfillError):
            raise found
        return replace(found, token_ids=list(found.token_ids))

    def prompt_batch(
        self,
        pairs: Sequence[tuple[str, str | None]],
        *,
        max_tokens: int,
        max_context: int | None = None,
        prefix_align: int | None = None,
        suffix_share: float | None = None,
    ) -> list[Prompt | SpanfillError]:
        """``prompt`` of many rows, tokenised on threads; a row's ``InputError`` stands in its place."""
        if max_context is not None:
            self.check_budget(max_tokens, max_context)
        if any(suffix is not None for _, suffix in pairs):
            self.check_infill()
        mark = MARKER if self.spec.sentencepiece else ""
        texts = [text for prefix, suffix in pairs for text in (prefix, mark + (suffix or ""))]
        encoded = self.tokenizer.encode_arrays(texts)
        prompts: list[Prompt | SpanfillError] = []
        for row, (prefix, suffix) in enumerate(pairs):
            before, after = encoded[2 * row], encoded[2 * row + 1]
            if isinstance(before, SpanfillError) or isinstance(after, SpanfillError):
                prompts.append(before if isinstance(before, SpanfillError) else after)  # type: ignore[arg-type]
                continue
            used = len(self._head) if suffix is None else self.control_count
            after = after[len(self._marker) :]
            room = len(before) + len(after) if max_context is None else room_for_text(max_context, max_tokens, used)
            prompts.append(self._build(prefix, suffix, before, after, room, prefix_align, suffix_share))
        return prompts

    def completions(self, texts: Sequence[str]) -> "list[Ids | SpanfillError]":
        """The ids of each text as a completion has them, behind a prompt; a text's ``InputError`` in its place."""
        mark = MARKER if self.spec.sentencepiece else ""
        encoded = self.tokenizer.encode_arrays([mark + text for text in texts])
        return [ids if isinstance(ids, SpanfillError) else ids[len(self._marker) :] for ids in encoded]

    def _build(
        self,
        prefix: str,
        suffix: str | None,
        before: Ids,
        after: Ids,
        room: int,
        align: int | None,
        share: float | None,
    ) -> Prompt:
        if len(before) + len(after) <= room:
            return Prompt(
                self._lay_out(before, after, suffix), self.stop_token_ids, False, len(prefix), len(suffix or "")
            )
        align = self.spec.prefix_align if align is None else align
        kept = window(len(before), len(after), room, suffix_share=share, align=align)
        start, head = self._prefix_from(prefix, before, kept.prefix_start)
        stop, tail = self._suffix_to(suffix or "", after, kept.suffix_stop)
        return Prompt(self._lay_out(before[start:], after[:stop], suffix), self.stop_token_ids, True, head, tail)

    def _prefix_from(self, text: str, ids: Ids, start: int) -> tuple[int, int]:
        """The first place at or after ``start`` that is between two characters, and the characters from there on."""
        if start == 0:
            return 0, len(text)
        whole: tuple[int, str] | None = None
        for place in range(start, min(start + CHARACTER_TOKENS, len(ids) + 1)):
            kept = self.decode(ids[place:])
            if text.endswith(kept):
                return place, len(kept)
            if whole is None and not kept.startswith(BROKEN):
                whole = place, kept
        place, kept = whole or (start, self.decode(ids[start:]))
        return place, _chars_of(kept, len(text), lambda chars: text[len(text) - chars :])

    def _suffix_to(self, text: str, ids: Ids, stop: int) -> tuple[int, int]:
        """The last place at or before ``stop`` that is between two characters, and the characters up to there."""
        if stop == len(ids):
            return stop, len(text)
        whole: tuple[int, str] | None = None
        for place in range(stop, max(stop - CHARACTER_TOKENS, -1), -1):
            kept = self.decode(ids[:place])
            if text.startswith(kept):
                return place, len(kept)
            if whole is None and not kept.endswith(BROKEN):
                whole = place, kept
        place, kept = whole or (stop, self.decode(ids[:stop]))
        return place, _chars_of(kept, len(text), lambda chars: text[:chars])

    def _lay_out(self, before: Ids, after: Ids, suffix: str | None) -> Ids:
        ids = array.array("i", self._head)
        if suffix is None:
            return ids + before or array.array("i", self._empty)
        for item in self.spec.layout:
            if isinstance(item, str):
                ids.append(self._ids[item])
            else:
                ids += before if item is P else after
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion's ids, control tokens left out; broken UTF-8 becomes U+FFFD."""
        if not self._marker:
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode([*self._marker, *ids]).removeprefix(MARKER)

    def finish_reason(self, stop_token_id: int | None) -> str:
        """``eom`` for the model's own end of infill, ``eos`` for any other stop token, ``length`` for none."""
        if stop_token_id is None:
            return "length"
        return "eom" if stop_token_id == self._end else "eos"

    def watch(
        self, stop: Sequence[str], until: str | None = None, *, through: bool = False, least: int = 0
    ) -> StopWatch:
        """What tells, a token at a time, from where on ``infill`` would cut everything; ``through`` control tokens.

        Texts that end within the first ``least`` tokens do not count.
        """
        return StopWatch(self.decode, () if through else self.tokenizer.special_ids, stop, until, least=least)

    def infill(
        self,
        token_ids: Sequence[int],
        *,
        stop_token_id: int | None = None,
        stop: Sequence[str] = (),
        until: str | None = None,
        least: int = 0,
    ) -> Infill:
        """The text up to the first control token, ``stop`` string or ``until``, the suffix's beginning.

        Texts that end within the first ``least`` characters do not count. Broken UTF-8 at the end becomes U+FFFD.
        """
        special = self.tokenizer.special_ids
        at = None
        if not special.isdisjoint(token_ids):  # Few completions hold one, and a look at each token costs.
            at = next(i for i, token_id in enumerate(token_ids) if token_id in special)
        text = self.decode(token_ids if at is None else token_ids[:at])
        reason = self.finish_reason(stop_token_id if at is None else token_ids[at])
        cut = find_cut(text, stop, until, least=least)
        return Infill(text[: cut.at], cut.reason) if cut else Infill(text, reason)


def _chars_of(normal: str, most: int, part: Callable[[int], str]) -> int:
    """How many characters of a text, of which ``part`` gives so many, its tokenizer has read as ``normal``.

    Qwen's composes them (NFC), so that a letter and its accents are one: a part may become shorter by one more.
    """

    def read(chars: int) -> str:
        return unicodedata.normalize("NFC", part(chars))

    about = bisect_right(range(most + 1), len(normal), key=lambda chars: len(read(chars))) - 1
    near = range(max(0, about - CHARACTER_TOKENS), min(most, about + CHARACTER_TOKENS) + 1)
    return next((chars for chars in reversed(near) if read(chars) == normal), about)
