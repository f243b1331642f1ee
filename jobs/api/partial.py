"""What a work's unfinished units used, by their journals: it counts once the work has ended without them."""

from collections.abc import Iterator

from jobs.api.groups import group_spec
from jobs.api.journaled import Journaled, cached_tokens, made_by, made_tokens, planned_ledger
from jobs.api.order import Order, Plan, UnitUsage, WorkFolder
from jobs.job import open_input
from jobs.rows import row_prompts
from jobs.score import score_prompts
from jobs.spec import JobSpec
from jobs.store import locate
from serving.formats import Prompt


def partial_usage(order: Order, folder: WorkFolder) -> Iterator[UnitUsage]:
    """The usage of each unit that has answers and no part.

    Raises a ``UsageError`` for an input that cannot be read any more, ``OutputError``, ``StorageError``.
    """
    for number, _ in folder.begun():
        yield from _of_job(number, _spec(order, folder, number))


def _spec(order: Order, folder: WorkFolder, number: int) -> JobSpec:
    if order.kind == "job":
        return order.spec(order.source, folder.results(), dict(order.options))
    plan = Plan.model_validate_json(folder.plan.read_bytes())
    return group_spec(order, folder, number, plan.groups[number])


def _of_job(number: int, spec: JobSpec) -> Iterator[UnitUsage]:
    ledger = planned_ledger(locate(spec.output))
    if ledger is None:
        return
    model, name, context = made_by(locate(spec.output))
    spec, fmt, inputs = open_input(spec.model_copy(update={"model": model}), name, context)
    columns = [name for role in spec.roles if (name := spec.column(role)) in inputs.schema.names]
    journaled, done = Journaled(ledger, spec.input, columns, spec.n), ledger.done()
    make = score_prompts if spec.task == "score" else row_prompts
    for unit in ledger.planned():
        if unit.index in done:
            continue
        used = UnitUsage(name=f"{number}/{unit.index}")
        for batch, found in journaled.rows(unit):
            for (_, prompt), samples in zip(make(spec, fmt, context, batch), found, strict=True):
                if isinstance(prompt, Prompt) and samples[0].error_code is None:
                    length, made = len(prompt.token_ids), sum(map(made_tokens, samples))
                    used = used.with_row(length, cached_tokens(samples, length), made)
        if used.rows:
            yield used
