"""Named trimmings of an infill, each a pure function of infill, prefix and suffix; all are off by default."""

from collections.abc import Callable

MIN_OVERLAP = 4
"""Characters, blanks aside, that infill and suffix must share before an overlap is cut."""

ECHO_CHARS = 20

Trimming = Callable[[str, str, str], str]


def suffix_overlap(infill: str, prefix: str, suffix: str) -> str:
    """Cut the longest end of the infill that the suffix begins with."""
    for length in range(min(len(infill), len(suffix)), 0, -1):
        if infill.endswith(suffix[:length]) and len("".join(suffix[:length].split())) >= MIN_OVERLAP:
            return infill[:-length]
    return infill


def suffix_echo(infill: str, prefix: str, suffix: str) -> str:
    """Cut where the suffix's first 20 characters, blanks before them aside, begin to repeat."""
    echo = suffix.lstrip()[:ECHO_CHARS]
    at = infill.find(echo) if len(echo) == ECHO_CHARS else -1
    return infill[:at] if at >= 0 else infill


def next_line(infill: str, prefix: str, suffix: str) -> str:
    """Drop the infill's last line when it is the suffix's first whole line again."""
    lines = infill.splitlines(keepends=True)
    following = next((line.strip() for line in suffix.splitlines() if line.strip()), "")
    if len(lines) > 1 and following and lines[-1].strip() == following:
        return "".join(lines[:-1])
    return infill


def repeated_lines(infill: str, prefix: str, suffix: str) -> str:
    """Cut where a line that is not blank comes three times in a row, keeping it once."""
    lines = infill.splitlines(keepends=True)
    for i in range(len(lines) - 2):
        if lines[i].strip() and lines[i].strip() == lines[i + 1].strip() == lines[i + 2].strip():
            return "".join(lines[: i + 1])
    return infill


TRIMMINGS: dict[str, Trimming] = {
    "suffix-overlap": suffix_overlap,
    "suffix-echo": suffix_echo,
    "next-line": next_line,
    "repeated-lines": repeated_lines,
}

OVERLAPS = ("suffix-overlap", "suffix-echo", "next-line")
"""The trimmings that cut what the suffix says again; where one cut, the infill's finish reason is ``overlap``."""
