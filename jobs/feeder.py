"""A feeder: takes units through read, tokenise, order, dispatch, journal and write; a Ray actor."""

import array
import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from jobs.dispatch import Dispatcher
from jobs.ledger import Ledger, Sample, Tally
from jobs.order import cut, prefix_order, sort_key
from jobs.plan import InputFile, Unit
from jobs.reader import UnitReader, texts
from jobs.rows import PromptFacts, output_columns, row_prompts, row_seeds, to_samples
from jobs.spec import JobSpec
from jobs.store import Location
from jobs.writer import error_columns, part_writer, passed_through
from serving.formats import Format, load_format
from serving.protocol import MicroBatch, MicroBatchResult, Request, Sampling

JOURNAL_SECONDS = 5.0
EXAMPLES = 3
WRITE_ROWS = 2_048


@dataclass(frozen=True)
class FeederConfig:
    """What every feeder of a job needs; picklable."""

    spec: JobSpec
    input: Location
    output: Location
    fingerprint: str
    format: str
    tokenizer: str
    max_model_len: int
    schema: pa.Schema
    kept: tuple[str, ...]
    metadata: dict[str, Any]


@dataclass(slots=True)
class UnitWork:
    """A unit under way; rows are counted within the unit."""

    unit: Unit
    file: InputFile
    facts: list[PromptFacts | None] = field(default_factory=list)
    prompts: "list[array.array[int] | None]" = field(default_factory=list)
    seeds: list[tuple[int, ...]] = field(default_factory=list)
    ids: set[Any] = field(default_factory=set)
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    journaled: set[int] = field(default_factory=set)
    replayed: int = 0
    tally: Tally = field(default_factory=Tally)


