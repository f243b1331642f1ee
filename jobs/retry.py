"""``--retry-errors``: the error rows of a finished job once more, into new parts.

A retry unit does the error rows of one finished unit. When all is done the old error file, which says which rows these
were, moves to ``_spanfill/retried``: what is still in ``errors/`` is what failed last.
"""

from dataclasses import replace

from jobs.ledger import Ledger
from jobs.plan import Unit
from jobs.store import delete, exists, publish_bytes, read_bytes


def plan_retries(ledger: Ledger, units: list[Unit]) -> list[Unit]:
    """The plan with a new unit for each finished unit that has error rows and was not retried; stores it.

    Where an earlier run's retries are not all done and settled it stays as it is: this run ends those.
    """
    retried, failed, done = {unit.retries for unit in units}, ledger.failed(), ledger.done()
    if any(unit.retries in failed or unit.index not in done for unit in units if unit.retries >= 0):
        return units
    again = [unit for unit in units if unit.index in failed and unit.index not in retried]
    if not again:
        return units
    new = [replace(unit, index=len(units) + number, retries=unit.index) for number, unit in enumerate(again)]
    ledger.store_plan([*units, *new])
    return [*units, *new]


def settle_retries(ledger: Ledger, units: list[Unit]) -> None:
    """Take what was retried off the books of the units where it failed; may be repeated after a kill."""
    for unit in units:
        report = ledger.read_report(unit.retries) if unit.retries >= 0 else None
        if report is None:
            continue
        errors = ledger.errors(unit.retries)
        if exists(errors):
            publish_bytes(ledger.retried(unit.retries), read_bytes(errors))
        tally = replace(report.tally, rows=report.tally.rows - report.tally.errors, errors=0, error_codes={})
        digests = {name: digest for name, digest in report.sha256.items() if not name.startswith("errors/")}
        sizes = {name: report.bytes[name] for name in digests}
        ledger.write_report(unit.retries, replace(report, tally=tally, sha256=digests, bytes=sizes))
        delete(errors)
