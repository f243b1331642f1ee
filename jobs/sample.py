"""A sample of a job's input, made into prompts as ``run`` makes them: what the rows weigh, without an engine."""

import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from jobs.job import open_input
from jobs.plan import Unit, plan_units
from jobs.reader import InputSet, UnitReader
from jobs.rows import row_prompts
from jobs.sharing import ideal_cached_share, share_inside
from jobs.spec import ROLES, JobSpec
from serving.engine_args import CPU_BLOCK_SIZE
from serving.errors import InputError
from serving.formats import Format, Prompt
from serving.models import resolve_model

STRETCH_ROWS = 250
BLOCK_SIZE = 16
"""Tokens of a block of vLLM's KV cache on a GPU."""


@dataclass(frozen=True)
class Sample:
    """What a sample tells of an input: lengths in tokens, shares from 0 to 1.

    ``cached_share`` is the ideal one at ``block_size`` when only rows of one unit share (a job orders rows inside its
    units), ``cached_share_cpu`` the same at the block size on a CPU, ``cached_share_all`` when all sampled
    rows share, ``cached_share_all_cpu`` that on a CPU. ``rows`` are those of the input, from its footers.
    ``twin_share`` of the prompts are those of other rows, whose answers a job gives them; lengths and shares are of the
    others. Each of these has ``n`` completions, of which all but the first share the prompt's whole blocks,
    ``shared_share`` of its tokens.
    """

    rows: int
    sampled_rows: int
    stretches: int
    prompt_tokens_mean: float
    prompt_tokens_p50: int
    prompt_tokens_p90: int
    prompt_tokens_p99: int
    prompt_tokens_max: int
    truncated_share: float
    error_share: float
    twin_share: float
    n: int
    shared_share: float
    block_size: int
    cached_share: float
    cached_share_cpu: float
    cached_share_all: float
    cached_share_all_cpu: float

    @property
    def completions(self) -> float:
        """What engines generate: nothing for bad input and second rows of one prompt, ``n`` for all others."""
        return self.rows * (1 - self.error_share) * (1 - self.twin_share) * self.n


def stretches(units: Iterable[Unit], *, sample: int) -> list[Unit]:
    """Some ``sample`` rows of the units: whole stretches of ``STRETCH_ROWS`` consecutive rows, evenly spread.

    A stretch that crosses the end of a unit is cut there. All rows when there are no more than ``sample``.
    """
    units = list(units)
    rows = sum(unit.rows for unit in units)
    if rows <= sample:
        return [unit for unit in units if unit.rows]
    count = max(1, sample // STRETCH_ROWS)
    length = sample // count
    starts = [(2 * i + 1) * rows // (2 * count) - length // 2 for i in range(count)]
    return list(parts_of(units, [(max(0, start), max(0, start) + length) for start in starts]))


def parts_of(units: Sequence[Unit], ranges: Sequence[tuple[int, int]]) -> Iterator[Unit]:
    """Ranges of rows, counted over all units, as parts of units; both ascend."""
    at = number = 0
    for unit in units:
        end = at + unit.rows
        while number < len(ranges) and ranges[number][0] < end:
            start, stop = ranges[number]
            first, last = max(start, at), min(stop, end)
            if first < last:
                yield replace(unit, start=unit.start + first - at, stop=unit.start + last - at)
            if stop > end:
                break
            number += 1
        at = end


def read_sample(spec: JobSpec, *, sample: int) -> Sample:
    """Read some ``sample`` rows of a job's input; nothing is started, fetched or written.

    Raises a ``UsageError`` for what ``run`` refuses as well (model, but for missing weights, format, budget, input,
    columns), and ``InputError`` when no sampled row has a prompt.
    """
    model = resolve_model(spec.model, format=spec.format, revision=spec.revision, weights=False)
    context = spec.max_model_len or model.context
    spec, fmt, inputs = open_input(spec, model.format, context)
    units = plan_units(inputs.files, rows_per_part=spec.unit_rows, limit=spec.limit)
    taken = stretches(units, sample=sample)
    return _measure(spec, inputs, taken, [_prompts(spec, fmt, context, inputs, unit) for unit in taken])


def _prompts(spec: JobSpec, fmt: Format, context: int, inputs: InputSet, unit: Unit) -> list[Prompt]:
    columns = [name for name in map(spec.column, ROLES) if name in inputs.schema.names]
    batches = UnitReader(inputs.root, columns).read(inputs.files[unit.file], unit)
    made = (prompt for batch in batches for _, prompt in row_prompts(spec, fmt, context, batch))
    return [prompt for prompt in made if isinstance(prompt, Prompt)]


def _measure(spec: JobSpec, inputs: InputSet, taken: Sequence[Unit], prompts: Sequence[Sequence[Prompt]]) -> Sample:
    by_unit: dict[int, list[Sequence[int]]] = {}
    known, count = set[tuple[int, bytes]](), sum(map(len, prompts))
    for unit, made in zip(taken, prompts, strict=True):
        own = by_unit.setdefault(unit.index, [])
        for prompt in made:
            key = 0 if spec.order == "global" else unit.index, array.array("I", prompt.token_ids).tobytes()
            if spec.temperature > 0 or key not in known:
                own.append(prompt.token_ids)
                known.add(key)
    ids = [token_ids for group in by_unit.values() for token_ids in group]
    if not ids:
        raise InputError(
            f"{inputs.root}: no sampled row has a prompt.", remedy="Check the input with spanfill explain."
        )
    lengths = sorted(map(len, ids))
    groups = [group for group in by_unit.values() if group]
    tokens, sampled = sum(lengths), sum(unit.rows for unit in taken)

    def again(block_size: int) -> float:
        """The share that a prompt's further completions find in the cache."""
        return sum((length - 1) // block_size * block_size for length in lengths) / tokens

    def of_all(first: float, block_size: int) -> float:
        """The share of all completions' prompts, where ``first`` is that of each prompt's first one."""
        return (first + (spec.n - 1) * again(block_size)) / spec.n

    return Sample(
        rows=min(inputs.rows, spec.limit or inputs.rows),
        sampled_rows=sampled,
        stretches=len(taken),
        prompt_tokens_mean=tokens / len(lengths),
        prompt_tokens_p50=_percentile(lengths, 50),
        prompt_tokens_p90=_percentile(lengths, 90),
        prompt_tokens_p99=_percentile(lengths, 99),
        prompt_tokens_max=lengths[-1],
        truncated_share=sum(prompt.truncated for made in prompts for prompt in made) / count,
        error_share=1 - count / sampled,
        twin_share=1 - len(lengths) / count,
        n=spec.n,
        shared_share=again(BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        cached_share=of_all(share_inside(groups, BLOCK_SIZE), BLOCK_SIZE),
        cached_share_cpu=of_all(share_inside(groups, CPU_BLOCK_SIZE), CPU_BLOCK_SIZE),
        cached_share_all=of_all(ideal_cached_share(ids, BLOCK_SIZE), BLOCK_SIZE),
        cached_share_all_cpu=of_all(ideal_cached_share(ids, CPU_BLOCK_SIZE), CPU_BLOCK_SIZE),
    )


def _percentile(ordered: Sequence[int], percent: int) -> int:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
