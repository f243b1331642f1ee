"""Encoding that remembers lines: code repeats them, and rows cut from one file repeat nearly all of each other's.

GPT-2's pattern always begins a new token at a line feed that follows something else than white space. So a text may be
cut there and its pieces encoded apart, and any lines that end so may be encoded as one text: the ids are the same.
"""

import array
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import tiktoken

from serving.threads import on_threads

MOST_REMEMBERED = 16_000_000
"""Characters of lines remembered, ``LINE_COST`` more for each; beyond, all are forgotten. They take about 50 MB."""

LINE_COST = 50

FEED = ord("\n")
FEED_BYTES = 4
"""Of its id: before anything but white space a line feed is one token, in every vocabulary with that pattern."""

MOST_AT_ONCE = 20_000
"""Characters that are encoded at once: over more without a blank the pattern would backtrack for minutes."""

_SOLID = np.array([not chr(code).isspace() for code in range(0x3002)])
"""Whether a character is no white space, by its code; those beyond are as the last one, which is none."""

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
        firsts, lines, counts = _split(texts)
        found = list(map(known.get, lines))
        new = [place for place, ids in enumerate(found) if ids is None]
        alone = {line for line in firsts if not line or line[0].isspace()}
        others = set(firsts) - alone
        fresh = self._fresh({lines[place] for place in new} | others)
        for place in new:
            found[place] = fresh[lines[place]]
        begun = self._each(alone) | {line: fresh[line][FEED_BYTES:] for line in others}
        # Many texts begin or end in the middle of a line that nobody will meet again.
        cut = set((np.cumsum(counts) - 1).tolist())
        self._remember(known, {lines[place]: found[place] for place in new if place not in cut})  # type: ignore[misc]
        encoded: list[array.array[int]] = []
        start = 0
        for first, count in zip(firsts, counts, strict=True):
            encoded.append(array.array("i", begun[first]))
            encoded[-1].frombytes(b"".join(found[start : start + count]))  # type: ignore[arg-type]
            start += count
        return encoded

    def _each(self, texts: Collection[str]) -> dict[str, bytes]:
        """The ids of texts that begin with white space, which would be another token behind a line feed."""
        stacks = _stacked(texts)
        ids = on_threads(lambda stack: [self._whole(text).tobytes() for text in stack], stacks)
        return dict(zip(chain.from_iterable(stacks), chain.from_iterable(ids), strict=True))

    def _fresh(self, new: Collection[str]) -> dict[str, bytes]:
        """The ids of new lines, each with the line feed before it."""
        # A blank at the end belongs to what follows, and here nothing follows.
        found = {line: self._whole("\n" + line).tobytes() for line in new if not line or line[-1].isspace()}
        stacks = _stacked([line for line in new if line and not line[-1].isspace()])
        for stack, ids in zip(stacks, on_threads(self._apart, stacks), strict=True):
            found.update(zip(stack, ids, strict=True))
        return found

    def _remember(self, known: dict[str, bytes], new: dict[str, bytes]) -> None:
        known |= new
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


def _split(texts: Sequence[str]) -> tuple[list[str], list[str], list[int]]:
    """The first line of each text, all texts' other lines one after the other, and how many of those each text has.

    A line ends at a line feed that follows something else than white space; it is part of neither line. All texts are
    looked through at once: the line feeds are found by array operations.
    """
    joined = "".join(texts)
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    lengths = np.array([len(text) for text in texts], np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    feeds = np.flatnonzero(codes == FEED)
    feeds = feeds[_SOLID[np.minimum(codes[feeds - 1], len(_SOLID) - 1)]]
    feeds = feeds[~np.isin(feeds, starts)]
    upto = np.searchsorted(feeds, ends)
    counts = np.diff(upto, prepend=0)
    some = counts > 0
    # Every line but the last of its text ends at the next line feed; that one ends where its text does.
    stops = np.roll(feeds, -1)
    stops[upto[some] - 1] = ends[some]
    firsts = ends.copy()
    firsts[some] = feeds[(upto - counts)[some]]
    begun = [joined[start:stop] for start, stop in zip(starts.tolist(), firsts.tolist(), strict=True)]
    lines = [joined[start + 1 : stop] for start, stop in zip(feeds.tolist(), stops.tolist(), strict=True)]
    return begun, lines, counts.tolist()


def _stacked(lines: Iterable[str]) -> list[list[str]]:
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
