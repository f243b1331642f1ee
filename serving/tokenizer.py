"""Tokenizers behind one small interface: CodeGen2.5's encoding on tiktoken, any other model's from Hugging Face.

Encoding takes text as text: whatever it spells, it never yields a control token.
"""

import array
import base64
import gzip
import hashlib
import re
from collections.abc import Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import tiktoken

from serving.errors import FormatError, InputError, ModelError
from serving.lines import LineEncoder
from serving.threads import on_threads

CODEGEN25 = "codegen25"
VOCAB_SIZE = 51_200
RANKS_SHA256 = "c529be663a2a797698339e02b97a644ee6f3af6102c02b362f1b1183a94f777f"
"""Of ``data/gpt2_ranks.txt.gz``, derived from GPT-2's ``vocab.bpe`` and ``encoder.json`` (OpenAI, MIT licence)."""

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""GPT-2's split pattern (Radford et al., 2019) in the possessive form that tiktoken uses."""

STARCODER_TOKENS = [
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
    "<dummy_0>",
    "<dummy_1>",
    "<dummy_2>",
    "<dummy_3>",
]

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
"""What one of must be in a model's folder: without any, transformers makes an empty tokenizer up."""

CHUNK = 16
"""Texts a thread takes at once."""


class Tokenizer(Protocol):
    """What the formats and the jobs need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, the embedding's rows."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all control tokens."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, where the model has one."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, where the model has one."""

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text; raises ``InputError`` for text that is not valid Unicode (lone surrogates)."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on threads."""

    def encode_arrays(self, texts: Sequence[str]) -> list["array.array[int] | InputError"]:
        """As ``encode_batch`` in 32-bit arrays; a text that cannot be encoded has its error in its place."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ordinary ids; control ids are left out, broken UTF-8 becomes U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """As ``decode``, before UTF-8 decoding."""

    def special_id(self, token: str) -> int:
        """The id of a control token; raises ``FormatError`` when there is none."""

    def token(self, token_id: int) -> str:
        """How a token is written, for people."""

    def vocab(self) -> dict[str, int]:
        """Every token by how it is written; ids without a token appear as ``<unused_ID>``. Never fails."""


def load_tokenizer(model: str, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a known model, a format with its own (``codegen25``), a folder or a hub id.

    Raises ``ModelError`` when there is none, naming what to do.
    """
    if model == CODEGEN25:
        return codegen25()
    from serving.models import find_model

    known = find_model(model, revision=revision, weights=False)
    if known.format == CODEGEN25:
        return codegen25()
    return _hugging_face(str(known.path or known.hub_id), known.revision)


@cache
def codegen25() -> "TiktokenTokenizer":
    """CodeGen2.5's encoding: GPT-2's ranks, runs of blanks and tabs, and the control tokens, 51,200 ids in all."""
    packed = resources.files("serving").joinpath("data", "gpt2_ranks.txt.gz").read_bytes()
    if hashlib.sha256(packed).hexdigest() != RANKS_SHA256:
        raise ModelError("serving/data/gpt2_ranks.txt.gz is damaged.", remedy="Install spanfill again.")
    tokens = [base64.b64decode(line) for line in gzip.decompress(packed).splitlines()]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    runs = [b" " * n for n in range(31, 1, -1)] + [b"\t" * n for n in range(9, 1, -1)]
    ranks |= {run: 50_257 + i for i, run in enumerate(runs)}
    special = {"<|endoftext|>": 50_256, "<sep>": 50_317, "<eom>": 50_318}
    special |= {token: 50_295 + i for i, token in enumerate(STARCODER_TOKENS)}
    special |= {f"<mask_{k}>": VOCAB_SIZE - k for k in range(1, 882)}
    return TiktokenTokenizer(
        tiktoken.Encoding(CODEGEN25, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special), special
    )


