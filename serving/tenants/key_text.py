"""The text of a key, ``sf_<public id>_<secret>``: a database keeps the public id and the secret's hash.

A secret is 256 random bits, so one SHA-256 is hash enough: there is nothing to guess that a slow hash would protect.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

PATTERN = re.compile(r"sf_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
SECRET_BYTES = 32

DECOY_HASH = hashlib.sha256(secrets.token_bytes(SECRET_BYTES)).hexdigest()
"""What a secret is compared with where there is no such key, so that the answer takes as long."""


@dataclass(frozen=True, slots=True)
class KeyText:
    """A key as its owner holds it; printing the object does not tell the secret."""

    public_id: str
    secret: str = field(repr=False)

    @property
    def text(self) -> str:
        """What the owner sends."""
        return f"sf_{self.public_id}_{self.secret}"

    @property
    def secret_hash(self) -> str:
        """SHA-256 of the secret, in hexadecimal digits."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


def new_key(public_id: str | None = None) -> KeyText:
    """A key with a new secret (base64url), and a new public id (64 random bits) unless one is given."""
    return KeyText(public_id or secrets.token_hex(8), secrets.token_urlsafe(SECRET_BYTES))


def parse_key(text: str) -> KeyText | None:
    """What a text says if it is formed like a key, else None."""
    found = PATTERN.fullmatch(text)
    return KeyText(found[1], found[2]) if found else None


def matches(key: KeyText, secret_hash: str) -> bool:
    """Whether the key's secret has this hash; takes as long whatever the hash is."""
    return hmac.compare_digest(key.secret_hash, secret_hash)
