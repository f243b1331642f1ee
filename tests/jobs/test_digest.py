"""Equal rows give equal digests, whatever they came in; other rows give others."""

from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.digest import InputDigest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ROWS = st.lists(st.tuples(st.none() | TEXT, st.none() | TEXT), max_size=12)
INVALID = [b"good", b"bad \xff\xfe", None, b"\xed\xa0\x80", b""]
DRESSES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


def digest(*batches: pa.RecordBatch, columns: tuple[str, ...] = ("prefix", "suffix")) -> str:
    running = InputDigest(columns)
    for batch in batches:
        running.add(batch)
    return running.hexdigest()


def batch(kind: pa.DataType | None = None, **columns: Any) -> pa.RecordBatch:
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    if kind is not None:
        arrays = {name: dressed(array, kind) for name, array in arrays.items()}
    return pa.record_batch(arrays)


def dressed(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return array.cast(kind.value_type).dictionary_encode().cast(kind)
    return array.cast(kind)


def one_column(values: list[str | None], kind: pa.DataType | None = None) -> str:
    return digest(batch(kind, prefix=values), columns=("prefix",))


def raw(values: list[bytes | None]) -> pa.Array:
    """Strings that are not UTF-8, as a careless writer leaves them in Parquet."""
    buffers = pa.array(values, pa.binary()).buffers()
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


@given(rows=ROWS, cuts=st.lists(st.integers(0, 12), max_size=4), kind=st.sampled_from(DRESSES))
def test_the_digest_is_equal_however_the_rows_are_cut_and_typed(
    rows: list[tuple[str | None, str | None]], cuts: list[int], kind: pa.DataType
) -> None:
    prefixes, suffixes = [row[0] for row in rows], [row[1] for row in rows]
    whole = batch(prefix=prefixes, suffix=suffixes)
    edges = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    typed = batch(kind, prefix=prefixes, suffix=suffixes)
    slices = [typed.slice(start, stop - start) for start, stop in pairwise(edges)]
    copies = [batch(kind, prefix=prefixes[start:stop], suffix=suffixes[start:stop]) for start, stop in pairwise(edges)]
    assert digest(whole) == digest(*slices) == digest(*copies)


@given(left=ROWS, right=ROWS)
def test_other_rows_have_another_digest(left: list[tuple[str, str]], right: list[tuple[str, str]]) -> None:
    digests = [digest(batch(prefix=[p for p, _ in rows], suffix=[s for _, s in rows])) for rows in (left, right)]
    assert (digests[0] == digests[1]) == (left == right)


@pytest.mark.parametrize("kind", DRESSES, ids=str)
def test_null_and_empty_are_told_apart(kind: pa.DataType) -> None:
    assert one_column([None, "a"], kind) != one_column(["", "a"], kind)
    assert one_column([None, ""], kind) != one_column(["", None], kind)
    assert one_column([None], kind) != one_column([], kind)


@pytest.mark.parametrize("kind", DRESSES, ids=str)
def test_bytes_that_move_to_a_neighbour_are_seen(kind: pa.DataType) -> None:
    assert one_column(["ab", "c"], kind) != one_column(["a", "bc"], kind)
    assert one_column(["ab", ""], kind) != one_column(["", "ab"], kind)
    assert one_column(["ab"], kind) != one_column(["a", "b"], kind)
    moved = [digest(batch(kind, prefix=[p], suffix=[s])) for p, s in (("ab", "c"), ("a", "bc"), ("c", "ab"))]
    assert len(set(moved)) == 3


def test_the_order_of_rows_counts() -> None:
    assert one_column(["a", "b"]) != one_column(["b", "a"])


def test_the_name_and_the_presence_of_a_column_count() -> None:
    only = digest(batch(prefix=["a"]), columns=("prefix",))
    assert only != digest(batch(suffix=["a"]), columns=("suffix",))
    assert only != digest(batch(prefix=["a"], suffix=[None]))
    assert only == digest(batch(prefix=["a"], other=["b"]), columns=("prefix",))


@pytest.mark.parametrize("kind", DRESSES, ids=str)
def test_text_that_is_not_utf8_is_digested_as_its_bytes(kind: pa.DataType) -> None:
    strings = raw(INVALID)
    if pa.types.is_dictionary(kind):
        values = raw([value for value in INVALID if value is not None]).cast(kind.value_type)
        indices = pa.array([0, 1, None, 2, 3], kind.index_type)
        array = pa.DictionaryArray.from_arrays(indices, values)
    elif pa.types.is_string_view(kind):
        array = strings.cast(pa.binary()).cast(pa.binary_view()).view(kind)
    else:
        array = strings.cast(kind)
    plain = digest(pa.record_batch({"prefix": strings}), columns=("prefix",))
    assert digest(pa.record_batch({"prefix": array}), columns=("prefix",)) == plain
    other = raw([b"good", b"bad \xff\xff", *INVALID[2:]])
    assert digest(pa.record_batch({"prefix": other}), columns=("prefix",)) != plain


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint8()], ids=str)
def test_whole_numbers_are_ids_too(kind: pa.DataType) -> None:
    def ids(*values: int | None) -> str:
        return digest(pa.record_batch({"id": pa.array(values, kind)}), columns=("id",))

    assert ids(1, 2, None) == digest(
        pa.record_batch({"id": pa.array([1, 2, None], pa.int64())}).slice(0, 1),
        pa.record_batch({"id": pa.array([0, 2, None], pa.int64())}).slice(1, 2),
        columns=("id",),
    )
    assert len({ids(1, 23), ids(12, 3), ids(1, None), ids(1), ids(1, 0)}) == 5


def test_a_column_of_nothing_but_nulls_is_a_column_of_nulls() -> None:
    nothing = pa.record_batch({"prefix": pa.array(["a", "b"]), "suffix": pa.nulls(2)})
    assert digest(nothing) == digest(batch(prefix=["a", "b"], suffix=[None, None]))


def test_no_rows_have_a_digest_of_their_own() -> None:
    empty = batch(prefix=[], suffix=[])
    assert digest() == digest(empty) == digest(empty, empty)
    assert digest() != digest(batch(prefix=[""], suffix=[""]))
    assert len(digest()) == 32
