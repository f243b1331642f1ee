"""What the terminal shows of a running job: a rich display, or plain lines when nobody watches."""

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from jobs.runner import Progress, Watcher
from jobs.status import Status

CHECK_AT = 1_000
"""Completions after which the first look at their quality is printed."""

LOW_EOM_SHARE = 0.5
PLAIN_SECONDS = 30.0


class Display(Watcher):
    """A watcher that writes to stderr; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task: TaskID | None = None
        self._live = Live(self._bar, console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._spoke = time.monotonic()
        self._stage = ""
        self._checked = False
        self.last: Progress | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if kind is None and self.last and _completions(self.last):
            self.check_quality(self.last)

    def say(self, message: str) -> None:
        """Print one line above the display."""
        self.console.print(escape(message), highlight=False, soft_wrap=True)

    def update(self, progress: Progress) -> None:
        """Show the latest sums."""
        self.last = progress
        if progress.stage != self._stage:
            self._stage = progress.stage
            if not self._live:
                self.say(progress.stage)
        if not self._checked and _completions(progress) >= CHECK_AT:
            self._checked = True
            self.check_quality(progress)
        if self._live:
            self._draw(progress)
        elif time.monotonic() - self._spoke >= PLAIN_SECONDS:
            self._spoke = time.monotonic()
            done = progress.resumed_rows + progress.tally.rows
            self.say(f"{done:,} of {progress.total:,} rows, {describe_speed(progress)}, {_eta(progress)} left")

    def _draw(self, progress: Progress) -> None:
        done = progress.resumed_rows + progress.tally.rows
        if self._task is None:
            self._task = self._bar.add_task(progress.stage, total=progress.total, speed="")
        self._bar.update(
            self._task, description=progress.stage, total=progress.total, completed=done, speed=describe_speed(progress)
        )

    def check_quality(self, progress: Progress) -> None:
        """Print how the completions end and three of them; warn loudly when few end by themselves."""
        tally = progress.tally
        shares = {name: tally.finish_reasons.get(name, 0) / tally.samples for name in ("eom", "length")}
        shares |= {"empty": tally.empty / tally.samples, "truncated": tally.truncated / tally.samples}
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        self.say(f"after {tally.samples:,} completions: {told}")
        for example in progress.examples:
            self.say(f"  row {example['row']} ({example['reason']}): {example['infill'][:200]!r}")
        by_text = sum(tally.finish_reasons.get(name, 0) for name in ("stop", "overlap")) / tally.samples
        if shares["eom"] + by_text < LOW_EOM_SHARE:
            self.console.print(
                f"[bold red]WARNING: only {shares['eom']:.0%} of the completions end with the model's end of infill."
                "[/] Is this the right --format, and is --max-tokens long enough?",
                highlight=False,
                soft_wrap=True,
            )


def _completions(progress: Progress) -> int:
    """Those that have ended; a job that scores has none."""
    return sum(progress.tally.finish_reasons.values())


def describe_speed(progress: Progress) -> str:
    """Rows and tokens a second (made or scored), cache hits and errors, in one line."""
    tally, seconds = progress.tally, progress.seconds or math.inf
    fresh = progress.fresh_rows / max(1, tally.rows)
    hits = tally.cached_tokens / tally.prompt_tokens if tally.prompt_tokens else 0.0
    errors = f", {tally.errors:,} errors" if tally.errors else ""
    tokens = tally.completion_tokens + tally.scored_tokens
    return (
        f"{progress.fresh_rows / seconds:,.1f} rows/s, {tokens * fresh / seconds:,.0f} tokens/s, "
        f"{hits:.0%} cache hits{errors}"
    )


def _eta(progress: Progress) -> str:
    left = progress.total - progress.resumed_rows - progress.tally.rows
    if not progress.fresh_rows or not progress.seconds:
        return "unknown time"
    return _clock(left * progress.seconds / progress.fresh_rows)


def describe_status(status: Status) -> list[str]:
    """What ``spanfill status`` prints, a line each."""
    share = status.rows / status.total_rows if status.total_rows else 1.0
    lines = [
        f"{status.state}: {status.rows:,} of {status.total_rows:,} rows ({share:.1%}), "
        f"{status.parts:,} of {status.total_parts:,} parts"
    ]
    speed = f"{status.rows_per_second:,.1f} rows/s"
    if status.state == "running":
        left = f", {_clock(status.eta_seconds)} left" if status.eta_seconds is not None else ""
        lines.append(f"{speed}{left}; process {status.pid} on {status.host}, heard {status.heartbeat_age} s ago")
    elif status.pid is not None:
        ago = _clock(status.heartbeat_age or 0)
        lines.append(f"last run: {speed}; process {status.pid} on {status.host}, last heard {ago} ago")
    if status.errors:
        codes = ", ".join(f"{code}: {count:,}" for code, count in sorted(status.error_codes.items()))
        lines.append(f"{status.errors:,} error rows ({codes})")
    if status.state == "interrupted":
        lines.append("run the same command again to resume")
    return lines + [f"damaged: {problem}" for problem in status.problems]


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
