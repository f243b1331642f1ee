from pathlib import Path

import pytest

from jobs.journal import Sample
from jobs.ledger import Ledger, Report, differing, read_job, read_manifest
from jobs.status import read_status
from jobs.store import locate
from jobs.tally import Tally
from serving.errors import DamagedStateError, OutputError

IDENTITY = {"seed": 0, "engine": {"model": "m"}}


def ledger(folder: Path, fingerprint: str = "abc") -> Ledger:
    return Ledger(locate(str(folder)), fingerprint)


def test_a_folder_is_taken_once_and_resumed_after(tmp_path: Path) -> None:
    assert not ledger(tmp_path).open(IDENTITY, {}, {}, resume=True, overwrite=False)
    assert ledger(tmp_path).open(IDENTITY, {}, {}, resume=True, overwrite=False)


def test_another_job_is_refused_naming_what_differs(tmp_path: Path) -> None:
    ledger(tmp_path).open(IDENTITY, {}, {}, resume=True, overwrite=False)
    with pytest.raises(OutputError, match=r"seed \(0, now 1\)"):
        ledger(tmp_path, "def").open(IDENTITY | {"seed": 1}, {}, {}, resume=True, overwrite=False)


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    ledger(tmp_path).open(IDENTITY, {}, {}, resume=True, overwrite=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-00000-abc.parquet").write_bytes(b"old")
    assert not ledger(tmp_path, "def").open(IDENTITY | {"seed": 1}, {}, {}, resume=True, overwrite=True)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        ledger(tmp_path).open(IDENTITY, {}, {}, resume=True, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_no_resume_refuses_a_begun_job(tmp_path: Path) -> None:
    ledger(tmp_path).open(IDENTITY, {}, {}, resume=True, overwrite=False)
    with pytest.raises(OutputError, match="already"):
        ledger(tmp_path).open(IDENTITY, {}, {}, resume=False, overwrite=False)


def test_a_folder_without_a_job_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no job's folder"):
        read_job(locate(str(tmp_path)))


def test_done_units_are_those_whose_part_is_out(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    assert book.done() == set()
    (tmp_path / "data").mkdir()
    for name in ("part-00000-abc.parquet", "part-00012-abc.parquet", "part-00003-other.parquet"):
        (tmp_path / "data" / name).touch()
    assert book.done() == {0, 12}


def test_tallies_add_up() -> None:
    left = Tally(rows=1, finish_reasons={"eom": 1}, replicas={"a": 1})
    left.add(Tally(rows=2, finish_reasons={"eom": 1, "length": 1}, replicas={"b": 2}))
    assert (left.rows, left.finish_reasons, left.replicas) == (3, {"eom": 2, "length": 1}, {"a": 1, "b": 2})


def test_differences_are_named_with_their_path() -> None:
    assert differing({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}, "c": 2}) == ["a.b (1, now 2)"]


def test_what_a_displaced_runner_still_writes_does_not_count(tmp_path: Path) -> None:
    """``--overwrite`` begins the same job anew while feeders of the first runner live on."""
    first, second = ledger(tmp_path), ledger(tmp_path)
    first.open(IDENTITY, {}, {}, resume=True, overwrite=False)
    second.open(IDENTITY, {}, {}, resume=True, overwrite=True)
    first.journal(0).publish([Sample(0, 0, [1])], "digest")
    first.write_report(1, Report(Tally(rows=1), {}, {}, "digest", first.beginning))
    assert second.journal(0).replay().samples == []
    assert second.journal(0).peek() == (0, {})
    assert second.read_report(1) is None
    assert first.read_report(1) is not None


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{"])
def test_state_of_another_shape_is_damaged_and_named(tmp_path: Path, content: str) -> None:
    book = ledger(tmp_path)
    book.open(IDENTITY, {}, {}, resume=True, overwrite=False)
    for name, read in (("manifest.json", read_manifest), ("job.json", read_job)):
        (tmp_path / "_spanfill" / name).write_text(content)
        with pytest.raises(DamagedStateError, match=name):
            read(book.output)
    assert read_status(str(tmp_path)).state == "damaged"


def test_files_that_are_no_part_of_the_job_are_set_aside(tmp_path: Path) -> None:
    for name in ("part-00000-abc.parquet", "stray.parquet"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    assert ledger(tmp_path).set_strays_aside({"data/part-00000-abc.parquet"}) == ["data/stray.parquet"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["part-00000-abc.parquet"]
    assert (tmp_path / "_spanfill" / "damaged" / "data-stray.parquet").read_text() == "stray.parquet"
