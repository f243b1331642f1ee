import array
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.journal import REPLAYED_AT_ONCE, Journal, Sample
from jobs.store import locate


def journal(folder: Path) -> Journal:
    root = locate(str(folder))
    return Journal(root.join("segments"), root.join("damaged"))


SAMPLES = st.lists(
    st.builds(
        Sample,
        row=st.integers(0, 1 << 40),
        sample=st.integers(0, 9),
        token_ids=st.lists(st.integers(0, 51_199), max_size=5).map(partial(array.array, "i")),
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
    book = journal(tmp_path_factory.mktemp("job"))
    for segment in segments:
        book.publish(segment, "digest")
    replay = book.replay()
    assert not replay.damaged
    assert replay.digests == ({"digest"} if segments else set())
    written = [sample for segment in segments for sample in segment]
    assert {(s.row, s.sample) for s in replay.samples} == {(s.row, s.sample) for s in written}
    assert len({(s.row, s.sample) for s in replay.samples}) == len(replay.samples)
    assert all(sample in written for sample in replay.samples)
    assert book.peek()[0] == len({s.row for s in written})
    assert book.replay() == replay


def test_a_damaged_segment_is_set_aside_and_named(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.publish([Sample(0, 0, [1])], "digest")
    book.publish([Sample(1, 0, [2])], "digest")
    victim = next((tmp_path / "segments").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    replay = book.replay()
    assert len(replay.samples) == 1
    assert replay.damaged == [victim.name]
    assert (tmp_path / "damaged" / victim.name).exists()
    assert not book.replay().damaged
    assert book.replay().samples == replay.samples


def test_rows_that_two_writers_answered_count_once(tmp_path: Path) -> None:
    """A feeder that was thought dead and its successor both write the row."""
    book = journal(tmp_path)
    book.publish([Sample(0, 0, [1], replica="one")], "digest")
    book.publish([Sample(0, 0, [1], replica="two"), Sample(1, 0, [2], replica="two")], "digest")
    found = sorted(book.replay().samples, key=lambda s: s.row)
    assert [(s.row, list(s.token_ids)) for s in found] == [(0, [1]), (1, [2])]


def test_dropped_segments_are_gone(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.publish([Sample(0, 0, [1], error_code="engine_dead")], "digest")
    assert book.peek() == (1, {"engine_dead": 1})
    book.drop()
    assert book.replay().samples == []


def test_an_answer_counts_before_an_error_whatever_their_segments_are_called(tmp_path: Path) -> None:
    book = journal(tmp_path)
    for row in range(20):
        book.publish([Sample(row, 0, [], error_code="engine_dead")], "digest")
        book.publish([Sample(row, 0, [row])], "digest")
    assert all(sample.error_code is None for sample in book.replay().samples)
    assert book.peek() == (20, {})


def test_token_ids_are_replayed_as_four_bytes_each(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.publish([Sample(row, 0, range(1_000, 1_128)) for row in range(REPLAYED_AT_ONCE + 1)], "digest")
    samples = book.replay().samples
    assert [sample.row for sample in samples] == list(range(REPLAYED_AT_ONCE + 1))
    assert all(list(sample.token_ids) == list(range(1_000, 1_128)) for sample in samples)
    assert all(sys.getsizeof(sample.token_ids) < 5 * 128 for sample in samples)
