"""What a work's jobs used, unit by unit: units are done once, so each is counted once whoever looks and how often."""

from collections.abc import Collection, Iterator
from pathlib import Path

from jobs.api.order import UnitUsage, WorkFolder
from jobs.ledger import STATE, Ledger, Report, read_job
from jobs.store import exists, locate


def finished_units(folder: WorkFolder, known: Collection[str] = ()) -> Iterator[UnitUsage]:
    """The usage of finished units whose names are not ``known``; raises ``OutputError``, ``StorageError``."""
    for number, output in folder.begun():
        yield from _of_job(number, output, known)


def _of_job(number: int, output: Path, known: Collection[str]) -> Iterator[UnitUsage]:
    place = locate(str(output))
    if not exists(place.join(STATE, "job.json")):
        return
    job = read_job(place)
    ledger, samples = Ledger.of(place, job), max(1, job["spec"]["n"])
    new = [unit for unit in sorted(ledger.done()) if f"{number}/{unit}" not in known]
    for unit, report in zip(new, ledger.try_reports(new), strict=True):
        if report is not None:
            yield _usage(f"{number}/{unit}", report, samples)


def _usage(name: str, report: Report, samples: int) -> UnitUsage:
    """A tally counts a prompt, and what of it was cached, once for each sample, and no stop token."""
    tally = report.tally
    prompt = tally.prompt_tokens // samples
    return UnitUsage(
        name=name,
        rows=tally.rows - tally.errors,
        prompt_tokens=prompt,
        cached_tokens=min(prompt, round(tally.cached_tokens / samples)),
        completion_tokens=tally.completion_tokens + tally.stopped,
    )