class Feeder:
    """Runs units, several at a time, through one window of micro-batches."""

    def __init__(self, config: FeederConfig) -> None:
        self._config = config
        self._spec = config.spec
        self._format: Format = load_format(config.format, tokenizer_of=config.tokenizer)
        self._reader = UnitReader(config.input, config.schema.names)
        self._reading = asyncio.Lock()
        self._ledger = Ledger(config.output, config.fingerprint)
        self._ready = asyncio.Event()
        self._dispatcher: Dispatcher | None = None
        self._live = Tally()
        self._examples: list[dict[str, str]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._said: list[str] = []
        self._sampling = Sampling(
            max_tokens=self._spec.max_tokens,
            temperature=self._spec.temperature,
            top_p=self._spec.top_p,
            stop_token_ids=self._format.stop_token_ids,
            logprobs="mean_logprob" in self._spec.extra_columns,
        )

    async def attach(self, deployment: str, app: str, window: int) -> None:
        """Begin to call the application's replicas, at most ``window`` micro-batches at a time."""
        from ray import serve

        handle = serve.get_deployment_handle(deployment, app_name=app)

        async def call(batch: MicroBatch) -> MicroBatchResult:
            result: MicroBatchResult = await handle.generate.remote(batch)
            return result

        self._dispatcher = Dispatcher(call, window=window, max_attempts=self._spec.max_attempts)
        self._ready.set()

    async def progress(self) -> tuple[Tally, list[dict[str, str]], list[str]]:
        """Sums over the rows finished so far, a few infills, and what must be told; the latter only once."""
        said, self._said = self._said, []
        retries = self._dispatcher.retries if self._dispatcher else 0
        return replace(self._live, retries=retries), self._examples, said

    async def stop(self) -> None:
        """Abandon what is in flight; what is finished is journaled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def run(self, unit: Unit, file: InputFile) -> Tally:
        """Take one unit from its rows to its part; returns its sums."""
        task = asyncio.ensure_future(self._run(unit, file))
        self._tasks.add(task)
        try:
            return await task
        finally:
            self._tasks.discard(task)

    async def _run(self, unit: Unit, file: InputFile) -> Tally:
        started = time.monotonic()
        work = UnitWork(unit, file)
        async with self._reading:
            await asyncio.to_thread(self._prepare, work)
        await self._ready.wait()
        journal = asyncio.create_task(self._keep_journal(work))
        try:
            await self._answer(work)
        finally:
            journal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await journal
            if len(work.samples) < unit.rows:
                await asyncio.to_thread(self._journal, work)
        work.tally.seconds = time.monotonic() - started
        async with self._reading:
            await asyncio.to_thread(self._finish, work)
        return work.tally

    def _prepare(self, work: UnitWork) -> None:
        for sample in self._replay(work.unit):
            work.samples.setdefault(sample.row - work.unit.start, []).append(sample)
        work.samples = {row: found for row, found in work.samples.items() if self._complete(found)}
        work.journaled = set(work.samples)
        for found in work.samples.values():
            self._count(found)
        for batch in self._reader.read(work.file, work.unit):
            self._prepare_batch(work, batch)

    def _replay(self, unit: Unit) -> list[Sample]:
        samples, damaged = self._ledger.replay(unit.index)
        self._said += [
            f"journal segment {name} is damaged; it was set aside and its rows run again" for name in damaged
        ]
        return samples

    def _complete(self, samples: list[Sample]) -> bool:
        return samples[0].error_code is not None or len({s.sample for s in samples}) == self._spec.n

    def _prepare_batch(self, work: UnitWork, batch: pa.RecordBatch) -> None:
        prompts = row_prompts(self._spec, self._format, self._config.max_model_len, batch)
        name = self._spec.column("id")
        ids = batch.column(name).to_pylist() if name in batch.schema.names else [None] * batch.num_rows
        for prompt, identity in zip(prompts, ids, strict=True):
            row = len(work.facts)
            source = work.unit.start + row
            if isinstance(prompt, Exception):
                work.facts.append(None)
                work.prompts.append(None)
                error = Sample(source, 0, [], error_code=prompt.code, error_message=str(prompt), attempts=0)
                if row not in work.samples:
                    work.samples[row] = [error]
                    self._count([error])
            else:
                length = len(prompt.token_ids)
                work.facts.append(PromptFacts(length, prompt.prefix_chars, prompt.suffix_chars, prompt.truncated))
                work.prompts.append(None if row in work.samples else array.array("i", prompt.token_ids))
            key = f"{work.file.name}:{source}" if identity is None else str(identity)
            if identity is not None:
                work.tally.repeated_ids += identity in work.ids
                work.ids.add(identity)
            work.seeds.append(row_seeds(self._spec, key, source))

    async def _answer(self, work: UnitWork) -> None:
        batches = self._micro_batches(work)
        try:
            async with asyncio.TaskGroup() as group:
                for rows in batches:
                    group.create_task(self._send(work, rows))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _micro_batches(self, work: UnitWork) -> list[list[int]]:
        rows = [row for row, prompt in enumerate(work.prompts) if prompt is not None]
        size = self._spec.batch_rows
        if self._spec.order == "input":
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        keys = [sort_key(prompt) for row in rows if (prompt := work.prompts[row]) is not None]
        return [[rows[i] for i in batch] for batch in cut(keys, prefix_order(keys), size)]

    async def _send(self, work: UnitWork, rows: list[int]) -> None:
        assert self._dispatcher is not None
        requests = [Request(row, work.prompts[row] or (), work.seeds[row]) for row in rows]
        for replica, result, attempts in await self._dispatcher.send(requests, self._sampling):
            row = result.key
            work.prompts[row] = None
            work.samples[row] = to_samples(result, work.unit.start + row, attempts)
            work.tally.cached_tokens += result.cached_tokens
            self._live.cached_tokens += result.cached_tokens
            fact = work.facts[row]
            self._live.prompt_tokens += (fact.prompt_tokens if fact else 0) * len(result.completions)
            self._live.truncated += bool(fact and fact.truncated)
            for tally in (work.tally, self._live):
                if replica:
                    tally.replicas[replica] = tally.replicas.get(replica, 0) + 1
            self._count(work.samples[row])

    def _count(self, samples: list[Sample]) -> None:
        live = self._live
        live.rows += 1
        code = samples[0].error_code
        if code is not None:
            live.errors += 1
            live.error_codes[code] = live.error_codes.get(code, 0) + 1
            return
        for sample in samples:
            live.samples += 1
            live.completion_tokens += len(sample.token_ids)
            live.empty += not sample.token_ids
            reason = self._format.finish_reason(sample.stop_token_id)
            live.finish_reasons[reason] = live.finish_reasons.get(reason, 0) + 1
        if len(self._examples) < EXAMPLES and samples[0].token_ids:
            infill = self._format.infill(samples[0].token_ids, stop_token_id=samples[0].stop_token_id)
            self._examples.append({"row": str(samples[0].row), "infill": infill.text, "reason": infill.finish_reason})

    async def _keep_journal(self, work: UnitWork) -> None:
        while True:
            await asyncio.sleep(JOURNAL_SECONDS)
            await asyncio.to_thread(self._journal, work)

    def _journal(self, work: UnitWork) -> None:
        rows = [row for row in list(work.samples) if row not in work.journaled]
        self._ledger.journal(work.unit.index, [sample for row in rows for sample in work.samples[row]])
        work.journaled.update(rows)

    def _finish(self, work: UnitWork) -> None:
        spec, tally = self._spec, work.tally
        digests: dict[str, str] = {}
        part, errors = self._ledger.part(work.unit.index), self._ledger.errors(work.unit.index)
        failed = [row for row, found in work.samples.items() if found[0].error_code is not None]
        if failed:
            with part_writer(errors, spec.compression, self._config.metadata) as writer:
                for batch, first in self._batches(work):
                    self._write_errors(work, batch, first, writer)
                digests[errors.path.rsplit("/", 2)[-2] + "/" + errors.path.rsplit("/", 1)[-1]] = writer.close()
        with part_writer(part, spec.compression, self._config.metadata) as writer:
            for batch, first in self._batches(work):
                self._write_rows(work, batch, first, writer)
            digests["data/" + part.path.rsplit("/", 1)[-1]] = writer.close()
            tally.rows = work.unit.rows
            self._ledger.write_report(work.unit.index, tally, digests)
        self._ledger.drop_journal(work.unit.index)

    def _batches(self, work: UnitWork) -> Iterator[tuple[pa.RecordBatch, int]]:
        first = 0
        if work.unit.rows == 0:
            yield pa.RecordBatch.from_pylist([], self._config.schema), 0
        reader = UnitReader(self._config.input, self._config.schema.names)
        for batch in reader.read(work.file, work.unit):
            yield batch, first
            first += batch.num_rows

    def _write_rows(self, work: UnitWork, batch: pa.RecordBatch, first: int, writer: Any) -> None:
        spec = self._spec
        prefixes = texts(batch.column(spec.column("prefix")))
        suffix = spec.column("suffix")
        suffixes = texts(batch.column(suffix)) if suffix in batch.schema.names else [None] * batch.num_rows
        rows, samples, facts, pairs = [], [], [], []
        for row in range(batch.num_rows):
            fact = work.facts[first + row]
            found = sorted(work.samples[first + row], key=lambda s: s.sample)
            if fact is None or found[0].error_code is not None:
                continue
            work.tally.prompt_tokens += fact.prompt_tokens * len(found)
            rows += [row] * len(found)
            samples += found
            facts += [fact] * len(found)
            pairs += [(prefixes[row], suffixes[row])] * len(found)
        added = output_columns(spec, self._format, facts, pairs, samples, work.file.name, work.tally)  # type: ignore[arg-type]
        writer.write(pa.table(passed_through(batch, self._config.kept, rows) | added))

    def _write_errors(self, work: UnitWork, batch: pa.RecordBatch, first: int, writer: Any) -> None:
        rows, samples = [], []
        for row in range(batch.num_rows):
            sample = work.samples[first + row][0]
            if sample.error_code is None:
                continue
            rows.append(row)
            samples.append(sample)
            work.tally.errors += 1
            work.tally.error_codes[sample.error_code] = work.tally.error_codes.get(sample.error_code, 0) + 1
        writer.write(pa.table(error_columns(batch, self._config.kept, rows, samples, work.file.name)))