class TiktokenTokenizer:
    """A tiktoken encoding."""

    def __init__(self, encoding: tiktoken.Encoding, special: dict[str, int]) -> None:
        self._encoding = encoding
        self._lines = LineEncoder(encoding)
        self._special = special
        self.special_ids = frozenset(special.values())
        self.vocab_size = encoding.max_token_value + 1
        self.bos_id: int | None = None
        self.eos_id: int | None = special["<|endoftext|>"]

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text; raises ``InputError`` for lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text; lines that were not met before are encoded on threads."""
        return _all_good(self.encode_arrays(texts))

    def encode_arrays(self, texts: Sequence[str]) -> list["array.array[int] | InputError"]:
        """As ``encode_batch`` in 32-bit arrays, errors in their places."""
        errors = [_unicode_error(text) for text in texts]
        if not any(errors):
            return list(self._lines.encode_batch(texts))
        ids = self._lines.encode_batch(["" if error else text for text, error in zip(texts, errors, strict=True)])
        return [error or found for error, found in zip(errors, ids, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ordinary ids."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ordinary ids."""
        special = self.special_ids
        if not ids or (special.isdisjoint(ids) and min(ids) >= 0 and max(ids) < self.vocab_size):
            return self._encoding.decode_bytes(list(ids))
        return self._encoding.decode_bytes([i for i in ids if i not in special and 0 <= i < self.vocab_size])

    def special_id(self, token: str) -> int:
        """The id of a control token; raises ``FormatError``."""
        return _special_id(self._special, token, self._encoding.name)

    def token(self, token_id: int) -> str:
        """How a token is written."""
        return self._names.get(token_id, f"<unused_{token_id}>")

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token_id: name for name, token_id in self.vocab().items()}

    def vocab(self) -> dict[str, int]:
        """Every token by how it is written; bytes that are no UTF-8 are written as ``\\xNN``."""
        named: dict[str, int] = {}
        for token_id in range(self.vocab_size):
            name = self._name(token_id)
            named[name if name not in named else f"<duplicate_{token_id}>"] = token_id
        return named

    def _name(self, token_id: int) -> str:
        try:
            return self._encoding.decode_single_token_bytes(token_id).decode("utf-8", errors="backslashreplace")
        except KeyError:
            return f"<unused_{token_id}>"


@cache
def _hugging_face(source: str, revision: str | None) -> "HuggingFaceTokenizer":
    if Path(source).is_dir() and not any(Path(source, name).is_file() for name in VOCABULARY_FILES):
        raise _no_tokenizer(source, "no vocabulary file is there")
    from transformers import AutoTokenizer

    try:
        return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(source, revision=revision), source)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _no_tokenizer(source, str(error).splitlines()[0]) from error


def _no_tokenizer(source: str, reason: str) -> ModelError:
    own = _looks_like_codegen25(source)
    remedy = "It has CodeGen2.5's vocabulary: add --format codegen25." if own else "Put tokenizer.json in the folder."
    return ModelError(f"{source} has no tokenizer that loads: {reason.rstrip('.')}.", remedy=remedy)


def _looks_like_codegen25(source: str) -> bool:
    config = Path(source, "config.json")
    return config.is_file() and re.search(r'"vocab_size":\s*51200\b', config.read_text(encoding="utf-8")) is not None


class HuggingFaceTokenizer:
    """A transformers tokenizer; control tokens in text are split so that they stay text."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._special = added | {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
        self.special_ids = frozenset(self._special.values())
        self.vocab_size = max(len(tokenizer), tokenizer.vocab_size)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        # Longest first, so that a spelling inside another is not met before it.
        spellings = sorted((s for s in self._special if len(s) > 1), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text; raises ``InputError`` for lone surrogates."""
        if error := _unicode_error(text):
            raise error
        ids = self._plain(text)
        if self.special_ids.isdisjoint(ids):
            return ids
        out: list[int] = []
        start = 0
        for match in self._spelling.finditer(text):
            # The cut falls behind the first character, so neither half spells the token.
            out += self._plain(text[start : match.start() + 1])
            start = match.start() + 1
        return out + self._plain(text[start:])

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, some a thread."""
        return _all_good(self.encode_arrays(texts))

    def encode_arrays(self, texts: Sequence[str]) -> list["array.array[int] | InputError"]:
        """As ``encode_batch`` in 32-bit arrays, errors in their places."""
        chunks = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
        return [found for chunk in on_threads(self._encode_all, chunks) for found in chunk]

    def _encode_all(self, texts: Sequence[str]) -> list["array.array[int] | InputError"]:
        found: list[array.array[int] | InputError] = []
        for text in texts:
            try:
                found.append(array.array("i", self.encode(text)))
            except InputError as error:
                found.append(error)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ordinary ids."""
        ordinary = [i for i in ids if i not in self.special_ids]
        text: str = self._tokenizer.decode(ordinary, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 of ``decode``: a character that is cut off becomes U+FFFD."""
        return self.decode(ids).encode()

    def special_id(self, token: str) -> int:
        """The id of a control token; raises ``FormatError``."""
        return _special_id(self._special, token, self._name)

    def token(self, token_id: int) -> str:
        """How a token is written."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def vocab(self) -> dict[str, int]:
        """Every token by how the tokenizer writes it."""
        return dict(self._tokenizer.get_vocab())


def _special_id(special: dict[str, int], token: str, name: str) -> int:
    if token not in special:
        raise FormatError(
            f"the tokenizer of {name} has no control token {token}.", remedy="Choose another --format or model."
        )
    return special[token]


def _unicode_error(text: str) -> InputError | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return InputError(
            f"the text holds a lone surrogate at character {error.start}.",
            remedy="Replace it: it is not valid Unicode.",
        )
    return None


def _all_good(found: list["array.array[int] | InputError"]) -> list[list[int]]:
    good: list[list[int]] = []
    for ids in found:
        if isinstance(ids, InputError):
            raise ids
        good.append(ids.tolist())
    return good
