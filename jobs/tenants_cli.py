"""``spanfill tenants`` and ``spanfill keys``: who may use the API, how much of it, and what they used. Thin."""

import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.answers import print_key, print_rows
from serving.errors import UsageError

if TYPE_CHECKING:
    from serving.tenants.store import TenantStore
    from serving.tenants.terms import Terms

tenants = typer.Typer(help="Tenants of the API: fair share, limits, models, usage.", no_args_is_help=True)
keys = typer.Typer(help="Keys of tenants, each with limits and usage of its own.", no_args_is_help=True)

UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
MOST_SECONDS = 100 * 365 * 86_400

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Name = Annotated[str, typer.Argument(help="The tenant's name.")]
KeyId = Annotated[str, typer.Argument(help="The key's id, as `spanfill keys list` shows it, or the whole key.")]
Weight = Annotated[float | None, typer.Option(help="Share of a full fleet beside other tenants' (default: 1).")]
TokenLimit = Annotated[
    int | None, typer.Option("--tokens-per-minute", min=0, help="Prompt and completion tokens; 0: no limit.")
]
RequestLimit = Annotated[int | None, typer.Option("--requests-per-minute", min=0, help="0: no limit.")]
ConcurrencyLimit = Annotated[
    int | None, typer.Option("--max-concurrency", min=0, help="Requests at the same time; 0: no limit.")
]
Models = Annotated[str | None, typer.Option(help="The models that may be used, by comma, or all.")]
RoleName = Annotated[
    str,
    typer.Option(
        "--role",
        help="user or admin; by HTTP an admin sees all tenants' usage, and lists and cancels their batches and jobs.",
    ),
]
Expires = Annotated[str | None, typer.Option(help="How long the key is good, e.g. 12h, 30d or 8w (default: for ever).")]
OfTenant = Annotated[str | None, typer.Option("--tenant", help="Of this tenant alone.")]


@tenants.command(
    name="create",
    epilog="Example: spanfill tenants create acme --weight 2 --tokens-per-minute 100000 --max-concurrency 32",
)
def create_tenant(
    name: Name,
    weight: Weight = None,
    tokens_per_minute: TokenLimit = None,
    requests_per_minute: RequestLimit = None,
    max_concurrency: ConcurrencyLimit = None,
    models: Models = None,
    role: RoleName = "user",
    expires: Expires = None,
    json_: Json = False,
) -> None:
    """Make a tenant and its first key, named default, which is printed once; role and expiry are the key's."""
    from serving.tenants.terms import DEFAULT_TERMS, parse_role

    terms = _changed(DEFAULT_TERMS, weight, models, tokens_per_minute, requests_per_minute, max_concurrency)
    options: dict[str, Any] = {"role": parse_role(role), "expires": _time_after(expires)}
    with _store() as store:
        store.create_tenant(name, terms)
        key, text = store.create_key(name, **options)
    print_key(text, key.as_dict(), json_)


@tenants.command(name="list", epilog="Example: spanfill tenants list --json")
def list_tenants(json_: Json = False) -> None:
    """All tenants, revoked ones too."""
    with _store() as store:
        rows = [row.as_dict() for row in store.tenants()]
    print_rows("tenants", rows, json_)


@tenants.command(name="update", epilog="Example: spanfill tenants update acme --weight 3 --tokens-per-minute 0")
def update_tenant(
    name: Name,
    weight: Weight = None,
    tokens_per_minute: TokenLimit = None,
    requests_per_minute: RequestLimit = None,
    max_concurrency: ConcurrencyLimit = None,
    models: Models = None,
    json_: Json = False,
) -> None:
    """Change a tenant's share, limits or models; what is not named stays. Gateways follow within seconds."""
    with _store() as store:
        terms = store.tenant(name).terms
        terms = _changed(terms, weight, models, tokens_per_minute, requests_per_minute, max_concurrency)
        row = store.update_tenant(name, terms)
    print_rows("tenants", [row.as_dict()], json_)


@tenants.command(name="revoke", epilog="Example: spanfill tenants revoke acme")
def revoke_tenant(name: Name, json_: Json = False) -> None:
    """End a tenant: none of its keys is valid any more, within seconds and for good. Its usage is kept."""
    with _store() as store:
        row = store.revoke_tenant(name)
    print_rows("tenants", [row.as_dict()], json_)


