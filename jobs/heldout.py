"""Which modules of the standard library the demo model has never seen."""

import hashlib

HELD_OUT_SHARE = 0.05


def held_out(path: str) -> bool:
    """Whether the module at ``path`` (POSIX, relative to the standard library) is kept from training, by its hash."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT_SHARE * 2**32
