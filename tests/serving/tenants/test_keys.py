"""The text of a key."""

import base64
import re

import pytest

from serving.tenants.key_text import DECOY_HASH, matches, new_key, parse_key


def test_a_key_has_a_public_id_and_256_random_bits() -> None:
    key = new_key()
    assert re.fullmatch(r"sf_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", key.text)
    assert len(base64.urlsafe_b64decode(f"{key.secret}=")) == 32
    assert len({new_key().text for _ in range(100)}) == 100


def test_a_key_is_read_back_whatever_its_secret_holds() -> None:
    for _ in range(200):  # Some secrets hold underscores, which part a key's text too.
        key = new_key()
        assert parse_key(key.text) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sf_",
        "sk-1234",
        f"sf_{'0' * 16}",
        f"sf_{'0' * 16}_{'a' * 42}",
        f"sf_{'0' * 16}_{'a' * 44}",
        f"sf_{'0' * 16}_{'a' * 43}\n",
        f" sf_{'0' * 16}_{'a' * 43}",
        f"sf_{'0' * 15}g_{'a' * 43}",
        f"sf_{'0' * 15}\u0660_{'a' * 43}",
        f"sf_{'0' * 16}_{'a' * 42}\u00e9",
    ],
)
def test_what_is_not_formed_like_a_key_is_none(text: str) -> None:
    assert parse_key(text) is None


def test_a_rotated_key_keeps_its_public_id() -> None:
    key = new_key()
    other = new_key(key.public_id)
    assert other.public_id == key.public_id
    assert other.secret != key.secret


def test_only_its_own_secret_matches_a_hash() -> None:
    key, other = new_key(), new_key()
    assert matches(key, key.secret_hash)
    assert not matches(other, key.secret_hash)
    assert not matches(key, DECOY_HASH)


def test_printing_a_key_does_not_tell_the_secret() -> None:
    key = new_key()
    assert key.secret not in repr(key)
