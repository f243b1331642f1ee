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


@dataclass(frozen=True)
class Figures:
    """What one run measured, and the settings that its engines went by, unasked ones among them."""

    rows_per_second: float
    cached_share: float
    errors: int = 0
    in_force: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One engine start: its settings, by the one that is tried, and its figures or why there are none."""

    setting: str
    settings: Settings
    figures: Figures | None = None
    failure: str = ""


@dataclass
class Tuning:
    """What was tried and found: ``noise`` is the share by which two equal runs differed.

    ``in_force`` is what the engines of the best went by, asked for or not. ``left_out`` says of values that were not
    tried why not.
    """

    best: Settings
    trials: list[Trial] = field(default_factory=list)
    in_force: Settings = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
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
Objection = Callable[[str, Settings, Settings], str]
"""Why a value is not to be tried, or nothing: the setting's name, what would be asked for, what the best goes by."""
Tell = Callable[[Tuning], None]


def search(
    measure: Measure,
    knobs: Sequence[Knob],
    begin: Settings,
    *,
    late: Callable[[], bool],
    objection: Objection = lambda name, asked, in_force: "",
    tell: Tell = lambda _: None,
) -> Tuning:
    """Coordinate descent over ``knobs`` from the settings ``begin``; ``tell`` is called after each trial.

    A first run warms what all runs share (files that are read, kernels that are compiled) and counts for nothing. The
    baseline is measured twice, and a setting wins only if two of its own runs are better than the best so far by more
    than the noise. A setting that the engine refuses or does not go by is a trial without figures; what the engine does
    unasked is not tried, nor what ``objection`` says something against. Ends when ``late`` says so.
    """
    found = Tuning(dict(begin))
    first = measure(found.best)
    found.in_force = first.in_force
    found.trials.append(Trial("warm-up", found.best, first))
    tell(found)
    _baseline(measure, found, tell)
    for knob in knobs:
        for value in knob.values:
            setting, settings = f"{knob.name}={value}".lower(), found.best | {knob.name: value}
            if value == (found.in_force | found.best).get(knob.name):
                continue
            if why := objection(knob.name, settings, found.in_force):
                found.left_out[setting] = why
                continue
            if late():
                return found
            _try(measure, knob.name, setting, settings, found, tell)
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


def _try(measure: Measure, name: str, setting: str, settings: Settings, found: Tuning, tell: Tell) -> None:
    """Measure a setting, a second time if the first one looks like a win, and keep it if both do."""
    wins: list[Figures] = []
    while len(wins) < 2:
        trial = _measured(measure, name, setting, settings)
        found.trials.append(trial)
        won = trial.figures is not None and found.is_win(trial.figures)
        if won and trial.figures is not None:
            wins.append(trial.figures)
        if len(wins) == 2:
            found.best, found.in_force = settings, wins[-1].in_force
            found.rows_per_second = sum(figures.rows_per_second for figures in wins) / 2
        tell(found)
        if not won:
            return


def _measured(measure: Measure, name: str, setting: str, settings: Settings) -> Trial:
    try:
        figures = measure(settings)
    except (ConfigError, EngineError, ResourceError, TooManyErrorsError) as error:
        return Trial(setting, settings, failure=str(error).splitlines()[0])
    if (kept := figures.in_force.get(name, settings[name])) != settings[name]:
        return Trial(setting, settings, failure=f"the engine goes by {name}={kept} all the same".lower())
    return Trial(setting, settings, figures)
