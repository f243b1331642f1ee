"""What a job's folder tells of the job: of real jobs, and of what is left when one is killed or tampered with."""

import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.journal import Sample
from jobs.lease import SILENT_SECONDS, Holder, machine
from jobs.retry import plan_retries
from jobs.status import read_status
from serving.errors import OutputError, VersionError
from tests.conftest import Command
from tests.jobs.conftest import FAILED, PARTS, ROWS, JobFolder

pytestmark = pytest.mark.engine
TOTAL = sum(ROWS.values())


def stranger(**told: object) -> Holder:
    """A runner on another machine that has just written."""
    now = time.time()
    return Holder("far-away", "another machine", 4_321, 0, "token", now, now, beats=3, told=told)


def test_a_finished_job_is_finished(clean: JobFolder) -> None:
    status = read_status(str(clean.output))
    assert (status.state, status.problems) == ("finished", ())
    assert (status.rows, status.total_rows) == (TOTAL, TOTAL)
    assert (status.parts, status.total_parts) == (PARTS, PARTS)
    assert (status.errors, status.error_codes) == (0, {})
    assert status.rows_per_second > 0
    assert status.eta_seconds == 0
    assert (status.host, status.pid) == (platform.node(), os.getpid())
    assert status.heartbeat_age is not None
    assert status.heartbeat_age >= 0


def test_rows_are_input_rows_however_many_samples_they_have(failed: JobFolder) -> None:
    status = read_status(str(failed.output))
    assert (status.state, status.rows, status.total_rows) == ("finished", TOTAL, TOTAL)
    assert (status.errors, status.error_codes) == (len(FAILED), {"bad_input": len(FAILED)})


def test_a_job_whose_errors_were_retried_counts_each_row_once(retried: JobFolder) -> None:
    status = read_status(str(retried.output))
    assert (status.state, status.problems) == ("finished", ())
    assert (status.rows, status.total_rows) == (TOTAL, TOTAL)
    assert (status.parts, status.total_parts) == (PARTS + 3, PARTS + 3)
    assert (status.errors, status.error_codes) == (len(FAILED), {"bad_input": len(FAILED)})


def test_a_finished_job_that_lacks_a_part_is_damaged(clean: JobFolder) -> None:
    part = clean.part(2)
    part.unlink()
    status = read_status(str(clean.output))
    assert (status.state, status.problems) == ("damaged", (f"data/{part.name} is missing",))


def test_a_finished_job_that_lacks_its_error_rows_is_damaged(failed: JobFolder) -> None:
    errors = failed.part(1, "errors")
    errors.unlink()
    status = read_status(str(failed.output))
    assert (status.state, status.problems) == ("damaged", (f"errors/{errors.name} is missing",))


def test_a_truncated_part_is_told_with_both_sizes(clean: JobFolder) -> None:
    part = clean.part(4)
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:-10])
    status = read_status(str(clean.output))
    assert (status.state, status.problems) == (
        "damaged",
        (f"data/{part.name} has {size - 10} bytes, not {size}",),
    )


def test_a_job_without_a_manifest_is_interrupted(clean: JobFolder) -> None:
    clean.interrupt()
    status = read_status(str(clean.output))
    assert (status.state, status.rows, status.parts) == ("interrupted", TOTAL, PARTS)
    assert status.eta_seconds is None


def test_an_interrupted_job_counts_its_parts_and_its_journal(failed: JobFolder) -> None:
    failed.interrupt(1, 3)
    status = read_status(str(failed.output))
    assert (status.state, status.rows, status.total_rows) == ("interrupted", TOTAL - 20, TOTAL)
    assert (status.parts, status.total_parts) == (PARTS - 2, PARTS)
    assert (status.errors, status.error_codes) == (2, {"bad_input": 2})
    journal = failed.ledger.journal(1)
    journal.publish([Sample(10, sample, [1]) for sample in range(2)], "digest")
    journal.publish([Sample(11, 0, [], error_code="engine_dead", attempts=3)], "digest")
    status = read_status(str(failed.output))
    assert (status.state, status.rows) == ("interrupted", TOTAL - 18)
    assert status.error_codes == {"bad_input": 2, "engine_dead": 1}


