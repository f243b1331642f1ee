"""What tenants and keys may be called and may use, checked before it is stored."""

import re
from dataclasses import dataclass

from serving.errors import UsageError
from serving.tenants.caller import Limits, Role

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Names end up in cache salts, labels of metrics and paths."""

NOBODY = "local"
"""Whose all is that is stored and used before there is a tenant; no tenant may have it for a name."""

NO_LIMITS = Limits()
MOST = 2**63 - 1
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1_000.0


@dataclass(frozen=True, slots=True)
class Terms:
    """A tenant's share of a full fleet by ``weight``, its limits, and the models that it may use (None: all)."""

    weight: float = 1.0
    limits: Limits = NO_LIMITS
    models: tuple[str, ...] | None = None


DEFAULT_TERMS = Terms()


def check_name(name: str, of: str) -> None:
    """Raise ``UsageError`` for a name that a tenant or key (``of``) cannot have."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a {of}.",
            remedy="Use up to 63 letters, digits, dots, dashes and underscores; begin with a letter or digit.",
        )


def check_limits(limits: Limits) -> None:
    """Raise ``UsageError`` for a limit under 1 or beyond 63 bits."""
    named = {
        "tokens per minute": limits.tokens_per_minute,
        "requests per minute": limits.requests_per_minute,
        "concurrency": limits.concurrency,
    }
    for name, value in named.items():
        if value is not None and not 1 <= value <= MOST:
            raise UsageError(f"A limit of {value} {name} is out of range.", remedy="Give 1 or more, or leave it out.")


def check_terms(terms: Terms) -> None:
    """Raise ``UsageError`` for a weight that is no share, a limit out of range, or an empty list of models."""
    if not LEAST_WEIGHT <= terms.weight <= MOST_WEIGHT:
        raise UsageError(
            f"A weight of {terms.weight} is no share.",
            remedy=f"Give a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:,g}; 1 is usual.",
        )
    if terms.models is not None and not all(terms.models or [""]):
        raise UsageError("The list of models is empty.", remedy="Name one at least, or leave it out to allow all.")
    check_limits(terms.limits)


def parse_role(text: str) -> Role:
    """A role by its name; raises ``UsageError``."""
    if text == "user":
        return "user"
    if text == "admin":
        return "admin"
    raise UsageError(f"{text!r} is no role.", remedy="A key's role is user or admin.")
