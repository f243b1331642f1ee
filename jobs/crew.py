"""The feeders of a job: filled with units, watched, and replaced when they die."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from jobs.feeder import Feeder, FeederReport, Route
from jobs.plan import InputFile, Unit
from jobs.tally import Tally
from jobs.unit import FeederConfig
from serving.errors import FeederError, SpanfillError

UNITS_AHEAD = 3
"""Units that a feeder has under way at least: while one drains, the next is read and tokenised."""

MOST_DEATHS = 5
"""Feeders that may die one after the other without a row finished in between."""

NO_FILE = InputFile("", "", 0, 0, 0, "")


@dataclass
class _Seat:
    """One feeder and the units that it has; a feeder that dies leaves its seat to another."""

    feeder: Any
    units: dict[Any, Unit] = field(default_factory=dict)


class Crew:
    """A fixed number of feeders working off one queue of units."""

    def __init__(self, config: FeederConfig, count: int, left: deque[Unit], files: Sequence[InputFile]) -> None:
        self._config = config
        self._left = left
        self._files = files
        self._attachment: tuple[str, str, Route] | None = None
        self._ahead = UNITS_AHEAD
        self._deaths = 0
        self._seats = [_Seat(self._hire()) for _ in range(count)]

    def _hire(self) -> Any:
        return ray.remote(Feeder).options(num_cpus=0, max_concurrency=64).remote(self._config)

    @property
    def busy(self) -> bool:
        """Whether a unit is under way."""
        return any(seat.units for seat in self._seats)

    def attach(self, deployment: str, app: str, route: Route, *, units: int) -> None:
        """Let every feeder, and whoever replaces it, call the application's replicas; each has ``units`` units."""
        self._attachment = (deployment, app, route)
        self._ahead = max(UNITS_AHEAD, units)
        for seat in self._seats:
            self._attach(seat)

    def _attach(self, seat: _Seat) -> None:
        if self._attachment is None:
            return
        try:
            ray.get(seat.feeder.attach.remote(*self._attachment))
        except RayActorError:
            return  # Its units say so too, and then it is replaced.

    def fill(self) -> None:
        """Hand out units until every feeder has enough."""
        for seat in self._seats:
            while self._left and len(seat.units) < self._ahead:
                unit = self._left.popleft()
                file = self._files[unit.file] if self._files else NO_FILE
                seat.units[seat.feeder.run.remote(unit, file)] = unit

    def gather(self, timeout: float) -> list[Tally]:
        """Wait up to ``timeout`` seconds for a unit; the sums of those that are finished.

        The units of a feeder that died go back to the queue's front. Raises what stopped a unit, and ``FeederError``
        when feeders die without doing anything.
        """
        finished: list[Tally] = []
        references = [reference for seat in self._seats for reference in seat.units]
        if references:
            ray.wait(references, timeout=timeout)
        for seat in self._seats:
            ready, _ = ray.wait(list(seat.units), num_returns=len(seat.units), timeout=0) if seat.units else ([], [])
            try:
                for reference in ready:
                    tally = ray.get(reference)
                    del seat.units[reference]
                    finished += [tally] if tally is not None else []
            except RayActorError as error:
                self._replace(seat, error)
            except RayTaskError as error:
                if isinstance(error.cause, SpanfillError):
                    raise error.cause from None
                raise
        return finished

    def _replace(self, seat: _Seat, death: RayActorError) -> None:
        self._deaths += 1
        units = list(seat.units.values())
        if self._deaths > MOST_DEATHS:
            names = ", ".join(f"{self._files[u.file].name} rows {u.start} to {u.stop}" for u in units[:UNITS_AHEAD])
            raise FeederError(
                f"{self._deaths} feeders died one after the other without finishing a row, last with {names}: "
                f"{' '.join(str(death).split())[:300]}",
                remedy="If memory ran out, begin with a smaller --rows-per-part. Then run again to resume.",
            )
        self._left.extendleft(reversed(units))
        seat.units, seat.feeder = {}, self._hire()
        self._attach(seat)

    def report(self) -> FeederReport:
        """How far the units under way are, of all feeders that answer."""
        report, seconds = FeederReport(), 0.0
        for reference in [seat.feeder.progress.remote() for seat in self._seats]:
            try:
                part: FeederReport = ray.get(reference, timeout=5)
            except (RayActorError, GetTimeoutError):
                continue
            report.units.update(part.units)
            report.examples.extend(part.examples)
            report.said.extend(part.said)
            seconds += part.cpu_seconds
        if any(tally.rows > tally.replayed for tally in report.units.values()):
            self._deaths = 0
        return replace(report, cpu_seconds=seconds)

    def close(self) -> None:
        """End the feeders: one that outlived its job would go on writing."""
        for seat in self._seats:
            ray.kill(seat.feeder)

    def stop(self, drain_seconds: float) -> None:
        """Let every feeder finish what is in flight, for ``drain_seconds`` at most, and journal it."""
        for reference in [seat.feeder.stop.remote(drain_seconds) for seat in self._seats]:
            try:
                ray.get(reference, timeout=drain_seconds + 5)
            except (RayActorError, GetTimeoutError):
                continue
