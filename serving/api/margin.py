"""llama.cpp's ``n_indent``: an answer ends where its lines come out of the block that it began in."""

import re

_BEGINNING = re.compile(r"\n([ \t]*)(?=[^ \t])")
"""A line's blanks, once it is known that no more follow. An empty line has none and so ends a block, as there."""


class Margin:
    """Cuts a growing text before the first line, but its own first, that less than ``indent`` blanks begin."""

    def __init__(self, indent: int) -> None:
        self.crossed = False
        self._indent = indent
        self._blanks = ""

    def keep(self, text: str) -> str:
        """What remains of the text's next part; the short line's blanks do, as llama.cpp leaves them."""
        if self.crossed:
            return ""
        grown = self._blanks + text
        for beginning in _BEGINNING.finditer(grown):
            if len(beginning[1]) < self._indent:
                self.crossed = True
                return grown[len(self._blanks) : beginning.end()]
        tail = grown[grown.rfind("\n") :] if "\n" in grown else ""
        self._blanks = "" if tail.strip(" \t\n") else tail
        return text
