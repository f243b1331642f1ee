"""``bench loads``: people come when they would come anyway, and the figures are what the readings say."""

import pytest

from tests.benchmarks.loads import Window, parse, report
from tests.benchmarks.people import Taken, make_load


def test_people_come_at_the_same_moments_with_the_same_prompts_whatever_becomes_of_them() -> None:
    load, again = (make_load(5.0, 60.0, 64, 200, seed=3) for _ in range(2))
    assert load == again != make_load(5.0, 60.0, 64, 200, seed=4)
    assert load.moments == sorted(load.moments)
    assert 200 < len(load.moments) == len(load.prompts) < 400
    assert {len(text) for pair in load.prompts for text in pair} == {200}


def test_the_jobs_share_is_that_of_its_own_tokens_in_the_same_time() -> None:
    quiet = [Taken(0.1, 1.0, 50) for _ in range(10)]
    loud = [Taken(0.2, 1.1, 50) for _ in range(10)]
    people, job, both = Window(60, 15, 500), Window(60, 60, 60_000), Window(50, 50, 500 + 40_000)
    told = report(parse([]), quiet, loud, people, job, both, row_tokens=10.0)
    assert told["idle while people are alone"] == 0.75
    assert told["job alone, rows/s"] == pytest.approx(100)
    assert told["job beside people, rows/s"] == pytest.approx(80)
    assert told["job's share of its speed alone"] == pytest.approx(0.8)
    assert told["job's share of what is idle"] == pytest.approx(0.8 / 0.75, abs=1e-3)
    assert told["ratios"] == {"ttft p50": 2.0, "ttft p99": 2.0, "e2e p50": 1.1, "e2e p99": 1.1}


def test_a_file_that_could_not_be_written_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--json", "/nowhere/at/all.json"])
    assert "cannot be written" in capsys.readouterr().err