@tenants.command(name="usage", epilog="Example: spanfill tenants usage --tenant acme --by day,model --since 2026-11-01")
def usage(
    tenant: OfTenant = None,
    by: Annotated[str, typer.Option(help="Any of tenant,day,model,key,job.")] = "tenant,day,model",
    key: Annotated[str | None, typer.Option(help="Of this key alone, by its id.")] = None,
    job: Annotated[str | None, typer.Option(help="Of this job alone.")] = None,
    since: Annotated[str | None, typer.Option(help="First day, YYYY-MM-DD, in UTC.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day, YYYY-MM-DD, in UTC.")] = None,
    json_: Json = False,
) -> None:
    """Tokens and requests that were used, by gateways of this machine that were killed too."""
    from serving.tenants.metering import collect
    from serving.tenants.usage import COUNTS, DIMENSIONS, UsageFilter

    wrong = set(by.split(",")) - set(DIMENSIONS)
    if wrong:
        raise UsageError(f"--by {by}: {', '.join(sorted(wrong))} is unknown.", remedy=f"Known: {','.join(DIMENSIONS)}.")
    parted = [name for name in DIMENSIONS if name in by.split(",")]
    wanted = UsageFilter(tenant, key, job, _day(since, "--since"), _day(until, "--until"))
    with _store() as store:
        collect(store)
        lines = [asdict(line) for line in store.usage(parted, wanted)]
    print_rows("usage", [{name: line[name] for name in (*parted, *COUNTS)} for line in lines], json_)


@keys.command(name="create", epilog="Example: spanfill keys create --tenant acme --name ana --expires 30d")
def create_key(
    tenant: Annotated[str, typer.Option(help="The tenant's name.")],
    name: Annotated[str, typer.Option(help="Whose key it is, or what for.")],
    role: RoleName = "user",
    tokens_per_minute: TokenLimit = None,
    requests_per_minute: RequestLimit = None,
    max_concurrency: ConcurrencyLimit = None,
    expires: Expires = None,
    json_: Json = False,
) -> None:
    """Make another key of a tenant, which is printed once; its limits hold beside the tenant's."""
    from serving.tenants.caller import Limits
    from serving.tenants.terms import parse_role

    limits = Limits(tokens_per_minute or None, requests_per_minute or None, max_concurrency or None)
    options: dict[str, Any] = {"role": parse_role(role), "expires": _time_after(expires)}
    with _store() as store:
        key, text = store.create_key(tenant, name, limits=limits, **options)
    print_key(text, key.as_dict(), json_)


@keys.command(name="list", epilog="Example: spanfill keys list --tenant acme")
def list_keys(tenant: OfTenant = None, json_: Json = False) -> None:
    """Keys by tenant and name, revoked and expired ones too; no secret is shown."""
    with _store() as store:
        rows = [row.as_dict() for row in store.keys(tenant)]
    print_rows("keys", rows, json_)


@keys.command(name="revoke", epilog="Example: spanfill keys revoke 0123456789abcdef")
def revoke_key(key: KeyId, json_: Json = False) -> None:
    """End a key, within seconds and for good."""
    with _store() as store:
        row = store.revoke_key(_public_id(key))
    print_rows("keys", [row.as_dict()], json_)


@keys.command(name="rotate", epilog="Example: spanfill keys rotate 0123456789abcdef --grace 1h")
def rotate_key(
    key: KeyId,
    grace: Annotated[str, typer.Option(help="How long the former key stays good, e.g. 0s, 1h or 7d.")] = "24h",
    json_: Json = False,
) -> None:
    """Print a new key in the place of a known one, with its name, limits and usage."""
    seconds = _seconds(grace)
    with _store() as store:
        row, text = store.rotate_key(_public_id(key), grace=seconds)
    print_key(text, row.as_dict(), json_)


@contextmanager
def _store() -> Iterator["TenantStore"]:
    from serving.tenants.store import open_store

    with closing(open_store()) as store:
        yield store


def _changed(
    terms: "Terms", weight: float | None, models: str | None, tokens: int | None, requests: int | None, most: int | None
) -> "Terms":
    """Terms with what was given in the place of what they said; 0 and ``all`` take a limit away."""
    given = {"tokens_per_minute": tokens, "requests_per_minute": requests, "concurrency": most}
    limits = replace(terms.limits, **{name: value or None for name, value in given.items() if value is not None})
    terms = replace(terms, limits=limits, weight=terms.weight if weight is None else weight)
    if models is None:
        return terms
    names = tuple(name.strip() for name in models.split(",") if name.strip())
    return replace(terms, models=None if names == ("all",) else names)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,12})([smhdw])", text)
    seconds = int(found[1]) * UNITS[found[2]] if found else MOST_SECONDS + 1
    if seconds > MOST_SECONDS:
        raise UsageError(
            f"{text!r} is no length of time.",
            remedy="Write a number and a unit: 90s, 45m, 12h, 30d, 8w. A hundred years are the most.",
        )
    return float(seconds)


def _time_after(text: str | None) -> float | None:
    if text is None:
        return None
    seconds = _seconds(text)
    if seconds == 0:
        raise UsageError(f"--expires {text} is a key that is never good.", remedy="Give it some time, such as 30d.")
    return time.time() + seconds


def _day(text: str | None, option: str) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{option} {text} is no day.", remedy="Write it as 2026-11-30.") from None


def _public_id(text: str) -> str:
    from serving.tenants.key_text import parse_key

    key = parse_key(text)
    return text if key is None else key.public_id
