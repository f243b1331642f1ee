"""The text of one choice as its tokens come: whole characters, and nothing that a stop string may yet take back."""

from collections.abc import Sequence
from dataclasses import replace

from serving.api.ask import Piece, Reason, Token
from serving.api.margin import Margin
from serving.formats import Format
from serving.protocol import Alternatives, Growth
from serving.stopping import GrowingText, find_behind, find_cut

REASONS: dict[str, Reason] = {"eom": "eom", "eos": "eos", "length": "length", "stop": "stop"}


class Writing:
    """Makes pieces of what the engine tells of choice ``index``; together they are what ``Format.infill`` would give.

    ``through`` writes on behind control tokens, for whoever asked to ignore the end. ``offset`` is where the choice's
    text begins, behind an echoed prompt; it may end at a line that less than ``indent`` blanks begin. Stop strings
    within the first ``least`` tokens end nothing. ``tokens`` are told when ``detailed``.
    """

    def __init__(
        self,
        index: int,
        fmt: Format,
        stop: Sequence[str] = (),
        *,
        offset: int = 0,
        indent: int = 0,
        least: int = 0,
        detailed: bool = False,
        through: bool = False,
    ) -> None:
        self.count = 0
        self.text = ""
        self._index = index
        self._format = fmt
        self._stop = tuple(stop)
        self._offset = offset
        self._margin = Margin(indent)
        self._least = least
        self._needless = 0
        self._detailed = detailed
        self._control = frozenset() if through else fmt.tokenizer.special_ids
        self._growing = GrowingText(fmt.decode)
        self._ids: list[int] = []
        self._tokens: list[Token] = []
        self._controlled = False
        self._sent = self._told = 0

    @property
    def is_outside(self) -> bool:
        """Whether what was shown has left the block that it began in, so that nobody reads on."""
        return self._margin.crossed

    def add(self, growth: Growth) -> Piece | None:
        """What may be shown now; None for nothing. The last piece has a reason."""
        self.count += len(growth.token_ids) + (growth.stop_token_id is not None)
        for place, token_id in enumerate(growth.token_ids):
            self._take(token_id, growth, place)
        if growth.finish_reason is not None:
            return self._end(growth.stop_token_id)
        return self._show(self._settled())

    def cut(self) -> Piece:
        """End the choice here, since its time is over."""
        return self._last(self.text[: self._settled()], "time")

    def _take(self, token_id: int, growth: Growth, place: int) -> None:
        self._ids.append(token_id)
        self._controlled = self._controlled or token_id in self._control
        if self._controlled:
            return
        start = len(self.text)
        self.text += self._growing.add(token_id)
        if len(self._ids) <= self._least:
            self._needless = len(self.text)
        if self._detailed:
            logprob = growth.logprobs[place] if growth.logprobs else None
            likely = growth.alternatives[place] if growth.alternatives else ()
            top = named(self._format, likely, token_id, logprob)
            self._tokens.append(Token(token_id, self.text[start:], self._offset + start, logprob, top))

    def _settled(self) -> int:
        """Characters that no stop string can take back: none that is there, and none that may yet turn out to be."""
        cut = find_cut(self.text, self._stop, least=self._needless)
        end = len(self.text) if cut is None else cut.at
        longest = max(map(len, self._stop), default=1)
        places = range(max(self._sent, len(self.text) - longest + 1), end)
        begun = (place for place in places if any(word.startswith(self.text[place:]) for word in self._stop))
        return next(begun, end)

    def _end(self, stop_token_id: int | None) -> Piece:
        if not self._control and stop_token_id is None:
            text, reason = self._format.decode(self._ids), "length"
            if (cut := find_cut(text, self._stop, least=self._needless)) is not None:
                text, reason = text[: cut.at], "stop"
        else:
            fmt, least = self._format, self._needless
            infill = fmt.infill(self._ids, stop_token_id=stop_token_id, stop=self._stop, least=least)
            text, reason = infill.text, infill.finish_reason
        word = self._word() if reason == "stop" else ""
        return self._last(text, REASONS[reason], word)

    def _word(self) -> str:
        """The stop string that comes first; of two at one place the shorter."""
        places = ((find_behind(self.text, word, self._needless), word) for word in self._stop)
        found = [(at, len(word), word) for at, word in places if at >= 0]
        return min(found)[2] if found else ""

    def _last(self, text: str, reason: Reason, word: str = "") -> Piece:
        """The rest; a token in which the text was cut is told as far as it is shown."""
        ends = len(text) or -1
        left = [token for token in self._tokens[self._told :] if token.offset - self._offset < ends]
        if left:
            left[-1] = replace(left[-1], text=text[left[-1].offset - self._offset :])
        return Piece(self._index, text[self._sent :], tuple(left), reason, word)

    def _show(self, settled: int) -> Piece | None:
        if settled <= self._sent:
            return None
        text, self._sent = self.text[self._sent : settled], settled
        self._margin.keep(text)
        return Piece(self._index, text, self._whole_tokens(settled))

    def _whole_tokens(self, place: int) -> tuple[Token, ...]:
        """Those not told yet that end before a place in the text, but for those of a character that is not whole."""
        start = self._told
        while self._told < len(self._tokens) and self._ends(self._tokens[self._told]) <= place:
            self._told += 1
        if self._growing.holds_back and self._told == len(self._tokens):
            while self._told > start and not self._tokens[self._told - 1].text:
                self._told -= 1
            self._told = max(start, self._told - 1)
        return tuple(self._tokens[start : self._told])

    def _ends(self, token: Token) -> int:
        return token.offset - self._offset + len(token.text)


def named(fmt: Format, likely: Alternatives, own_id: int, own: float | None) -> tuple[tuple[str, float], ...]:
    """Likely tokens by their texts, and the token that is there; of two that read alike the likelier."""
    found: dict[str, float] = {}
    for token_id, logprob in likely if own is None or not likely else (*likely, (own_id, own)):
        found.setdefault(fmt.decode([token_id]) or fmt.tokenizer.token(token_id), logprob)
    return tuple(found.items())


def prompt_tokens(
    fmt: Format,
    token_ids: Sequence[int],
    logprobs: Sequence[float] | None,
    alternatives: Sequence[Alternatives] | None,
    *,
    as_sent: bool = False,
) -> tuple[Token, ...]:
    """A prompt's tokens as an echo shows them; the first has no logprob.

    Control tokens are shown by their names, but not of a prompt that was sent as text alone (``as_sent``): what it
    begins with is the format's.
    """
    tokens: list[Token] = []
    growing, offset = GrowingText(fmt.decode), 0
    for place, token_id in enumerate(token_ids):
        special = token_id in fmt.tokenizer.special_ids
        text = ("" if as_sent else fmt.tokenizer.token(token_id)) if special else growing.add(token_id)
        logprob = logprobs[place - 1] if logprobs and place else None
        top = named(fmt, alternatives[place - 1], token_id, logprob) if alternatives and place else ()
        tokens.append(Token(token_id, text, offset, logprob, top))
        offset += len(text)
    return tuple(tokens)
