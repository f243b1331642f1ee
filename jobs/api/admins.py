"""What an admin may see and end besides its own tenant's: usage, batches and jobs of all."""

from typing import Annotated

from fastapi import Query

from serving.errors import ForbiddenError
from serving.tenants.caller import Caller

EVERYBODY = "*"
TEXT = r"^[A-Za-z0-9*][A-Za-z0-9._*-]{0,63}$"

OfTenant = Annotated[str | None, Query(pattern=TEXT, description="For admins: a name, or `*` for all.")]


def seen_tenant(who: Caller, wanted: str | None) -> str | None:
    """Of whom a caller may see what it asks for, None for everybody; raises ``ForbiddenError``, whoever there is."""
    if wanted is None or wanted == who.tenant:
        return who.tenant
    if who.role != "admin":
        raise ForbiddenError("Only an admin sees what is other tenants'.", remedy="Leave tenant out.")
    return None if wanted == EVERYBODY else wanted


def ended_tenant(who: Caller) -> str | None:
    """Whose batches and jobs a caller may end, None for everybody's."""
    return None if who.role == "admin" else who.tenant
