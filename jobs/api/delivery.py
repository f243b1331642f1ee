"""A batch's results as JSONL: a line of the output or of the errors for each line of the input, in its order.

What is written depends on the batch and on what its jobs made alone, so that a delivery that was cut short can be made
again.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

from jobs.api.dialects import DIALECTS, Heading
from jobs.api.groups import columns_of, group_spec
from jobs.api.lines import Record, read_records
from jobs.api.order import Mode, Order, Outcome, Plan, UnitUsage, WorkFolder
from jobs.api.results import Made, RowResult, group_results
from jobs.store import locate, publish
from serving.api.ask import Answer, Choice, Reason, Usage
from serving.api.events import encoded
from serving.errors import DamagedStateError

UNDONE: dict[Mode, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "This request was not executed: the batch was cancelled. Send it again."),
    "expired": ("batch_expired", "This request was not executed before the completion window ended. Send it again."),
}
"""What is said of lines that were not run."""


def deliver(order: Order, folder: WorkFolder, plan: Plan, mode: Mode) -> Outcome:
    """Write the output and the errors; raises ``DamagedStateError`` for a line of a finished batch without a result."""
    usage = _PartialUsage()
    completed = failed = 0
    with (
        folder.lines.open("rb") as lines,
        publish(locate(str(folder.output))) as output,
        publish(locate(str(folder.errors))) as errors,
    ):
        for record, rows in _beside(read_records(lines), _merged(order, folder, plan, usage)):
            told = _result(order, record, rows, mode)
            line = encoded(told).encode() + b"\n"
            if is_answer := (told["response"] or {}).get("status_code") == 200:
                output.write(line)
            else:
                errors.write(line)
            completed, failed = completed + is_answer, failed + (not is_answer)
    return Outcome(completed=completed, failed=failed, partial=usage.units)


class _PartialUsage:
    """Sums over the rows that come from journals, a unit at a time."""

    def __init__(self) -> None:
        self._units: dict[str, UnitUsage] = {}

    @property
    def units(self) -> tuple[UnitUsage, ...]:
        return tuple(self._units.values())

    def add(self, group: int, row: RowResult) -> None:
        """Count a row, if it is of a unit that was cut short and was made."""
        if row.unit is None or row.error is not None:
            return
        name = f"{group}/{row.unit}"
        before = self._units.get(name, UnitUsage(name=name))
        made = sum(made.tokens for made in row.made)
        self._units[name] = before.with_row(row.prompt_tokens, row.cached_tokens, made)


def _merged(order: Order, folder: WorkFolder, plan: Plan, usage: _PartialUsage) -> Iterable[RowResult]:
    """The rows of all groups in the order of the input."""
    columns = columns_of(can_infill=order.can_infill)

    def counted(group: int) -> Iterator[RowResult]:
        spec = group_spec(order, folder, group, plan.groups[group])
        for row in group_results(spec, columns):
            usage.add(group, row)
            yield row

    return heapq.merge(*map(counted, range(len(plan.groups))), key=lambda row: row.place)


def _beside(records: Iterable[Record], rows: Iterable[RowResult]) -> Iterator[tuple[Record, list[RowResult]]]:
    """Each line with the rows of it that are done."""
    groups = groupby(rows, key=lambda row: row.line)
    upcoming = next(groups, None)
    for record in records:
        found: list[RowResult] = []
        if upcoming is not None and upcoming[0] == record.line:
            found = list(upcoming[1])
            upcoming = next(groups, None)
        yield record, found


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a result, of which either part is there."""

    order: Order
    record: Record

    def told(self, response: dict[str, Any] | None, error: tuple[str, str] | None) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "id": f"batch_req_{self.digest}",
            "custom_id": self.record.custom_id,
            "response": response,
            "error": None if error is None else {"code": error[0], "message": error[1]},
        }

    def response(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        """What the endpoint would have answered."""
        return {"status_code": status, "request_id": f"req_{self.digest}", "body": body}

    @property
    def digest(self) -> str:
        """What tells the request from all others; the same whenever it is delivered."""
        return hashlib.blake2b(f"{self.order.id} {self.record.line}".encode(), digest_size=16).hexdigest()


def _result(order: Order, record: Record, rows: Sequence[RowResult], mode: Mode) -> dict[str, Any]:
    line = _Line(order, record)
    if record.refused is not None:
        return line.told(line.response(record.refused.status, record.refused.body), None)
    if errors := [row.error for row in rows if row.error is not None]:
        return line.told(None, errors[0])
    if len(rows) < record.prompts:
        if mode not in UNDONE:
            raise DamagedStateError(f"line {record.line} has no result.", remedy="Send the batch again.")
        return line.told(None, UNDONE[mode])
    heading = Heading(line.digest, order.began, order.model)
    body = DIALECTS[order.endpoint].body(_answer(rows), heading)
    return line.told(line.response(200, body.model_dump()), None)


def _answer(rows: Sequence[RowResult]) -> Answer:
    """One prompt's choices after the other's; what the prefix cache held of each is known of the batch alone."""
    made = [made for row in rows for made in row.made]
    usage = Usage(sum(row.prompt_tokens for row in rows), sum(one.tokens for one in made))
    return Answer(tuple(map(_choice, made)), usage)


def _choice(made: Made) -> Choice:
    return Choice(made.text, cast(Reason, made.reason))
