"""What the journals of a job hold of units whose part is not out, beside the rows of the input that were answered.

Whoever reads must be sure that nobody runs the job: a journal's damaged segments are set aside.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from jobs.journal import Sample
from jobs.ledger import STATE, Ledger, read_job
from jobs.plan import Unit
from jobs.reader import UnitReader
from jobs.store import Location, exists, locate
from jobs.unit import BATCH_BYTES


def planned_ledger(output: Location) -> Ledger | None:
    """The ledger of a job that has a plan; raises ``OutputError`` for state that is damaged, ``StorageError``."""
    if not exists(output.join(STATE, "job.json")):
        return None
    ledger = Ledger.of(output, read_job(output))
    return ledger if ledger.has_plan else None


def made_by(output: Location) -> tuple[str, str, int]:
    """The model, its format and the context in tokens by which a job was begun: the server's may be others now."""
    job = read_job(output)
    return job["spec"]["model"], job["identity"]["format"], job["identity"]["engine"]["max_model_len"]


class Journaled:
    """Reads units whose part is not out: ``columns`` of the rows at ``source``, which have ``samples`` samples each."""

    def __init__(self, ledger: Ledger, source: str, columns: Sequence[str], samples: int) -> None:
        self._ledger = ledger
        self._files = ledger.inputs()
        self._reader = UnitReader(locate(source), columns, most_bytes=BATCH_BYTES)
        self._count = samples

    def rows(self, unit: Unit) -> Iterator[tuple[pa.RecordBatch, list[list[Sample]]]]:
        """The rows of a unit that its journal holds whole, in batches, and the samples of each.

        Raises ``InputChangedError`` when the input is not what was planned, ``StorageError``.
        """
        whole, at = self._whole(unit), unit.start
        if not whole:
            return
        for batch in self._reader.read(self._files[unit.file], unit):
            rows = [row for row in range(batch.num_rows) if at + row in whole]
            if rows:
                yield batch.take(pa.array(rows, pa.int64())), [whole[at + row] for row in rows]
            at += batch.num_rows

    def _whole(self, unit: Unit) -> dict[int, list[Sample]]:
        found: dict[int, list[Sample]] = {}
        for sample in self._ledger.journal(unit.index).replay().samples:
            found.setdefault(sample.row, []).append(sample)
        return {
            row: sorted(samples, key=lambda sample: sample.sample)
            for row, samples in found.items()
            if samples[0].error_code is not None or len(samples) == self._count
        }


def made_tokens(sample: Sample) -> int:
    """Tokens that the engine made, as requests count them: the one that ended the sample is one."""
    return len(sample.token_ids) + (sample.stop_token_id is not None)


def cached_tokens(samples: Sequence[Sample], prompt_tokens: int) -> int:
    """What of a row's prompt was cached, the prompt counted once for all samples."""
    return min(prompt_tokens, round(samples[0].cached_tokens / len(samples)))
