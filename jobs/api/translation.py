"""A batch's JSONL is read once: what is wrong with it, what its lines are answered at once, and rows for the jobs."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastapi.exceptions import RequestValidationError

from jobs.api.dialects import DIALECTS, check_ask
from jobs.api.groups import MOST_GROUPS, Groups, open_groups
from jobs.api.lines import MOST_LINE, BatchLine, Record, Refused, numbered, parse_line
from jobs.api.order import LineError, Order, Plan, WorkFolder
from jobs.store import locate, publish, publish_bytes
from serving.api.ask import Ask
from serving.api.checks import check_size
from serving.api.replies import openai_error, problem_of
from serving.errors import UsageError
from serving.formats import Format, load_format

MOST_ERRORS = 100
"""Wrong lines that are told; the rest of the batch is not read then."""


def plan_of(order: Order, folder: WorkFolder) -> Plan:
    """The batch's plan, made now unless an earlier process of the work has made it."""
    if folder.plan.exists():
        return Plan.model_validate_json(folder.plan.read_bytes())
    shutil.rmtree(folder.groups, ignore_errors=True)
    plan = translate(order, folder)
    publish_bytes(locate(str(folder.plan)), plan.model_dump_json().encode())
    return plan


def translate(order: Order, folder: WorkFolder) -> Plan:
    """Write the rows and records of a batch; raises ``StorageError``."""
    fmt = load_format(order.format, tokenizer_of=str(order.engine["model"]))
    with (
        Path(order.source).open("rb") as source,
        publish(locate(str(folder.lines))) as records,
        open_groups(order, folder) as groups,
    ):
        reading = _Reading(order, fmt, groups, records)
        errors = tuple(reading.errors(source))
        return Plan(
            total=reading.total,
            asking=reading.asking,
            prompts=reading.prompts,
            groups=groups.options,
            errors=errors,
        )


class TooManyWaysError(UsageError):
    """A line of its own way of decoding, which is one too many."""

    code = "too_many_options"


class _Reading:
    """One pass over the lines."""

    def __init__(self, order: Order, fmt: Format, groups: Groups, records: IO[bytes]) -> None:
        self.total = self.asking = self.prompts = 0
        self._order = order
        self._format = fmt
        self._dialect = DIALECTS[order.endpoint]
        self._groups = groups
        self._records = records
        self._seen: set[str] = set()
        self._model: object = None

    def errors(self, source: IO[bytes]) -> Iterator[LineError]:
        """Take all lines; gives what is wrong with the batch as such."""
        wrong = 0
        for number, raw in numbered(source):
            self.total += 1
            if self.total > self._order.most_lines:
                message = f"The batch has more than {self._order.most_lines:,} lines. Split it."
                yield LineError(code="too_many_tasks", message=message, line=number)
                return
            if (error := self._take(number, raw)) is not None:
                yield error
                wrong += 1
            if wrong == MOST_ERRORS or len(raw) > MOST_LINE:
                return
        if self.total == 0:
            yield LineError(code="empty_file", message="The file holds no line. Write one JSON object a line.")

    def _take(self, number: int, raw: bytes) -> LineError | None:
        line = parse_line(number, raw)
        error = line if isinstance(line, LineError) else self._misfit(number, line)
        if error is not None or isinstance(line, LineError):
            return error
        self._seen.add(line.custom_id)
        asked = self._asks(line)
        if isinstance(asked, Refused):
            self._keep(Record(line=number, custom_id=line.custom_id, refused=asked))
        else:
            self._keep(Record(line=number, custom_id=line.custom_id, prompts=len(asked)))
            self._groups.add(number, asked)
            self.asking, self.prompts = self.asking + 1, self.prompts + len(asked)
        return None

    def _misfit(self, number: int, line: BatchLine) -> LineError | None:
        """What makes a line no part of this batch."""
        if line.custom_id in self._seen:
            message = f"The custom_id {line.custom_id!r} is there twice. Give each line one of its own."
            return LineError(code="duplicate_custom_id", message=message, line=number, param="custom_id")
        if line.url != self._order.endpoint:
            message = f"The url is not the batch's endpoint, {self._order.endpoint}."
            return LineError(code="mismatched_url", message=message, line=number, param="url")
        return self._wrong_model(number, line.model or self._order.model)

    def _wrong_model(self, number: int, model: object) -> LineError | None:
        first, self._model = self._model, self._model or model
        if first is not None and model != first:
            message = "The model is not that of the lines before. A batch is for one model."
            return LineError(code="mismatched_model", message=message, line=number, param="body.model")
        if first is None and model not in (self._order.model, f"{self._order.model}:latest"):
            message = f"The model is not served here. There is: {self._order.model}."
            return LineError(code="model_not_found", message=message, line=number, param="body.model")
        return None

    def _asks(self, line: BatchLine) -> list[Ask] | Refused:
        try:
            asks = self._dialect.asks(line.body, self._order.served)
            check_size(asks)
            for ask in asks:
                check_ask(ask, self._format, self._order.context)
            if not self._groups.has_room_for(asks):
                raise TooManyWaysError(
                    f"Lines before this one are decoded in {MOST_GROUPS} ways already.",
                    remedy="Split the batch by max_tokens, temperature, stop and the like.",
                )
        except (RequestValidationError, UsageError) as error:
            problem = problem_of(error)
            return Refused(status=problem.status, body=openai_error(problem))
        return asks

    def _keep(self, record: Record) -> None:
        self._records.write(record.model_dump_json().encode() + b"\n")