def test_a_damaged_journal_segment_does_not_count(clean: JobFolder) -> None:
    clean.interrupt(1)
    clean.ledger.journal(1).publish([Sample(10, 0, [1])], "digest")
    segment = next(clean.state("journal", "00001").iterdir())
    segment.write_bytes(segment.read_bytes()[:-1])
    assert read_status(str(clean.output)).rows == TOTAL - 10
    assert segment.exists()


def test_a_job_that_somebody_holds_is_running_and_tells_what_they_told(clean: JobFolder) -> None:
    clean.interrupt(1, 3, 4)
    clean.hold(stranger(total=TOTAL, rows=25, rows_per_second=5.0, error_codes={"bad_input": 2}))
    status = read_status(str(clean.output))
    assert (status.state, status.rows, status.total_rows) == ("running", 25, TOTAL)
    assert (status.parts, status.total_parts) == (PARTS - 3, PARTS)
    assert (status.errors, status.error_codes) == (2, {"bad_input": 2})
    assert (status.rows_per_second, status.eta_seconds) == (5.0, (TOTAL - 25) / 5.0)
    assert (status.host, status.pid) == ("far-away", 4_321)


def test_of_a_runner_that_has_told_nothing_yet_the_finished_parts_tell(clean: JobFolder) -> None:
    clean.interrupt(1)
    clean.hold(stranger())
    status = read_status(str(clean.output))
    assert (status.state, status.rows, status.eta_seconds) == ("running", TOTAL - 10, None)


@pytest.mark.parametrize("why", ["silent", "released", "gone"])
def test_a_job_whose_runner_is_no_more_is_interrupted(clean: JobFolder, why: str) -> None:
    clean.interrupt(1)
    told = stranger(rows=7, rows_per_second=5.0)
    clean.hold(
        {
            "silent": replace(told, beat=time.time() - SILENT_SECONDS - 1),
            "released": replace(told, released=True),
            "gone": replace(told, machine=machine(), pid=os.getppid(), born=0),
        }[why]
    )
    status = read_status(str(clean.output))
    assert (status.state, status.rows, status.eta_seconds) == ("interrupted", TOTAL - 10, None)
    assert (status.rows_per_second, status.host) == (5.0, "far-away")


def test_a_part_without_a_report_is_damage(clean: JobFolder) -> None:
    clean.interrupt()
    clean.report(3).unlink()
    status = read_status(str(clean.output))
    assert (status.state, status.problems) == ("damaged", ("part 3 has no readable report",))


def test_a_report_that_is_being_written_is_no_trouble(clean: JobFolder) -> None:
    """A kill leaves it there as well."""
    clean.interrupt(2)
    clean.state("reports", ".00002.json.0123abcd.tmp").write_text("{")
    assert read_status(str(clean.output)).state == "interrupted"


@pytest.mark.parametrize("name", ["plan.arrow", "manifest.json"])
def test_damaged_state_is_named(clean: JobFolder, name: str) -> None:
    clean.state(name).write_bytes(b"nonsense")
    status = read_status(str(clean.output))
    assert status.state == "damaged"
    assert len(status.problems) == 1
    assert name in status.problems[0]


def test_a_finished_job_without_a_plan_is_damaged(clean: JobFolder) -> None:
    clean.state("plan.arrow").unlink()
    status = read_status(str(clean.output))
    assert status.state == "damaged"
    assert "plan.arrow" in status.problems[0]


def test_a_job_that_is_being_planned_is_running(clean: JobFolder) -> None:
    clean.interrupt(*range(PARTS))
    clean.state("plan.arrow").unlink()
    clean.hold(stranger())
    assert read_status(str(clean.output)).state == "running"


def test_a_job_that_was_killed_before_it_was_planned_is_interrupted(clean: JobFolder) -> None:
    """Running it again plans it and goes on: nothing is lost."""
    clean.interrupt(*range(PARTS))
    clean.state("plan.arrow").unlink()
    clean.state("inputs.json").unlink()
    assert read_status(str(clean.output)).state == "interrupted"


