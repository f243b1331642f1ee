"""Which addresses a tenant may let the server read: those below a prefix that its operator allowed, and no others."""

import re
from collections.abc import Sequence

from serving.errors import ForbiddenError

PLAIN = re.compile(r"[A-Za-z0-9_.,=+@ /*-]*")
"""What may follow a prefix: no query and no fragment, where options of a store stand, and no second address."""


def check_address(uri: str, prefixes: Sequence[str]) -> None:
    """Raise ``ForbiddenError`` for what is not allowed, in the same words whatever is there."""
    for prefix in prefixes:
        rest = uri.removeprefix(prefix)
        if rest != uri and PLAIN.fullmatch(rest) and ".." not in rest.split("/"):
            return
    allowed = f"upload it, or name one below {', '.join(prefixes)}" if prefixes else "upload it"
    raise ForbiddenError("This input may not be read.", remedy=f"For a file of yours, {allowed}.")
