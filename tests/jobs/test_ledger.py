from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.ledger import Ledger, Sample, Tally, differing, read_job
from jobs.store import locate
from serving.errors import OutputError

IDENTITY = {"seed": 0, "engine": {"model": "m"}}


def ledger(folder: Path, fingerprint: str = "abc") -> Ledger:
    return Ledger(locate(str(folder)), fingerprint)


def test_a_folder_is_taken_once_and_resumed_after(tmp_path: Path) -> None:
    assert not ledger(tmp_path).open(IDENTITY, {}, resume=True, overwrite=False)
    assert ledger(tmp_path).open(IDENTITY, {}, resume=True, overwrite=False)


def test_another_job_is_refused_naming_what_differs(tmp_path: Path) -> None:
    ledger(tmp_path).open(IDENTITY, {}, resume=True, overwrite=False)
    with pytest.raises(OutputError, match=r"seed \(0, now 1\)"):
        ledger(tmp_path, "def").open(IDENTITY | {"seed": 1}, {}, resume=True, overwrite=False)


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    ledger(tmp_path).open(IDENTITY, {}, resume=True, overwrite=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-00000-abc.parquet").write_bytes(b"old")
    assert not ledger(tmp_path, "def").open(IDENTITY | {"seed": 1}, {}, resume=True, overwrite=True)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        ledger(tmp_path).open(IDENTITY, {}, resume=True, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_no_resume_refuses_a_begun_job(tmp_path: Path) -> None:
    ledger(tmp_path).open(IDENTITY, {}, resume=True, overwrite=False)
    with pytest.raises(OutputError, match="already"):
        ledger(tmp_path).open(IDENTITY, {}, resume=False, overwrite=False)


def test_a_folder_without_a_job_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no job's folder"):
        read_job(locate(str(tmp_path)))


SAMPLES = st.lists(
    st.builds(
        Sample,
        row=st.integers(0, 1 << 40),
        sample=st.integers(0, 9),
        token_ids=st.lists(st.integers(0, 51_199), max_size=5),
        stop_token_id=st.none() | st.just(50_318),
        error_code=st.none() | st.just("engine_dead"),
        error_message=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        attempts=st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
)


@given(segments=st.lists(SAMPLES, max_size=4))
def test_what_was_journaled_is_replayed(tmp_path_factory: pytest.TempPathFactory, segments: list[list[Sample]]) -> None:
    book = ledger(tmp_path_factory.mktemp("job"))
    for segment in segments:
        book.journal(3, segment)
    samples, damaged = book.replay(3)
    assert not damaged
    seen = sorted(samples, key=repr)
    # Equal segments share their name, which is their content's hash.
    unique = {repr(segment): segment for segment in segments}.values()
    assert seen == sorted((sample for segment in unique for sample in segment), key=repr)


def test_a_damaged_segment_is_set_aside_and_named(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.journal(0, [Sample(0, 0, [1])])
    book.journal(0, [Sample(1, 0, [2])])
    victim = next((tmp_path / "_spanfill" / "journal" / "00000").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    samples, damaged = book.replay(0)
    assert len(samples) == 1
    assert damaged == [victim.name]
    assert (tmp_path / "_spanfill" / "damaged" / victim.name).exists()
    assert book.replay(0) == (samples, [])


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
