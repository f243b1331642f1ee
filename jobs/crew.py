"""The feeders of a job: filled with units, watched, and replaced when they die."""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from jobs.feeder import Feeder, FeederReport, Route
from jobs.plan import UNIT_BYTES, InputFile, Unit, input_bytes
from jobs.tally import Tally
from jobs.unit import FeederConfig
from serving.errors import FeederError, SpanfillError

UNITS_AHEAD = 3
"""Units that a feeder has under way at least: while one drains, the next is read and tokenised."""

MOST_UNITS = 256
"""Units that a feeder has under way at most, where a unit is a small file."""

MOST_DEATHS = 5
"""Feeders that may die one after the other without a row finished in between."""

REPORT_SECONDS = 5.0
"""What all feeders have to say how far they are: they may be starting, or be gone with their node."""

NO_FILE = InputFile("", "", 0, 0, 0, "")


def wants_more(units: Sequence[Unit], file_of: Callable[[Unit], InputFile], rows: int) -> bool:
    """Whether a feeder with ``units`` under way should get another: until they have ``rows``, as memory allows."""
    if len(units) < UNITS_AHEAD or len(units) >= MOST_UNITS:
        return len(units) < UNITS_AHEAD
    taken = sum(input_bytes(unit, file_of(unit)) for unit in units)
    return sum(unit.rows for unit in units) < rows and taken < UNITS_AHEAD * UNIT_BYTES


@dataclass
class _Seat:
    """One feeder, the units that it has and what it was ``asked`` last; one that dies leaves its seat to another."""

    feeder: Any
    units: dict[Any, Unit] = field(default_factory=dict)
    asked: Any = None


class Crew:
    """A fixed number of feeders working off one queue of units."""

    def __init__(self, config: FeederConfig, count: int, left: deque[Unit], files: Sequence[InputFile]) -> None:
        self._config = config
        self._left = left
        self._files = files
        self._attachment: tuple[str, str, Route] | None = None
        self._rows = 0
        self._deaths = 0
        self._seats = [_Seat(self._hire()) for _ in range(count)]

    def _hire(self) -> Any:
        return ray.remote(Feeder).options(num_cpus=0, max_concurrency=2 * MOST_UNITS).remote(self._config)

    @property
    def units(self) -> int:
        """How many are under way."""
        return sum(len(seat.units) for seat in self._seats)

    def attach(self, deployment: str, app: str, route: Route, *, rows: int) -> None:
        """Let every feeder, and whoever replaces it, call the application's replicas; each has ``rows`` under way."""
        self._attachment = (deployment, app, route)
        self._rows = rows
        self._attach(self._seats)

    def widen(self, route: Route, rows: int) -> None:
        """Go on with more replicas: each feeder, and whoever replaces it, calls all of the ``route``."""
        assert self._attachment is not None
        self._attachment = (*self._attachment[:2], route)
        self._rows = rows
        for seat in self._seats:
            seat.feeder.widen.remote(route.replicas)

    def _attach(self, seats: Sequence[_Seat]) -> None:
        if self._attachment is None:
            return
        for attached in [seat.feeder.attach.remote(*self._attachment) for seat in seats]:
            # One that died is replaced when its units say so too.
            with suppress(RayActorError):
                ray.get(attached)

    def fill(self) -> None:
        """Hand out units, each to the feeder with the fewest rows, until every feeder has enough."""
        wanting = [(sum(unit.rows for unit in seat.units.values()), n, seat) for n, seat in enumerate(self._seats)]
        heapq.heapify(wanting)
        while self._left and wanting:
            rows, number, seat = wanting[0]
            if not wants_more(list(seat.units.values()), self._file, self._rows):
                heapq.heappop(wanting)
                continue
            unit = self._left.popleft()
            seat.units[seat.feeder.run.remote(unit, self._file(unit))] = unit
            heapq.heapreplace(wanting, (rows + unit.rows, number, seat))

    def _file(self, unit: Unit) -> InputFile:
        return self._files[unit.file] if self._files else NO_FILE

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
            names = ", ".join(f"{self._file(u).name} rows {u.start} to {u.stop}" for u in units[:UNITS_AHEAD])
            raise FeederError(
                f"{self._deaths} feeders died one after the other without finishing a row, last with {names}: "
                f"{' '.join(str(death).split())[:300]}",
                remedy="If memory ran out, begin with a smaller --rows-per-part. Then run again to resume.",
            )
        self._left.extendleft(reversed(units))
        seat.units, seat.feeder, seat.asked = {}, self._hire(), None
        self._attach([seat])

    def report(self) -> FeederReport:
        """How far the units under way are, of all feeders that answer; the others are not asked once more."""
        report, seconds = FeederReport(), 0.0
        for seat in self._seats:
            seat.asked = seat.asked or seat.feeder.progress.remote()
        asked = [seat.asked for seat in self._seats]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=REPORT_SECONDS)
        for seat in [seat for seat in self._seats if seat.asked in ready]:
            told, seat.asked = seat.asked, None
            try:
                part: FeederReport = ray.get(told)
            except RayActorError:
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
