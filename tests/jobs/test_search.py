"""The search for settings, on made-up speeds."""

from collections.abc import Callable
from typing import Any

import pytest

from jobs.search import Figures, Knob, Settings, Tuning, search
from serving.errors import EngineError

KNOBS = (Knob("a", (1, 2, 3)), Knob("b", (True, False)))


def never() -> bool:
    return False


def run(speed: Callable[[Settings], float], **options: Any) -> tuple[Tuning, list[Settings]]:
    """Search with engines of these speeds; gives the result and what was started, in order."""
    started: list[Settings] = []
    in_force = options.pop("in_force", {})

    def measure(settings: Settings) -> Figures:
        started.append(settings)
        return Figures(speed(settings), 0.25, in_force=in_force | settings)

    found = search(measure, KNOBS, options.pop("begin", {}), late=options.pop("late", never), **options)
    return found, started


def test_it_goes_down_one_coordinate_after_the_other_from_the_best_so_far() -> None:
    found, started = run(lambda s: 10 + s.get("a", 0) + 5 * (s.get("b") is False))
    assert found.best == {"a": 3, "b": False}
    assert (found.baseline, found.rows_per_second, found.finished) == (10, 18, True)
    assert started == [
        {},
        {},
        {},
        *[{"a": a} for a in (1, 1, 2, 2, 3, 3)],
        {"a": 3, "b": True},
        *[{"a": 3, "b": False}] * 2,
    ]


def test_what_is_within_the_noise_or_does_not_win_twice_is_no_win() -> None:
    """And the first run, whatever it was like, counts for nothing."""
    speeds = iter([2.0, 10.0, 12.0, 12.4, 12.4, 9.0, 15.0, 10.0, 12.0])
    found, _ = run(lambda s: next(speeds))
    assert found.noise == pytest.approx(2 / 11)
    assert found.best == {}
    assert found.rows_per_second == found.baseline == 11


def test_a_setting_that_does_not_start_is_told_and_skipped() -> None:
    def speed(settings: Settings) -> float:
        if settings.get("a") == 2:
            raise EngineError("the engine did not start: no kernel.\nmore")
        return 13.0 if settings.get("a") == 3 else 10.0

    found, _ = run(speed)
    assert found.best == {"a": 3}
    (failed,) = (t for t in found.trials if t.figures is None)
    assert (failed.setting, failed.failure) == ("a=2", "the engine did not start: no kernel.")


def test_a_setting_that_the_engine_does_not_go_by_wins_nothing() -> None:
    speeds = iter([10.0] * 3 + [30.0] * 9)
    found = search(lambda settings: Figures(next(speeds), 0.25, in_force={"a": 7}), KNOBS[:1], {}, late=never)
    assert found.best == {}
    assert [trial.failure for trial in found.trials[3:]] == ["the engine goes by a=7 all the same"] * 3


def test_a_baseline_that_does_not_start_is_an_error() -> None:
    def speed(settings: Settings) -> float:
        raise EngineError("the engine did not start.")

    with pytest.raises(EngineError):
        run(speed)


def test_a_setting_that_fails_rows_does_not_win_however_fast() -> None:
    def measure(settings: Settings) -> Figures:
        return Figures(100.0, 0.0, errors=5) if settings else Figures(10.0, 0.0, errors=1)

    found = search(measure, KNOBS, {}, late=never)
    assert found.best == {}


def test_time_ends_it_with_the_best_so_far() -> None:
    left = iter([False, False, True])
    found, started = run(lambda s: 10 + s.get("a", 0), late=lambda: next(left))
    assert (found.best, found.finished) == ({"a": 2}, False)
    assert len(started) == 7


def test_what_is_so_already_or_makes_no_sense_is_not_tried() -> None:
    """What is in force is told by the engines, asked for or not; an objection hears all of it."""
    heard: list[Settings] = []

    def objection(name: str, asked: Settings, in_force: Settings) -> str:
        heard.append(asked | {"in force": in_force})
        return f"{name} is too large" if asked["a"] == 3 else ""

    found, started = run(lambda s: 10.0, begin={"a": 1}, in_force={"b": False}, objection=objection)
    assert started == [*[{"a": 1}] * 3, {"a": 2}, {"a": 1, "b": True}]
    assert found.left_out == {"a=3": "a is too large"}
    told = {"in force": {"a": 1, "b": False}}
    assert heard == [{"a": 2} | told, {"a": 3} | told, {"a": 1, "b": True} | told]


def test_what_the_best_goes_by_is_what_its_engines_said() -> None:
    """Here a larger ``a`` turns ``b`` on, unasked: that it is on is not tried then."""

    def measure(settings: Settings) -> Figures:
        larger = settings.get("a", 1)
        return Figures(10.0 * larger, 0.25, in_force={"a": larger, "b": larger == 3})

    found = search(measure, KNOBS, {}, late=never)
    assert (found.best, found.in_force) == ({"a": 3}, {"a": 3, "b": True})
    assert [trial.setting for trial in found.trials if trial.setting.startswith("b=")] == ["b=false"]
