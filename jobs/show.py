"""Infills for human eyes: prefix, infill and suffix in one coloured text."""

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from jobs.ledger import read_job
from jobs.store import list_files, locate
from serving.errors import InputError

CONTEXT_LINES = 6


def colour(
    prefix: str, infill: str, suffix: str | None, *, middle: str | None = None, lines: int = CONTEXT_LINES
) -> Group:
    """The infill in green between the last ``lines`` of the prefix and the first of the suffix, both dim.

    Where the true ``middle`` is known and differs, it follows as a line of its own.
    """
    text = Text()
    text.append("".join(prefix.splitlines(keepends=True)[-lines:]), style="dim")
    text.append(infill, style="bold green")
    text.append("".join((suffix or "").splitlines(keepends=True)[:lines]), style="dim")
    if middle is None or infill.strip() == middle.strip():
        return Group(text)
    truth = Text("true middle: ", style="italic")
    truth.append(middle, style="yellow")
    return Group(text, truth)


def infill_rows(output: str, *, row: int | None = None, limit: int = 5) -> Iterator[dict[str, Any]]:
    """Rows of a job's finished parts: the first ``limit``, or the one that stands at ``row`` in the output.

    Raises ``OutputError`` if the folder is no job's, ``InputError`` if it has no such row.
    """
    location = locate(output)
    read_job(location)
    at = 0
    for info in list_files(location.join("data")):
        with location.fs.open_input_file(info.path) as source:
            file = pq.ParquetFile(source)
            rows = file.metadata.num_rows
            if row is not None and at + rows <= row:
                at += rows
                continue
            for batch in file.iter_batches(1_024):
                for values in batch.to_pylist():
                    if row is None or at == row:
                        yield values
                        limit -= 1
                        if row is not None or limit == 0:
                            return
                    at += 1
    if row is not None:
        raise InputError(f"{output} has {at} finished rows, no row {row}.", remedy=f"Choose 0 to {at - 1}.")


def panels(output: str, *, row: int | None = None, limit: int = 5) -> Iterator[Panel]:
    """``infill_rows`` as panels for the terminal."""
    columns = read_job(locate(output))["spec"]["columns"]
    prefix, suffix = columns.get("prefix", "prefix"), columns.get("suffix", "suffix")
    for values in infill_rows(output, row=row, limit=limit):
        title = f"{values.get('id', '')} · {values['finish_reason']} · {values['completion_tokens']} tokens"
        shown = colour(values.get(prefix) or "", values["infill"], values.get(suffix), middle=values.get("middle"))
        yield Panel(shown, title=title, title_align="left")
