"""What is said of a running job when nobody watches a terminal."""

import io

import pytest
from rich.console import Console

from jobs.progress import Display, describe_speed
from jobs.runner import Progress
from jobs.tally import Tally


def told(*updates: Progress) -> str:
    console = Console(file=io.StringIO(), width=60)
    with Display(console) as display:
        for update in updates:
            display.update(update)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def sums(samples: int, eom: int) -> Progress:
    tally = Tally(rows=samples, samples=samples, finish_reasons={"eom": eom, "length": samples - eom}, truncated=10)
    return Progress(
        4_000, tally, seconds=10, stage="running", examples=[{"row": "7", "reason": "eom", "infill": "x\n"}]
    )


def test_quality_is_told_after_a_thousand_completions_and_at_the_end() -> None:
    text = told(sums(500, 500), sums(1_200, 1_100), sums(2_000, 1_900), sums(4_000, 3_900))
    assert text.count("after ") == 2
    assert "after 1,200 completions: eom 91.7%, length 8.3%, empty 0.0%, truncated 0.8%" in text
    assert "after 4,000 completions" in text
    assert "row 7 (eom): 'x\\n'" in text
    assert "WARNING" not in text


def test_few_ends_are_a_loud_warning() -> None:
    assert "WARNING: only 40% of the completions end" in told(sums(1_000, 400))


def test_a_plain_line_comes_each_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("jobs.progress.time.monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=60)
    with Display(console) as display:
        for _ in range(600):
            now += 0.2
            display.update(sums(100, 100))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    plain = [line for line in lines if "of 4,000 rows" in line]
    assert len(plain) in (3, 4)
    assert "100 of 4,000 rows, 10.0 rows/s" in plain[0]
    assert "0:06:30 left" in plain[0]


def test_while_engines_start_rows_that_are_kept_have_no_speed() -> None:
    tally = Tally(rows=300, replayed=400, samples=1_200, finish_reasons={"eom": 1_200})
    assert describe_speed(Progress(4_000, tally)).startswith("0.0 rows/s, 0 tokens/s")
    assert Progress(4_000, tally, seconds=1).fresh_rows == 0


def test_of_several_samples_a_row_no_more_than_all_are_cut() -> None:
    tally = Tally(rows=300, samples=1_200, finish_reasons={"eom": 1_200}, truncated=1_200)
    assert "truncated 100.0%" in told(Progress(300, tally, seconds=10, stage="running", examples=[]))
