from hypothesis import given
from hypothesis import strategies as st

from jobs.plan import UNIT_BYTES, InputFile, dump_plan, load_plan, plan_units

FILES = st.lists(
    st.builds(
        InputFile,
        path=st.just("p"),
        name=st.just("n"),
        rows=st.integers(0, 500),
        size=st.just(1),
        uncompressed=st.integers(0, UNIT_BYTES * 8),
        digest=st.just(""),
    ),
    max_size=6,
)


@given(FILES, st.integers(1, 100), st.none() | st.integers(1, 800))
def test_units_cover_every_row_once_in_order(files: list[InputFile], rows_per_part: int, limit: int | None) -> None:
    units = list(plan_units(files, rows_per_part=rows_per_part, limit=limit))
    rows = [(unit.file, row) for unit in units for row in range(unit.start, unit.stop)]
    assert rows == [(f, r) for f, file in enumerate(files) for r in range(file.rows)][:limit]
    assert [unit.index for unit in units] == list(range(len(units)))
    assert all(0 < unit.rows <= rows_per_part for unit in units) or (len(units) == 1 and not rows)


@given(FILES, st.integers(1, 100))
def test_a_stored_plan_comes_back(files: list[InputFile], rows_per_part: int) -> None:
    units = list(plan_units(files, rows_per_part=rows_per_part))
    assert load_plan(dump_plan(units)) == units


def test_rows_of_megabytes_make_small_units() -> None:
    file = InputFile("p", "n", rows=1_000, size=1, uncompressed=10_000_000 * 1_000, digest="")
    units = list(plan_units([file], rows_per_part=10_000))
    assert max(unit.rows for unit in units) * 10_000_000 <= UNIT_BYTES
