"""Real jobs that are as they should be, and each way to tamper with one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.plan import dump_plan, load_plan
from jobs.verify import Verdict, verify
from serving.errors import OutputError
from tests.conftest import Command
from tests.jobs.conftest import FAILED, PARTS, ROWS, JobFolder

pytestmark = pytest.mark.engine
TOTAL = sum(ROWS.values())


def checked(job: JobFolder) -> Verdict:
    return verify(str(job.output))


def named(verdict: Verdict, *names: str) -> bool:
    """Whether there are problems, each of these names is in one, and each problem has one of them."""
    problems = verdict.problems
    told = all(any(name in problem for problem in problems) for name in names)
    return told and all(any(name in problem for name in names) for problem in problems)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a Parquet file anew with its rows changed; schema and metadata stay."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def replan(job: JobFolder, change: Callable[[list[Any]], list[Any]]) -> None:
    path = job.state("plan.arrow")
    path.write_bytes(dump_plan(change(load_plan(path.read_bytes()))))


def reversed_rows(table: pa.Table) -> pa.Table:
    return table.take(list(reversed(range(table.num_rows))))


def doubled_row(table: pa.Table) -> pa.Table:
    return table.take([0, 0, *range(2, table.num_rows)])


def lost_row(table: pa.Table) -> pa.Table:
    return table.slice(0, table.num_rows - 1)


def test_a_clean_job_is_clean(clean: JobFolder) -> None:
    assert checked(clean) == Verdict(finished=True, parts=PARTS, rows=TOTAL, errors=0)


def test_a_job_with_error_rows_and_samples_is_clean(failed: JobFolder) -> None:
    rows = 2 * (TOTAL - len(FAILED))
    assert checked(failed) == Verdict(finished=True, parts=PARTS, rows=rows, errors=len(FAILED))


def test_a_job_whose_errors_were_retried_is_clean(retried: JobFolder) -> None:
    """The rows failed again: they are error rows of the new parts, and of these alone."""
    rows = 2 * (TOTAL - len(FAILED))
    assert checked(retried) == Verdict(finished=True, parts=PARTS + 3, rows=rows, errors=len(FAILED))
    assert sorted(path.name[:10] for path in (retried.output / "errors").iterdir()) == [
        f"part-{unit:05d}" for unit in (5, 6, 7)
    ]


@pytest.mark.parametrize("units", [(), (0,), (1, 3), tuple(range(PARTS))])
def test_what_an_interrupted_job_has_finished_is_clean(failed: JobFolder, units: tuple[int, ...]) -> None:
    failed.interrupt(*units)
    verdict = checked(failed)
    assert (verdict.finished, verdict.problems, verdict.parts) == (False, [], PARTS - len(units))


def test_a_retry_that_was_killed_before_its_end_is_clean(retried: JobFolder) -> None:
    retried.interrupt(5, 6)
    verdict = checked(retried)
    assert (verdict.finished, verdict.problems, verdict.parts) == (False, [], PARTS + 1)


def test_a_part_that_was_removed_is_named(clean: JobFolder) -> None:
    name = clean.part(2).name
    clean.part(2).unlink()
    verdict = checked(clean)
    assert f"{name} is missing" in verdict.problems
    assert (verdict.parts, verdict.rows) == (PARTS - 1, TOTAL - 5)
    assert f"the manifest says {TOTAL} rows, the files hold {TOTAL - 5}" in verdict.problems


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_byte_that_was_flipped_in_a_part_is_seen(clean: JobFolder, place: str) -> None:
    part = clean.part(1)
    size = part.stat().st_size
    flip(part, {"first": 0, "middle": size // 2, "last": size - 1}[place])
    verdict = checked(clean)
    assert any(part.name in problem for problem in verdict.problems)
    assert not any(clean.part(0).name in problem for problem in verdict.problems)


@pytest.mark.parametrize("kept", [0, 3, -1, -200])
def test_a_truncated_part_is_named(clean: JobFolder, kept: int) -> None:
    part = clean.part(1)
    part.write_bytes(part.read_bytes()[:kept])
    verdict = checked(clean)
    assert any(part.name in problem for problem in verdict.problems)
    assert verdict.parts == PARTS


def test_two_parts_that_swapped_their_names_are_both_named(clean: JobFolder) -> None:
    one, two = clean.part(0), clean.part(1)
    beside = one.with_suffix(".beside")
    one.rename(beside)
    two.rename(one)
    beside.rename(two)
    assert named(checked(clean), one.name, two.name)


@pytest.mark.parametrize("forged", [False, True])
def test_two_swapped_parts_do_not_pass_with_forged_sums(clean: JobFolder, forged: bool) -> None:
    one, two = clean.part(0), clean.part(1)
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])
    if forged:
        clean.forge(0)
        clean.forge(1)
    assert named(checked(clean), one.name, two.name)


@pytest.mark.parametrize("change", [reversed_rows, doubled_row, lost_row])
def test_rows_in_another_order_doubled_or_lost_do_not_pass_with_forged_sums(
    clean: JobFolder, change: Callable[[pa.Table], pa.Table]
) -> None:
    rewrite(clean.part(3), change)
    clean.forge(3)
    verdict = checked(clean)
    assert any(clean.part(3).name in problem for problem in verdict.problems)
    assert not any("sha256" in problem for problem in verdict.problems)


@pytest.mark.parametrize("change", [reversed_rows, doubled_row, lost_row])
def test_samples_and_prefixes_are_compared_where_there_are_no_ids(
    failed: JobFolder, change: Callable[[pa.Table], pa.Table]
) -> None:
    rewrite(failed.part(4), change)
    failed.forge(4)
    verdict = checked(failed)
    assert any(failed.part(4).name in problem for problem in verdict.problems)
    assert not any("sha256" in problem for problem in verdict.problems)


def test_rows_in_another_order_do_not_pass_where_samples_stay_in_theirs(failed: JobFolder) -> None:
    def pairs_reversed(table: pa.Table) -> pa.Table:
        return table.take([row ^ 1 for row in reversed(range(table.num_rows))])

    rewrite(failed.part(4), pairs_reversed)
    failed.forge(4)
    assert named(checked(failed), failed.part(4).name)


def test_a_part_without_its_columns_is_named(clean: JobFolder) -> None:
    rewrite(clean.part(1), lambda table: table.drop_columns(["sample"]))
    clean.forge(1)
    assert any(clean.part(1).name in problem for problem in checked(clean).problems)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"tally": {}}'])
def test_a_report_that_is_missing_or_damaged_is_a_problem_of_its_part(clean: JobFolder, content: bytes | None) -> None:
    if content is None:
        clean.report(2).unlink()
    else:
        clean.report(2).write_bytes(content)
    assert f"{clean.part(2).name} has no readable report" in checked(clean).problems


@pytest.mark.parametrize("unit", [0, 1, 3])
def test_error_rows_that_were_removed_are_named(failed: JobFolder, unit: int) -> None:
    path = failed.part(unit, "errors")
    path.unlink()
    verdict = checked(failed)
    assert any(f"errors/{path.name} is missing" in problem for problem in verdict.problems)
    assert verdict.errors < len(FAILED)


def test_error_rows_that_were_changed_are_named(failed: JobFolder) -> None:
    path = failed.part(1, "errors")
    rewrite(path, lambda table: table.set_column(0, "prefix", pa.array(["another"] * table.num_rows)))
    assert named(checked(failed), f"errors/{path.name}")


def test_retried_error_rows_that_were_removed_are_noticed(retried: JobFolder) -> None:
    """Nothing says any more which rows the retry was to do, or which the first part lacks."""
    next(retried.state("retried").iterdir()).unlink()
    assert checked(retried).problems


def test_a_plan_of_other_rows_is_noticed(clean: JobFolder) -> None:
    replan(clean, lambda units: [replace(units[0], start=1, stop=11), *units[1:]])
    assert named(checked(clean), clean.part(0).name)


def test_a_plan_whose_units_swapped_places_is_noticed(clean: JobFolder) -> None:
    def swap(units: list[Any]) -> list[Any]:
        return [replace(units[1], index=0), replace(units[0], index=1), *units[2:]]

    replan(clean, swap)
    assert named(checked(clean), clean.part(0).name, clean.part(1).name)


def test_a_plan_of_rows_that_the_input_does_not_have_is_noticed(clean: JobFolder) -> None:
    replan(clean, lambda units: [*units[:2], replace(units[2], stop=99), *units[3:]])
    assert any(clean.part(2).name in problem for problem in checked(clean).problems)


def test_a_plan_that_lost_a_unit_is_noticed(clean: JobFolder) -> None:
    replan(clean, lambda units: units[:-1])
    assert any(f"{TOTAL} rows" in problem for problem in checked(clean).problems)


def test_a_plan_that_gained_a_unit_is_noticed(clean: JobFolder) -> None:
    replan(clean, lambda units: [*units, replace(units[0], index=PARTS)])
    assert any(f"part-{PARTS:05d}" in problem for problem in checked(clean).problems)


def test_a_part_that_no_plan_has_is_noticed_before_the_job_is_finished(clean: JobFolder) -> None:
    """Every finished part is to be checked; this one would be read by whoever reads data/."""
    clean.interrupt()
    name = clean.part(PARTS - 1).name
    replan(clean, lambda units: units[:-1])
    assert any(name in problem for problem in checked(clean).problems)


def test_a_plan_of_a_file_that_is_not_there_is_noticed(clean: JobFolder) -> None:
    replan(clean, lambda units: [replace(units[0], file=7), *units[1:]])
    assert any(clean.part(0).name in problem for problem in checked(clean).problems)


def test_without_its_manifest_a_job_is_not_finished(clean: JobFolder) -> None:
    clean.state("manifest.json").unlink()
    assert checked(clean) == Verdict(finished=False, parts=PARTS, rows=TOTAL, errors=0)


def test_a_manifest_of_other_counts_is_noticed(failed: JobFolder) -> None:
    failed.edit(failed.state("manifest.json"), lambda told: told.update(rows=1, errors=0))
    assert len(checked(failed).problems) == 2


def test_a_manifest_of_another_sum_is_noticed(clean: JobFolder) -> None:
    name = f"data/{clean.part(2).name}"
    clean.edit(clean.state("manifest.json"), lambda told: told["parts"].update({name: "0" * 64}))
    assert named(checked(clean), name)


@pytest.mark.parametrize("folder", ["data", "errors"])
def test_a_stray_file_is_named(clean: JobFolder, folder: str) -> None:
    (clean.output / folder).mkdir(exist_ok=True)
    (clean.output / folder / "stray.parquet").write_bytes(b"stray")
    assert checked(clean).problems == [f"{folder}/stray.parquet is not in the manifest"]


def test_a_copy_of_a_part_under_another_name_is_named(clean: JobFolder) -> None:
    copy = clean.part(0).with_name("part-00000-another.parquet")
    shutil.copy(clean.part(0), copy)
    assert checked(clean).problems == [f"data/{copy.name} is not in the manifest"]


@pytest.mark.parametrize("column", ["prefix", "suffix", "id"])
def test_a_changed_row_of_the_input_is_a_problem_of_its_part_alone(clean: JobFolder, column: str) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        values[12] = f"{values[12]}!"
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.array(values, table.schema.field(column).type))

    rewrite(clean.input / "a.parquet", change)
    assert named(checked(clean), clean.part(1).name)


def test_a_column_that_made_no_prompt_may_change(clean: JobFolder) -> None:
    def change(table: pa.Table) -> pa.Table:
        place = table.column_names.index("extra")
        return table.set_column(place, "extra", pa.array([7] * table.num_rows))

    for name in ROWS:
        rewrite(clean.input / name, change)
    assert checked(clean).problems == []


def test_an_input_of_equal_rows_in_other_row_groups_is_the_same(clean: JobFolder) -> None:
    for name in ROWS:
        table = pq.read_table(clean.input / name)
        pq.write_table(table, clean.input / name, row_group_size=4, compression="gzip")
    assert checked(clean).problems == []


def test_an_input_with_fewer_rows_is_a_problem_of_the_parts_that_lack_them(clean: JobFolder) -> None:
    rewrite(clean.input / "a.parquet", lambda table: table.slice(0, 22))
    problems = checked(clean).problems
    assert problems[0].startswith(f"{clean.part(2).name}: a.parquet holds fewer rows")
    assert not any(clean.part(unit).name in problem for unit in (0, 1, 3, 4) for problem in problems)


def test_parts_whose_input_is_gone_still_hold_their_rows(clean: JobFolder) -> None:
    (clean.input / "b.parquet").unlink()
    verdict = checked(clean)
    assert verdict.rows == TOTAL
    assert not any("the manifest says" in problem for problem in verdict.problems)


def test_an_input_file_that_is_gone_is_a_problem_of_its_parts(clean: JobFolder) -> None:
    (clean.input / "b.parquet").unlink()
    verdict = checked(clean)
    assert [problem.split(":")[0] for problem in verdict.problems[:2]] == [clean.part(3).name, clean.part(4).name]
    assert "b.parquet is gone" in verdict.problems[0]
    assert not any(clean.part(unit).name in problem for unit in range(3) for problem in verdict.problems)


def test_a_file_that_came_to_the_input_changes_nothing(clean: JobFolder) -> None:
    shutil.copy(clean.input / "a.parquet", clean.input / "Z.parquet")
    assert checked(clean).problems == []


def test_where_the_input_is_gone_altogether_parts_are_still_compared_with_the_manifest(clean: JobFolder) -> None:
    shutil.rmtree(clean.input)
    flip(clean.part(2), 100)
    clean.part(3).unlink()
    verdict = checked(clean)
    assert "the input cannot be compared" in verdict.problems[0]
    assert named(verdict, "the input cannot be compared", clean.part(2).name, f"part-{3:05d}", "the manifest says")


def test_a_copy_in_a_folder_of_data_is_told(clean: JobFolder) -> None:
    """Readers of Parquet folders would read its rows twice."""
    (clean.output / "data" / "sub").mkdir()
    shutil.copy(clean.part(0), clean.output / "data" / "sub")
    assert checked(clean).problems == [f"data/sub/{clean.part(0).name} is not in the manifest"]


def test_error_rows_that_a_killed_writer_left_are_nobodys(clean: JobFolder, failed: JobFolder) -> None:
    """The rows were done again and are in the part; were they retried too, they would be doubled."""
    (clean.output / "errors").mkdir(exist_ok=True)
    left = next((failed.output / "errors").glob("part-*.parquet"))
    unit = int(left.name.split("-")[1])
    shutil.copy(left, clean.output / "errors" / clean.part(unit).name)
    clean.interrupt()
    assert checked(clean).problems == []
    assert clean.ledger.failed() == set()


@pytest.mark.parametrize("name", ["plan.arrow", "inputs.json", "job.json", "manifest.json"])
def test_state_that_is_damaged_is_a_problem(clean: JobFolder, name: str, spanfill: Command) -> None:
    clean.state(name).write_bytes(b"{")
    assert f"{name} is damaged" in checked(clean).problems[0]
    assert spanfill("verify", clean.output).code == 1


def test_a_folder_of_no_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no job's folder"):
        verify(str(tmp_path))


def test_the_command_says_0_where_all_is_well(retried: JobFolder, spanfill: Command) -> None:
    ran = spanfill("verify", retried.output)
    assert ran.code == 0
    assert " ".join(ran.stdout.split()) == "8 parts with 72 rows and 4 error rows: no problems"
    told = json.loads(spanfill("verify", retried.output, "--json").stdout)
    assert told == {"finished": True, "parts": 8, "rows": 72, "errors": 4, "problems": []}


def test_the_command_says_1_and_names_what_is_wrong(clean: JobFolder, spanfill: Command) -> None:
    clean.part(2).unlink()
    ran = spanfill("verify", clean.output)
    assert ran.code == 1
    assert "part-00002" in ran.stdout
    assert "2 problems" in ran.stdout
    ran = spanfill("verify", clean.output, "--json")
    assert (ran.code, len(json.loads(ran.stdout)["problems"])) == (1, 2)


def test_the_command_tells_a_job_that_is_not_finished(clean: JobFolder, spanfill: Command) -> None:
    clean.interrupt(4)
    ran = spanfill("verify", clean.output)
    assert ran.code == 0
    assert "of a job that is not finished" in " ".join(ran.stdout.split())


def test_the_command_says_1_where_the_input_is_gone_and_2_where_there_is_no_job(
    clean: JobFolder, tmp_path: Path, spanfill: Command
) -> None:
    shutil.rmtree(clean.input)
    ran = spanfill("verify", clean.output)
    assert ran.code == 1
    assert "the input cannot be compared" in " ".join(ran.stdout.split())
    assert spanfill("verify", tmp_path).code == 2
