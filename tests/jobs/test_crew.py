"""How many units a feeder is given at a time."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.crew import MOST_UNITS, UNITS_AHEAD, Crew, wants_more
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


@pytest.mark.parametrize(("units", "dealt"), [(3, [2, 1]), (4, [1, 1, 1, 1]), (20, [5, 5, 5, 5]), (0, [0, 0])])
def test_feeders_share_the_units(units: int, dealt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []

    def hire(_: Crew) -> Any:
        own: list[int] = []
        given.append(own)

        def run(unit: Unit, _: InputFile) -> int:
            own.append(unit.index)
            return unit.index

        return SimpleNamespace(run=SimpleNamespace(remote=run), attach=SimpleNamespace(remote=lambda *_: None))

    monkeypatch.setattr(Crew, "_hire", hire)
    monkeypatch.setattr("jobs.crew.ray.get", lambda _: None)
    left = deque(Unit(number, 0, number * 10_000, number * 10_000 + 10_000) for number in range(units))
    crew = Crew(SimpleNamespace(), len(dealt), left, [])  # type: ignore[arg-type]
    crew.attach("", "", SimpleNamespace(), rows=80_000)  # type: ignore[arg-type]
    crew.fill()
    assert [len(own) for own in given] == dealt
    assert crew.units == units
