"""A search for the fastest settings, pure: what a run measures, when time is up and what makes sense are handed in."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serving.errors import ConfigError, EngineError, ResourceError, TooManyErrorsError

Settings = dict[str, Any]

LEAST_NOISE = 0.03
"""Two equal runs may agree by chance; nobody needs settings for less."""


@dataclass(frozen=True)
class Knob:
    """One engine argument and the values to try, the most promising first."""

    name: str
    values: tuple[Any, ...]
    gpu_only: bool = False


@dataclass(frozen=True)
class Figures:
    """What one run measured."""

    rows_per_second: float
    cached_share: float
    errors: int = 0


@dataclass(frozen=True)
class Trial:
    """One engine start: its settings, by the one that is tried, and its figures or why there are none."""

    setting: str
    settings: Settings
    figures: Figures | None = None
    failure: str = ""


@dataclass
class Tuning:
    """What was tried and found: ``noise`` is the share by which two equal runs differed."""

    best: Settings
    trials: list[Trial] = field(default_factory=list)
    baseline: float = 0.0
    errors: int = 0
    rows_per_second: float = 0.0
    noise: float = LEAST_NOISE
    finished: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"ratio": round(self.ratio(self.rows_per_second), 3)}

    def ratio(self, rows_per_second: float) -> float:
        """A speed in units of the baseline's."""
        return rows_per_second / self.baseline if self.baseline else 0.0

    def is_win(self, figures: Figures) -> bool:
        """Whether a run was faster than the best so far by more than the noise, and failed no more rows."""
        return figures.errors <= self.errors and figures.rows_per_second > self.rows_per_second * (1 + self.noise)


Measure = Callable[[Settings], Figures]
Tell = Callable[[Tuning], None]


def search(
    measure: Measure,
    knobs: Sequence[Knob],
    begin: Settings,
    *,
    late: Callable[[], bool],
    fits: Callable[[Settings], bool] = lambda _: True,
    defaults: Settings | None = None,
    tell: Tell = lambda _: None,
) -> Tuning:
    """Coordinate descent over ``knobs`` from the settings ``begin``; ``tell`` is called after each trial.

    A first run warms what all runs share (files that are read, kernels that are compiled) and counts for nothing. The
    baseline is measured twice, and a setting wins only if two of its own runs are better than the best so far by
    more than the noise. A setting that the engine refuses is a trial without figures; what the engine does unasked
    (``defaults``) is not tried. Ends when ``late`` says so.
    """
    found = Tuning(dict(begin))
    found.trials.append(Trial("warm-up", found.best, measure(found.best)))
    tell(found)
    _baseline(measure, found, tell)
    for knob in knobs:
        for value in knob.values:
            settings = found.best | {knob.name: value}
            if value == ((defaults or {}) | found.best).get(knob.name) or not fits(settings):
                continue
            if late():
                return found
            _try(measure, f"{knob.name}={value}".lower(), settings, found, tell)
    found.finished = True
    return found


def _baseline(measure: Measure, found: Tuning, tell: Tell) -> None:
    speeds = []
    for _ in range(2):
        figures = measure(found.best)
        speeds.append(figures.rows_per_second)
        found.errors = max(found.errors, figures.errors)
        found.baseline = found.rows_per_second = sum(speeds) / len(speeds)
        found.noise = max(LEAST_NOISE, (max(speeds) - min(speeds)) / found.baseline if found.baseline else 0.0)
        found.trials.append(Trial("baseline", found.best, figures))
        tell(found)


def _try(measure: Measure, name: str, settings: Settings, found: Tuning, tell: Tell) -> None:
    """Measure a setting, a second time if the first one looks like a win, and keep it if both do."""
    speeds: list[float] = []
    while len(speeds) < 2:
        trial = _measured(measure, name, settings)
        found.trials.append(trial)
        won = trial.figures is not None and found.is_win(trial.figures)
        if won and trial.figures is not None:
            speeds.append(trial.figures.rows_per_second)
        if len(speeds) == 2:
            found.best, found.rows_per_second = settings, sum(speeds) / 2
        tell(found)
        if not won:
            return


def _measured(measure: Measure, name: str, settings: Settings) -> Trial:
    try:
        return Trial(name, settings, measure(settings))
    except (ConfigError, EngineError, ResourceError, TooManyErrorsError) as error:
        return Trial(name, settings, failure=str(error).splitlines()[0])
