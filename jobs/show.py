"""Rows for human eyes: prefix, infill and suffix in one coloured text, or what was scored."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.segment import Segments

from jobs.ledger import read_job
from jobs.reader import SCORE_COLUMNS, is_text, texts
from jobs.spec import ROLES, SCORE_ROLES
from jobs.store import list_files, locate
from jobs.visible import styled, visible
from serving.errors import InputError

CONTEXT_LINES = 6
SHOWN_COLUMNS = ("middle", "infill", "finish_reason", "completion_tokens")
"""Beside those of the roles."""

SCORED_LINES = 2 * CONTEXT_LINES
"""Of a plain text that was scored."""


def colour(
    prefix: str, infill: str, suffix: str | None, *, middle: str | None = None, lines: int = CONTEXT_LINES
) -> Segments:
    """The infill in green between the last ``lines`` of the prefix and the first of the suffix, both dim.

    Where the true ``middle`` is known and differs, it follows as a line of its own.
    """
    before = "".join(visible(prefix).splitlines(keepends=True)[-lines:])
    after = "".join(visible(suffix or "").splitlines(keepends=True)[:lines])
    pieces = [(before, "dim"), (visible(infill), "bold green"), (after, "dim")]
    if not (before + infill + after).endswith("\n"):
        pieces.append(("\n", ""))
    if middle is not None and infill.strip() != middle.strip():
        pieces += [("true middle: ", "italic"), (visible(middle), "yellow"), ("\n", "")]
    return styled(*pieces)


def infill_rows(output: str, *, row: int | None = None, limit: int = 5) -> Iterator[dict[str, Any]]:
    """Rows of a job's finished parts: the first ``limit``, or the one that stands at ``row`` in the output.

    They hold the columns of the roles, and ``SHOWN_COLUMNS`` or ``SCORE_COLUMNS``. Raises ``OutputError`` if the folder
    is no job's, ``InputError`` if it has no such row.
    """
    location = locate(output)
    spec = read_job(location)["spec"]
    wanted = {*(SCORE_COLUMNS if _scores(spec) else SHOWN_COLUMNS), *_roles(spec).values()}
    at = 0
    for info in list_files(location.join("data")):
        with location.fs.open_input_file(info.path) as source:
            file = pq.ParquetFile(source)
            rows = file.metadata.num_rows
            if row is not None and at + rows <= row:
                at += rows
                continue
            names = [f.name for f in file.schema_arrow if f.name in wanted and not pa.types.is_nested(f.type)]
            for batch in file.iter_batches(1_024, columns=names):
                for values in _rows(batch):
                    if row is None or at == row:
                        yield values
                        limit -= 1
                        if row is not None or limit == 0:
                            return
                    at += 1
    if row is not None and at == 0:
        raise _no_rows(output)
    if row is not None:
        raise InputError(f"{output} has {at} finished rows, no row {row}.", remedy=f"Choose 0 to {at - 1}.")


def _no_rows(output: str) -> InputError:
    return InputError(f"{output} has no finished rows.", remedy=f"See how the job stands: spanfill status {output}")


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    columns = [_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """A column's values; bytes that are not UTF-8 are written ``\\xNN``."""
    if not is_text(column.type):
        return list(column.to_pylist())
    return [
        v.object.decode(errors="backslashreplace") if isinstance(v, UnicodeDecodeError) else v for v in texts(column)
    ]


def shown_rows(output: str, *, row: int | None = None, limit: int = 5) -> Iterator[Segments]:
    """``infill_rows`` for the terminal, each below a line that says which it is; raises as it does, also for none."""
    spec = read_job(locate(output))["spec"]
    roles, show = _roles(spec), _shown_score if _scores(spec) else _shown_infill
    none = True
    for values in infill_rows(output, row=row, limit=limit):
        none = False
        yield from show(values, roles)
    if none:
        raise _no_rows(output)


def _scores(spec: dict[str, Any]) -> bool:
    return bool(spec.get("task") == "score")


def _roles(spec: dict[str, Any]) -> dict[str, str]:
    """The columns of a stored job's roles."""
    return {role: spec["columns"].get(role, role) for role in (SCORE_ROLES if _scores(spec) else ROLES)}


def _shown_infill(values: dict[str, Any], roles: dict[str, str]) -> Iterator[Segments]:
    yield _title(values.get(roles["id"]), values["finish_reason"], f"{values['completion_tokens']} tokens")
    middle = values.get("middle")
    yield colour(
        values.get(roles["prefix"]) or "",
        values["infill"],
        values.get(roles["suffix"]),
        middle=middle if isinstance(middle, str) else None,
    )


def _shown_score(values: dict[str, Any], roles: dict[str, str]) -> Iterator[Segments]:
    """What was scored in green, as infills are: a middle, or the first lines of a text."""
    bits = values["bits_per_byte"]
    told = None if bits is None else f"{bits:.3f} bits per byte"
    yield _title(values.get(roles["id"]), f"{values['sum_logprob']:.3f} nats", f"{values['tokens']} tokens", told)
    prefix, suffix, middle, text = (values.get(roles[role]) or "" for role in ("prefix", "suffix", "middle", "text"))
    yield colour(prefix, middle or "".join(text.splitlines(keepends=True)[:SCORED_LINES]), suffix)


def _title(*told: Any) -> Segments:
    line = " · ".join(visible(str(fact)).replace("\n", "␊") for fact in told if fact is not None)
    return styled((f"── {line} ──\n", "bold"))
