"""``/v1/usage``: what a tenant used, by day, model, key and job; an admin sees any tenant's."""

from dataclasses import asdict
from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from jobs.api.admins import TEXT, OfTenant, seen_tenant
from serving.api.parts import WhoCalls
from serving.api.replies import READ, documented
from serving.errors import UsageError
from serving.tenants.caller import Caller
from serving.tenants.store import TenantStore
from serving.tenants.usage import DIMENSIONS, Dimension, UsageFilter, UsageLine

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
        tenant: OfTenant = None,
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
