"""What the commands for tenants and keys print."""

import json
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPED_WIDTH = 300
"""Characters of a line at most that is not for a terminal: an id that is cut off is of no use to a script."""


def print_key(text: str, about: dict[str, Any], json_: bool) -> None:
    """A new key alone on stdout, so that a shell can take it, or with what is known of it as one JSON object."""
    if json_:
        print(json.dumps({"key": text} | about))
        return
    print(text)
    Console(stderr=True).print(
        f"key {about['name']} of {about['tenant']}, id {about['id']}: keep it now, it is shown only once",
        highlight=False,
        soft_wrap=True,
    )


def print_rows(kind: str, rows: list[dict[str, Any]], json_: bool) -> None:
    """Rows with the same names as a table, or as one JSON object; columns that no row has anything in are left out."""
    if json_:
        print(json.dumps({kind: rows}))
        return
    if not rows:
        Console(stderr=True).print(f"no {kind}", highlight=False)
        return
    table = Table()
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for name in names:
        table.add_column(name.replace("_", " "), no_wrap=name in ("id", "name", "tenant", "key"))
    for row in rows:
        table.add_row(*(escape(_shown(name, row[name])) for name in names))
    console = Console()
    (console if console.is_terminal else Console(width=PIPED_WIDTH)).print(table)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in ("created", "expires", "revoked", "last_used"):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
