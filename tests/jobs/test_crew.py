"""How many units a feeder is given at a time."""

from collections.abc import Callable

import pytest

from jobs.crew import MOST_UNITS, UNITS_AHEAD, wants_more
from jobs.plan import InputFile, Unit


def given(rows: int, *, row_bytes: int, wanted: int, most: int = 10_000) -> int:
    """Units of so many rows each that are given where so many rows are wanted."""
    file = InputFile("a.parquet", "a.parquet", rows, rows * row_bytes, rows * row_bytes, "")
    file_of: Callable[[Unit], InputFile] = lambda unit: file  # noqa: E731
    units: list[Unit] = []
    while len(units) < most and wants_more(units, file_of, wanted):
        units.append(Unit(len(units), len(units), 0, rows))
    return len(units)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "wanted", "units"),
    [
        (10_000, 2_000, 0, UNITS_AHEAD),
        (10_000, 2_000, 4_096, UNITS_AHEAD),
        (10_000, 2_000, 80_000, 8),
        (100, 2_000, 4_096, 41),
        (10, 2_000, 4_096, MOST_UNITS),
        (100, 2_500_000, 4_096, 4),
    ],
    ids=["no engine yet", "one engine", "twenty engines", "small files", "tiny files", "rows of megabytes"],
)
def test_a_feeder_has_the_rows_that_its_engines_hold(rows: int, row_bytes: int, wanted: int, units: int) -> None:
    assert given(rows, row_bytes=row_bytes, wanted=wanted) == units