def test_error_rows_that_are_to_be_retried_count_as_not_done(failed: JobFolder) -> None:
    """The status of a retry that was killed: its rows must be generated again."""
    ledger = failed.ledger
    units = plan_retries(ledger, ledger.planned())
    assert len(units) == PARTS + 3
    failed.interrupt()
    status = read_status(str(failed.output))
    assert (status.state, status.rows, status.total_rows) == ("interrupted", TOTAL - len(FAILED), TOTAL)
    ledger.journal(PARTS).publish([Sample(3, sample, [1]) for sample in range(2)], "digest")
    assert read_status(str(failed.output)).rows == TOTAL - len(FAILED) + 1


def test_rows_of_a_retry_that_was_killed_before_its_end_count_once(retried: JobFolder, failed: JobFolder) -> None:
    """Its parts are out, the old error rows not settled yet."""
    retried.interrupt()
    for unit in (0, 1, 3):
        retried.report(unit).write_bytes(failed.report(unit).read_bytes())
        errors = retried.state("retried", failed.part(unit, "errors").name)
        errors.rename(retried.output / "errors" / errors.name)
    status = read_status(str(retried.output))
    assert (status.state, status.rows, status.errors) == ("interrupted", TOTAL, len(FAILED))


def test_a_folder_of_no_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no job's folder"):
        read_status(str(tmp_path))


def test_a_job_of_another_format_is_refused(clean: JobFolder) -> None:
    clean.edit(clean.state("job.json"), lambda told: told.update(format_version=1))
    with pytest.raises(VersionError, match="format 1"):
        read_status(str(clean.output))


def test_the_command_tells_the_state_and_its_exit_code_damage(clean: JobFolder, spanfill: Command) -> None:
    ran = spanfill("status", clean.output)
    assert ran.code == 0
    assert ran.stdout.startswith("finished: 40 of 40 rows")
    told = json.loads(spanfill("status", clean.output, "--json").stdout)
    assert (told["state"], told["rows"], told["problems"]) == ("finished", TOTAL, [])
    part = clean.part(0)
    part.unlink()
    ran = spanfill("status", clean.output)
    assert ran.code == 1
    assert part.name in ran.stdout
    ran = spanfill("status", clean.output, "--json")
    assert (ran.code, json.loads(ran.stdout)["state"]) == (1, "damaged")


def test_the_command_says_0_of_an_interrupted_and_of_a_running_job(clean: JobFolder, spanfill: Command) -> None:
    clean.interrupt(1)
    ran = spanfill("status", clean.output)
    assert (ran.code, ran.stdout.split(":")[0]) == (0, "interrupted")
    clean.hold(stranger(rows=7))
    ran = spanfill("status", clean.output)
    assert (ran.code, ran.stdout.split(":")[0]) == (0, "running")


def test_the_command_says_2_where_there_is_no_job(tmp_path: Path, spanfill: Command) -> None:
    ran = spanfill("status", tmp_path)
    assert ran.code == 2
    assert "no job's folder" in ran.stderr


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_part_that_was_cut_short_is_damage(clean: JobFolder, interrupted: bool) -> None:
    if interrupted:
        clean.interrupt(4)
    part = clean.part(2)
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:100])
    status = read_status(str(clean.output))
    assert (status.state, status.problems) == ("damaged", (f"data/{part.name} has 100 bytes, not {size}",))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_report_that_cannot_be_read_is_damage(clean: JobFolder, interrupted: bool) -> None:
    if interrupted:
        clean.interrupt(4)
    clean.report(3).write_text("{")
    status = read_status(str(clean.output))
    assert (status.state, status.problems) == ("damaged", ("part 3 has no readable report",))


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "sub/part.parquet"])
def test_a_stranger_in_data_is_damage(clean: JobFolder, interrupted: bool, name: str) -> None:
    if interrupted:
        clean.interrupt(4)
    stranger = clean.output / "data" / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("x")
    status = read_status(str(clean.output))
    assert (status.state, status.problems) == ("damaged", (f"data/{name} is not the job's",))


@pytest.mark.parametrize("key", ["parts", "bytes", "error_codes"])
def test_a_manifest_that_lacks_what_it_must_say_is_damage(clean: JobFolder, key: str) -> None:
    clean.edit(clean.state("manifest.json"), lambda told: told.update({key: None}))
    status = read_status(str(clean.output))
    assert status.state == "damaged"
    assert "manifest.json is damaged" in status.problems[0]
