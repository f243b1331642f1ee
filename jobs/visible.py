"""Users' text on a terminal: as it is, but for what would be invisible there or would command the terminal."""

import re

from rich.segment import Segment, Segments
from rich.style import Style

HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f"
)
"""Control characters but tab and line feed, invisible ones, those that reorder text, lone surrogates."""

LEGEND = "⟦ ⟧ hold control tokens and characters without a picture, ␀ to ␡ are control characters; all else is text"
_HIDDEN = re.compile(f"[{HIDDEN}]")
_AMBIGUOUS = re.compile(f"[{HIDDEN}\u2400-\u2421⟦]")


def visible(text: str, *, exact: bool = False) -> str:
    """Text with pictures for ASCII's control characters (``␍``) and codes for other hidden ones (``⟦U+202E⟧``).

    With ``exact`` the text's own pictures and brackets become codes too, so that no two texts look alike.
    """
    return (_AMBIGUOUS if exact else _HIDDEN).sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code == 0x7F:
        return "␡"
    return chr(0x2400 + code) if code < 0x20 else f"⟦U+{code:04X}⟧"


def styled(*pieces: tuple[str, str]) -> Segments:
    """Texts with their styles; printed with ``soft_wrap=True, end=""`` a console changes none of their characters."""
    return Segments([Segment(text, Style.parse(style)) for text, style in pieces])
