"""Encoding that remembers lines: code repeats them, and rows cut from one file repeat nearly all of each other's.

GPT-2's pattern always begins a new token at a line feed that follows something else than white space. So a text may be
cut there and its pieces encoded apart, and any lines that end so may be encoded as one text: the ids are the same.
"""

import array
import re
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

import numpy as np
import tiktoken

from serving.threads import on_threads

MOST_REMEMBERED = 16_000_000
"""Characters of lines remembered, ``LINE_COST`` more for each; beyond, all are forgotten. They take about 50 MB."""

LINE_COST = 50

MOST_AT_ONCE = 20_000
"""Characters that are encoded at once: over more without a blank the pattern would backtrack for minutes."""

_LINE_END = re.compile(r"\n(?<=[^\s\x1c-\x1f]\n)")
_CUT = re.compile(r"[ \n](?=[^\s\x1c-\x1f])")
"""Before the last blank of a run: GPT-2's pattern always begins a new token there."""


class LineEncoder:
    """Encodes valid Unicode as ``encoding`` does, which must split text by GPT-2's pattern; threads may share it."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self._sizes = np.zeros(encoding.max_token_value + 1, np.int64)
        for token in encoding.token_byte_values():
            self._sizes[encoding.encode_single_token(token)] = len(token)
        self._known: dict[str, bytes] = {}
        self._remembered = 0

    def encode_batch(self, texts: Sequence[str]) -> list["array.array[int]"]:
        """The ids of each text, 32 bits each; lines that are new are encoded on threads."""
        known = self._known
        # No line feed stands before the first lines, and many begin in the middle of one: those are not remembered.
        split = [_LINE_END.split(text) for text in texts]
        firsts = on_threads(self._each, _stacked([lines.pop(0) for lines in split]))
        found = [[known.get(line, b"") for line in lines] for lines in split]
        if new := {line for lines, ids in zip(split, found, strict=True) if not all(ids) for line in lines}:
            self._learn(known, [line for line in new if line not in known])
        encoded: list[array.array[int]] = []
        for first, ids, lines in zip(chain.from_iterable(firsts), found, split, strict=True):
            encoded.append(array.array("i", first))
            encoded[-1].frombytes(b"".join(ids if all(ids) else [known[line] for line in lines]))
        return encoded

    def _each(self, texts: list[str]) -> list[bytes]:
        return [self._whole(text).tobytes() for text in texts]

    def _learn(self, known: dict[str, bytes], new: Collection[str]) -> None:
        """Make the ids of every new line and of the line feed before it known."""
        # A blank at the end belongs to what follows, and here nothing follows.
        alone = [line for line in new if not line or line[-1].isspace()]
        stacks = _stacked([line for line in new if line and not line[-1].isspace()])
        for line in alone:
            known[line] = self._whole("\n" + line).tobytes()
        for stack, found in zip(stacks, on_threads(self._apart, stacks), strict=True):
            known.update(zip(stack, found, strict=True))
        self._remembered += sum(map(len, new)) + LINE_COST * len(new)
        if self._remembered > MOST_REMEMBERED:
            self._known, self._remembered = {}, 0

    def _apart(self, lines: list[str]) -> list[bytes]:
        """The ids of each line and the line feed before it, from those of all lines as one text."""
        ids = self._whole("\n" + "\n".join(lines))
        ends = np.cumsum([1 + (len(line) if line.isascii() else len(line.encode())) for line in lines])
        stops = (np.searchsorted(np.cumsum(self._sizes[ids]), ends) + 1).tolist()
        return [ids[start:stop].tobytes() for start, stop in zip([0, *stops], stops, strict=False)]

    def _whole(self, text: str) -> "np.ndarray[Any, np.dtype[np.int32]]":
        if len(text) <= MOST_AT_ONCE:
            return np.array(self._encoding.encode_ordinary(text), np.int32)
        return np.concatenate([self._whole(piece) for piece in _pieces(text)])


def _stacked(lines: list[str]) -> list[list[str]]:
    """The lines in lists of about ``MOST_AT_ONCE`` characters."""
    stacks: list[list[str]] = []
    room = 0
    for line in lines:
        if len(line) >= room:
            stacks.append([])
            room = MOST_AT_ONCE
        stacks[-1].append(line)
        room -= len(line) + 1
    return stacks


def _pieces(text: str) -> list[str]:
    """Split a long text where its ids cannot change.

    Only stretches of more than ``MOST_AT_ONCE`` characters without such a place are cut elsewhere: over those the
    pattern would backtrack, and the merges would take, for minutes.
    """
    pieces: list[str] = []
    start = best = 0
    for place in (*(match.start() for match in _CUT.finditer(text)), len(text)):
        if place - start > MOST_AT_ONCE and best > start:
            pieces.append(text[start:best])
            start = best
        while place - start > MOST_AT_ONCE:
            pieces.append(text[start : start + MOST_AT_ONCE])
            start += MOST_AT_ONCE
        best = place
    return [*pieces, text[start:]]
