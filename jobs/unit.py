"""One unit's way from its rows to its part: read, tokenise, order, answer, journal, write. No engine, no event loop."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.digest import InputDigest
from jobs.journal import Sample
from jobs.lease import check_lease
from jobs.ledger import Ledger, Report
from jobs.order import TOKEN_BYTES, cut, grouped, ideal_cached_tokens, prefix_order, sort_key
from jobs.plan import InputFile, Unit
from jobs.reader import UnitReader, check_untouched, halved, held_bytes, origins
from jobs.rows import PromptFacts, facts_of, output_columns, role_values, row_prompts, row_seeds, row_untils, to_samples
from jobs.score import nothing_scored, score_columns, score_prompts
from jobs.spec import JobSpec
from jobs.store import Location, delete, exists, patient
from jobs.tally import Tally, count, timed
from jobs.windows import Windows, scored_sample, window_sizes, windows
from jobs.writer import error_columns, part_writer, passed_through, plain
from serving.errors import InputChangedError, InputError, StorageError
from serving.formats import Format, Prompt
from serving.protocol import Request, Result

EXAMPLES = 3
BATCH_BYTES = 256 << 20
"""Of rows that are written at once, once for each sample; where a tenant has sent them, of those read at once too."""


@dataclass(frozen=True)
class FeederConfig:
    """What every feeder of a job needs; picklable."""

    spec: JobSpec
    input: Location
    output: Location
    fingerprint: str
    beginning: str
    lease: int
    format: str
    tokenizer: str
    max_model_len: int
    schema: pa.Schema
    kept: tuple[str, ...]
    metadata: dict[str, Any]

    def reader(self) -> UnitReader:
        """A reader of the job's rows, which come out once for each sample."""
        most = None if self.spec.tenant is None else BATCH_BYTES // self.spec.n
        return UnitReader(self.input, self.schema.names, most_bytes=most)


