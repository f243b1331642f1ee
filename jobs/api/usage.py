"""``/v1/usage``: what a tenant used, by day, model, key and job; an admin sees any tenant's."""

from dataclasses import asdict
from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from serving.api.parts import WhoCalls
from serving.api.replies import READ, documented
from serving.errors import ForbiddenError, UsageError
from serving.tenants.caller import Caller
from serving.tenants.store import TenantStore
from serving.tenants.usage import DIMENSIONS, Dimension, UsageFilter, UsageLine

EVERYBODY = "*"
TEXT = r"^[A-Za-z0-9*][A-Za-z0-9._*-]{0,63}$"

Wanted = Annotated[str | None, Query(pattern=TEXT)]


class Used(BaseModel):
    """Sums; what the report is not parted by is empty, and so is ``job`` for what people asked for themselves."""

    tenant: str
    day: str
    model: str
    key: str
    job: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    requests: int


class UsageReport(BaseModel):
    """What was used, ordered by what it is parted by."""

    object: Literal["list"] = "list"
    data: list[Used]


def seen_tenant(who: Caller, wanted: str | None) -> str | None:
    """Whose usage a caller may see, None for everybody's; raises ``ForbiddenError``, whoever there is."""
    if wanted is None or wanted == who.tenant:
        return who.tenant
    if who.role != "admin":
        raise ForbiddenError("Only an admin sees other tenants' usage.", remedy="Leave tenant out.")
    return None if wanted == EVERYBODY else wanted


def dimensions_of(by: str) -> list[Dimension]:
    """``day,model`` and the like, in the order of reports; raises ``UsageError`` for an unknown one."""
    names = by.split(",")
    if unknown := sorted(set(names) - set(DIMENSIONS)):
        raise UsageError(f"by names {', '.join(unknown)}.", remedy=f"Known: {','.join(DIMENSIONS)}.")
    return [name for name in DIMENSIONS if name in names]


def router(store: TenantStore, caller: WhoCalls) -> APIRouter:
    """The route; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(tags=["Usage"])

    @routes.get("/v1/usage", response_model=UsageReport, responses=documented(400, *READ))
    def usage(
        who: Annotated[Caller, Depends(caller)],
        tenant: Annotated[str | None, Query(pattern=TEXT, description="For admins: a name, or `*` for all.")] = None,
        by: Annotated[str, Query(max_length=64, description="Any of tenant,day,model,key,job.")] = ",".join(DIMENSIONS),
        key: Wanted = None,
        job: Wanted = None,
        since: date | None = None,
        until: date | None = None,
    ) -> UsageReport:
        """Tokens and requests, of the days from `since` to `until` in UTC."""
        wanted = UsageFilter(seen_tenant(who, tenant), key, job, since, until)
        lines: list[UsageLine] = store.usage(dimensions_of(by), wanted)
        return UsageReport(data=[Used(**asdict(line)) for line in lines])

    return routes
