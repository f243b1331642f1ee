"""Where an infill ends by its text: at a stop string, or where it has run into the suffix.

One rule, ``find_cut``, decides on the finished text; ``StopWatch`` finds out, a token at a time, when that decision is
settled, so that an engine need not generate what would be cut. Both are pure.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from serving.trimming import MIN_OVERLAP

BEGINNING_CHARS = 8
"""Characters, blanks aside, of the suffix's beginning: ``else:`` or ``})`` alone stand in too many good infills."""

MOST_BEGINNING_CHARS = 200

BROKEN = "\ufffd"
"""What a decoder puts in the place of bytes that are no character, or not yet."""

CONTEXT_TOKENS = 4
WINDOW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Cut:
    """Where an infill's text ends, and why."""

    at: int
    reason: Literal["stop", "overlap"]


def find_cut(text: str, stop: Sequence[str], until: str | None = None, *, least: int = 0) -> Cut | None:
    """The earliest place of a ``stop`` string or of ``until``; of two at one place the shorter, then the stop string.

    That is the order in which they are complete where one begins, so the text's growth cannot change the reason. What
    ends within the first ``least`` characters does not count.
    """
    found = [(at, len(word), Cut(at, "stop")) for word in stop if (at := find_behind(text, word, least)) >= 0]
    if until is not None and (at := find_behind(text, until, least)) >= 0:
        found.append((at, len(until), Cut(at, "overlap")))
    return min(found, key=lambda match: match[:2])[2] if found else None


def find_behind(text: str, word: str, least: int) -> int:
    """Where the first ``word`` begins that ends behind the first ``least`` characters, or -1."""
    return text.find(word, max(0, least - len(word) + 1))


def suffix_beginning(suffix: str | None) -> str | None:
    """What an infill that has run into ``suffix`` repeats of it, or None where the suffix says too little.

    Whole lines, so that ``return x`` is not met in ``return xs``: up to the first that is not blank, and on until 8
    characters that are not blank are together. 200 characters at most, and the whole suffix when it is shorter, but
    never fewer than the 4 that the trimming ``suffix-overlap`` asks for: a suffix of one bracket would end every infill
    at its first bracket.
    """
    text = (suffix or "")[:MOST_BEGINNING_CHARS]
    beginning = ""
    for line in text.splitlines(keepends=True):
        beginning += line
        if _solid(beginning) >= BEGINNING_CHARS:
            break
    return beginning if _solid(beginning) >= MIN_OVERLAP else None


def _solid(text: str) -> int:
    return len("".join(text.split()))


class GrowingText:
    """The text of a completion that grows: each token adds what no later token can change.

    ``holds_back``: the latest tokens end with bytes that are no character yet.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.holds_back = False
        self._decode = decode
        self._window: list[int] = []
        self._told = 0

    def add(self, token_id: int) -> str:
        """The new text; a character that is not whole yet is held back."""
        self._window.append(token_id)
        text = self._decode(self._window)
        known = text.rstrip(BROKEN)
        self.holds_back = known != text
        new, self._told = known[self._told :], max(self._told, len(known))
        if len(self._window) >= WINDOW_TOKENS and known == text:
            # Some tokens stay: decoders treat the first one's leading blank otherwise than the next ones'.
            self._window = self._window[-CONTEXT_TOKENS:]
            self._told = len(self._decode(self._window))
        return new


class StopWatch:
    """Counts the tokens that an infill needs; ``count`` is None until it is settled.

    It is settled by the token that completes a match which no longer match can come before, or by a control token
    (``ended_by_control``), behind which nothing counts. It depends on the tokens alone, not on how many come at a time.
    A match that ends within the first ``least`` tokens does not count, as in vLLM.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        control: Iterable[int],
        stop: Sequence[str],
        until: str | None = None,
        *,
        least: int = 0,
    ) -> None:
        self.count: int | None = None
        self.ended_by_control = False
        self._text = GrowingText(decode)
        self._control = frozenset(control)
        self._words = [*stop, *([until] if until is not None else [])]
        self._longest = max(map(len, self._words), default=0)
        self._least = least
        self._seen = 0
        self._tail = ""
        self._needless = 0

    def add(self, token_ids: Iterable[int]) -> int | None:
        """Look at the next tokens; returns how many of all are needed once that is settled, until then None."""
        for token_id in token_ids:
            if self.count is not None:
                break
            self._seen += 1
            if token_id in self._control:
                self.count, self.ended_by_control = self._seen, True
            elif (new := self._text.add(token_id)) and self._settled_by(new):
                self.count = self._seen
        return self.count

    @property
    def seen(self) -> int:
        """Tokens looked at."""
        return self._seen

    def _settled_by(self, new: str) -> bool:
        self._tail += new
        if self._seen <= self._least:
            self._needless = len(self._tail)
        cut = find_cut(self._tail, self._words, least=self._needless)
        if cut is None:
            gone = max(0, len(self._tail) - self._longest + 1)
            self._tail, self._needless = self._tail[gone:], max(0, self._needless - gone)
            return False
        return not any(self._may_begin(place) for place in range(cut.at))

    def _may_begin(self, place: int) -> bool:
        """Whether a longer match may yet turn out to begin here."""
        begun = self._tail[place:]
        return any(len(word) > len(begun) and word.startswith(begun) for word in self._words)