class UnitWork:
    """A unit under way; ``live`` are the sums over its rows answered so far. Rows are counted within the unit."""

    def __init__(self, config: FeederConfig, fmt: Format, unit: Unit, file: InputFile) -> None:
        self.unit = unit
        self.live = Tally()
        self.said: list[str] = []
        self.examples: list[dict[str, str]] = []
        self._config = config
        self._spec = config.spec
        self._format = fmt
        self._file = file
        self._ledger = Ledger(config.output, config.fingerprint, beginning=config.beginning)
        self._journal = self._ledger.journal(unit.index)
        self._facts: list[PromptFacts | None] = []
        self._prompts: list[Sequence[int] | None] = []
        self._seeds: list[tuple[int, ...]] = []
        self._untils: list[str | None] = []
        self._samples: dict[int, list[Sample]] = {}
        self._windows = Windows()
        self._journaled: set[int] = set()
        self._wanted: set[tuple[str, int]] | None = None
        self._twins: dict[int, list[int]] = {}
        self._repeated_ids = self._ideal = 0
        self._digest = ""

    @property
    def _scores(self) -> bool:
        return self._spec.task == "score"

    @property
    def missing(self) -> int:
        """Rows without an answer."""
        return (self.unit.rows if self._wanted is None else len(self._wanted)) - len(self._samples)

    def prepare(self, reader: UnitReader) -> None:
        """Replay the journal, read the rows and make the prompts of those that are not answered.

        Raises ``InputChangedError`` when the journal was made from other rows.
        """
        if self.unit.retries >= 0:
            self._wanted = self._error_rows(self.unit.retries)
        digests = self._replay()
        digest, ids = InputDigest(self._digested), set[Any]()
        batches = reader.read(self._file, self.unit)
        while True:
            with timed(self.live, "read"):
                if (batch := next(batches, None)) is None:
                    break
                digest.add(batch)
            with timed(self.live, "tokenize"):
                self._prepare_batch(batch, ids)
        if self.unit.rows:
            check_untouched(self._config.input, self._file)
        self._digest = digest.hexdigest()
        if digests - {self._digest}:
            raise self._changed("when this job began")

    @property
    def _digested(self) -> list[str]:
        return [n for role in self._spec.roles if (n := self._spec.column(role)) in self._config.schema.names]

    def _changed(self, when: str) -> InputChangedError:
        return InputChangedError(
            f"{self._file.name}, rows {self.unit.start} to {self.unit.stop}, is not what it was {when}.",
            remedy="Put the file back and run again to resume, or start anew with --overwrite.",
        )

    def _error_rows(self, unit: int) -> set[tuple[str, int]]:
        failed, retried = self._ledger.errors(unit), self._ledger.retried(unit)
        location = failed if exists(failed) else retried

        def read() -> pa.Table:
            with location.fs.open_input_file(location.path) as source:
                return pq.read_table(source, columns=["source_file", "source_row"])

        found = patient(location, read)
        return set(zip(*(found.column(name).to_pylist() for name in ("source_file", "source_row")), strict=True))

    def _replay(self) -> set[str]:
        replay = self._journal.replay()
        self.said += [
            f"journal segment {name} is damaged; it was set aside and its rows run again" for name in replay.damaged
        ]
        found: dict[int, list[Sample]] = {}
        for sample in replay.samples:
            found.setdefault(sample.row - self.unit.start, []).append(sample)
        for row, samples in found.items():
            failed = samples[0].error_code is not None
            again = failed and self._spec.retry_errors and self.unit.retries < 0
            if not again and (failed or len(samples) == self._spec.n):
                self._samples[row] = sorted(samples, key=lambda s: s.sample)
        self._journaled = set(self._samples)
        self.live.replayed = len(self._samples)
        return replay.digests

    def _prepare_batch(self, batch: pa.RecordBatch, seen: set[Any]) -> None:
        self._untils += row_untils(self._spec, batch)
        make = score_prompts if self._scores else row_prompts
        prompts = make(self._spec, self._format, self._config.max_model_len, batch)
        if (too_wide := self._too_wide(batch)) is not None:
            prompts = [(identity, too_wide) for identity, _ in prompts]
        sources = origins(batch, self._file, self.unit.start + len(self._facts))
        for (identity, prompt), source in zip(prompts, sources, strict=True):
            row = len(self._facts)
            wanted = self._wanted is None or source in self._wanted
            if not wanted:
                self._facts.append(None)
                self._prompts.append(None)
            elif isinstance(prompt, Prompt):
                self._facts.append(facts_of(prompt))
                self._prompts.append(prompt.token_ids)
                if self._scores and not prompt.scored:
                    self._prompts[row] = None
                    self._samples.setdefault(row, [nothing_scored(self.unit.start + row)])
            else:
                self._facts.append(None)
                self._prompts.append(None)
                error = Sample(
                    self.unit.start + row, 0, [], error_code=prompt.code, error_message=str(prompt), attempts=0
                )
                self._samples.setdefault(row, [error])
            self.live.prepared += wanted
            if row in self._samples:
                self._count(row)
            if isinstance(identity, str | int):
                self._repeated_ids += identity in seen
                seen.add(identity)
            key = str(identity) if isinstance(identity, str | int) else f"{source[0]}:{source[1]}"
            self._seeds.append(row_seeds(self._spec, key))

    def _too_wide(self, batch: pa.RecordBatch) -> InputError | None:
        """Why a row that was read alone is not done: its columns, once for each sample, are too much to hold."""
        if self._spec.most_text is None or batch.num_rows > 1:
            return None
        size, n = held_bytes(batch), self._spec.n
        if n * size <= BATCH_BYTES:
            return None
        return InputError(
            f"the row's columns have {size:,} bytes, {n * size:,} with n = {n}, more than {BATCH_BYTES:,}.",
            remedy="Keep fewer columns (keep_columns), or ask for fewer samples.",
        )

    def groups(self, batch_rows: int, block_size: int) -> tuple[list[list[list[int]]], list[int]]:
        """What an engine must answer: micro-batches of ``batch_rows`` rows at most, in groups that share nothing.

        They are cut where they share least. And what each row costs it: the tokens that it must compute, those of the
        longest answer included.
        Blocks of its prefix cache hold ``block_size`` tokens. Rows with the same prompt and seeds are sent once.
        """
        with timed(self.live, "order"):
            return self._groups(batch_rows, block_size)

    def _groups(self, size: int, block_size: int) -> tuple[list[list[list[int]]], list[int]]:
        keys = [b"" if prompt is None else sort_key(prompt) for prompt in self._prompts]
        prompts = [row for row, prompt in enumerate(self._prompts) if prompt is not None]
        order = [prompts[i] for i in prefix_order([keys[row] for row in prompts])]
        # vLLM reads no prefix cache for a prompt whose logarithms are wanted: the cached ones would lack theirs.
        cached = [0] * len(order) if self._scores else ideal_cached_tokens(keys, order, block_size)
        ideal = dict(zip(order, cached, strict=True))
        longest = self._spec.n * self._spec.answer_tokens
        weights = [len(key) // TOKEN_BYTES - ideal.get(row, 0) + longest for row, key in enumerate(keys)]
        rows = self._find_twins(keys, order, ideal, block_size)
        self._prompts = [prompt if row in rows else None for row, prompt in enumerate(self._prompts)]
        if self._spec.order == "input":
            left = sorted(rows)
            return [[left[i : i + size] for i in range(0, len(left), size)]] if left else [], weights
        return grouped(keys, cut(keys, [row for row in order if row in rows], size), block_size), weights

    def _find_twins(self, keys: list[bytes], order: list[int], ideal: dict[int, int], block_size: int) -> set[int]:
        """The rows to send, without those that another's answer serves; those whose other is answered are answered."""
        rows, leaders = set[int](), dict[Any, int]()
        for row in order:
            fact = self._facts[row]
            scored = fact.scored if fact else 0
            leader = leaders.setdefault((keys[row], self._seeds[row], self._untils[row], scored), row)
            tokens = len(keys[row]) // TOKEN_BYTES
            again = (tokens - 1) // block_size * block_size * (self._spec.n - 1)
            self._ideal += ideal[row] + again if leader == row else tokens * self._spec.n
            if row in self._samples:
                continue
            if leader == row:
                rows.add(row)
            elif leader in self._samples:
                self._copy(leader, row)
            else:
                self._twins.setdefault(leader, []).append(row)
        return rows

    def _copy(self, leader: int, row: int) -> None:
        """Give a row the answer to its twin: all of its prompt was cached, so to speak."""
        fact = self._facts[row]
        tokens = fact.prompt_tokens * self._spec.n if fact else 0
        self._samples[row] = [
            replace(sample, row=self.unit.start + row, cached_tokens=tokens if sample.sample == 0 else 0)
            for sample in self._samples[leader]
        ]
        self.live.twins += 1
        self._count(row)

    def requests(self, rows: list[int]) -> list[Request]:
        """What the engine is asked for these rows: one request each, or one for each window of a text to score."""
        return [
            Request(number * len(self._facts) + row, ids, self._seeds[row], self._untils[row])
            for row in rows
            for number, ids in enumerate(self._asked(row))
        ]

    def _asked(self, row: int) -> Sequence[Sequence[int]]:
        prompt, fact = self._prompts[row] or (), self._facts[row]
        if fact is None or not fact.scored:
            return [prompt]
        return windows(prompt, fact.scored, self._config.max_model_len)

    def answer(self, result: Result, *, replica: str, attempts: int) -> None:
        """Keep the engine's answer to a request of ``requests``."""
        number, row = divmod(result.key, len(self._facts))
        if self._scores:
            samples = self._score(result, row, number, replica=replica, attempts=attempts)
        else:
            samples = to_samples(result, self.unit.start + row, replica=replica, attempts=attempts)
        if not samples:
            return
        self._prompts[row] = None
        self._samples[row] = samples
        self._count(row)
        for twin in self._twins.pop(row, ()):
            self._copy(row, twin)

    def _score(self, result: Result, row: int, number: int, *, replica: str, attempts: int) -> list[Sample]:
        """A row's sample once all of its windows are answered, until then nothing."""
        fact = self._facts[row]
        assert fact is not None
        sizes = window_sizes(fact.prompt_tokens, fact.scored, self._config.max_model_len)
        part = scored_sample(result, self.unit.start + row, sizes[number], replica=replica, attempts=attempts)
        return self._windows.add(number, part, len(sizes))

    def _count(self, row: int) -> None:
        live, samples, fact = self.live, self._samples[row], self._facts[row]
        live.rows += 1
        if samples[0].error_code is not None:
            live.errors += 1
            live.refused += samples[0].attempts == 0
            count(live.error_codes, samples[0].error_code)
            return
        _count_engine(live, samples)
        live.prompt_tokens += (fact.prompt_tokens if fact else 0) * len(samples)
        live.truncated += bool(fact and fact.truncated) * len(samples)
        live.samples += len(samples)
        live.scored_tokens += sum(sample.scored for sample in samples)
        if not self._scores:
            self._count_infills(samples)

    def _count_infills(self, samples: list[Sample]) -> None:
        live = self.live
        for sample in samples:
            live.completion_tokens += len(sample.token_ids)
            live.stopped += sample.stop_token_id is not None
            live.empty += not sample.token_ids
            ended = sample.stop_token_id is not None or len(sample.token_ids) == self._spec.max_tokens
            reason = self._format.finish_reason(sample.stop_token_id) if ended else "stop"
            count(live.finish_reasons, reason)
        if len(self.examples) < EXAMPLES and samples[0].token_ids:
            infill = self._format.infill(samples[0].token_ids, stop_token_id=samples[0].stop_token_id)
            self.examples.append({"row": str(samples[0].row), "infill": infill.text, "reason": infill.finish_reason})

    def publish_journal(self) -> None:
        """Publish the rows that were answered since the last time; raises ``StorageError``, ``LeaseLostError``."""
        check_lease(self._config.output, self._config.lease)
        rows = [row for row in list(self._samples) if row not in self._journaled]
        self._journal.publish([sample for row in rows for sample in self._samples[row]], self._digest)
        self._journaled.update(rows)

    def finish(self) -> Tally:
        """Publish error rows, report and part, in this order, then forget the journal; returns the unit's sums.

        The rows are read a second time; raises ``InputChangedError`` if they are others now, ``StorageError`` if
        something cannot be written: what is not journaled yet is journaled then, if that can be.
        """
        try:
            with timed(self.live, "write"):
                tally = self._finish()
        except StorageError:
            with suppress(StorageError):
                self.publish_journal()
            raise
        tally.cpu_seconds = self.live.cpu_seconds
        return tally

    def _finish(self) -> Tally:
        check_lease(self._config.output, self._config.lease)
        theirs = self._ledger.read_report(self.unit.index) if exists(self._ledger.part(self.unit.index)) else None
        if theirs is not None:
            return theirs.tally  # A runner that was thought dead has finished this unit: its part never changes.
        tally, files = Tally(replayed=self.live.replayed, twins=self.live.twins), dict[str, tuple[str, int]]()
        tally.repeated_ids, tally.ideal_tokens = self._repeated_ids, self._ideal
        part = self._ledger.part(self.unit.index)
        with part_writer(part, self._spec.compression, self._config.metadata, once=True) as writer:
            for batch, first in self._batches():
                for table in self._tables(batch, first, tally):
                    writer.write(table)
            files[f"data/{part.name}"] = writer.close()
            check_lease(self._config.output, self._config.lease)
            files |= self._write_errors(tally)
            tally.rows = tally.prepared = len(self._samples)
            digests = {name: digest for name, (digest, _) in files.items()}
            sizes = {name: size for name, (_, size) in files.items()}
            self._ledger.write_report(
                self.unit.index, Report(tally, digests, sizes, self._digest, self._config.beginning)
            )
        self._journal.drop()
        return tally

    def _write_errors(self, tally: Tally) -> dict[str, tuple[str, int]]:
        """Publish the error rows, if there are any; those of a runner that died before its part was out go."""
        errors = self._ledger.errors(self.unit.index)
        if all(samples[0].error_code is None for samples in self._samples.values()):
            delete(errors)
            return {}
        with part_writer(errors, self._spec.compression, self._config.metadata) as writer:
            for batch, first in self._batches():
                writer.write(self._error_table(batch, first, tally))
            return {f"errors/{errors.name}": writer.close()}

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        """The unit's rows and the number of the first, as many at once as may be copied once for each sample."""
        if self.unit.rows == 0:
            yield pa.RecordBatch.from_pylist([], self._config.schema), 0
        first, digest, kept = 0, InputDigest(self._digested), self._config.kept
        for whole in self._config.reader().read(self._file, self.unit):
            digest.add(whole)
            for batch in halved(plain(whole, kept), kept, BATCH_BYTES // self._spec.n):
                yield batch, first
                first += batch.num_rows
        if digest.hexdigest() != self._digest:
            raise self._changed("when its prompts were made")

    def _tables(self, batch: pa.RecordBatch, first: int, tally: Tally) -> Iterator[pa.Table]:
        """What a batch becomes: one table, or several where a row alone is too much to hold once for each sample."""
        rows, samples, facts = list[int](), list[Sample](), list[PromptFacts]()
        sources = origins(batch, self._file, self.unit.start + first)
        for row in range(batch.num_rows):
            fact, found = self._facts[first + row], self._samples.get(first + row)
            if fact is None or found is None or found[0].error_code is not None:
                continue
            _count_engine(tally, found)
            rows += [row] * len(found)
            samples += found
            facts += [fact] * len(found)
        kept = self._config.kept
        at_once = max(1, BATCH_BYTES * batch.num_rows // max(1, held_bytes(batch.select(kept))))
        for start in range(0, max(1, len(rows)), at_once):
            some = slice(start, start + at_once)
            origin = [sources[row] for row in rows[some]]
            added = self._added(batch, rows[some], facts[some], samples[some], origin, tally)
            yield pa.table(passed_through(batch, kept, rows[some]) | added)

    def _added(
        self,
        batch: pa.RecordBatch,
        rows: list[int],
        facts: list[PromptFacts],
        samples: list[Sample],
        sources: list[tuple[str, int]],
        tally: Tally,
    ) -> dict[str, Any]:
        """The columns that the job adds at ``rows`` of a batch, which are named once for each sample."""
        spec = self._spec
        if self._scores:
            texts = role_values(spec, batch, spec.required_roles[-1])
            return score_columns(spec, facts, samples, [texts[row] for row in rows], sources, tally)
        prefixes, suffixes = (role_values(spec, batch, role) for role in ("prefix", "suffix"))
        pairs = [(prefixes[row], suffixes[row]) for row in rows]
        return output_columns(spec, self._format, facts, pairs, samples, sources, tally)

    def _error_table(self, batch: pa.RecordBatch, first: int, tally: Tally) -> pa.Table:
        rows, samples = list[int](), list[Sample]()
        for row in range(batch.num_rows):
            found = self._samples.get(first + row)
            if found is None or found[0].error_code is None:
                continue
            rows.append(row)
            samples.append(found[0])
            tally.errors += 1
            tally.refused += found[0].attempts == 0
            count(tally.error_codes, found[0].error_code)
        sources = origins(batch, self._file, self.unit.start + first)
        return pa.table(error_columns(batch, self._config.kept, rows, samples, [sources[row] for row in rows]))


def _count_engine(tally: Tally, samples: list[Sample]) -> None:
    """What a row's samples say of the engine that made them, if one was asked."""
    tally.cached_tokens += samples[0].cached_tokens
    if samples[0].replica:
        count(tally.replicas, samples[0].replica)
