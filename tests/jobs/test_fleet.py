import random
from array import array

import pytest

from tests.benchmarks.clockwork import H100, Dealt, Study
from tests.benchmarks.fleet import main, study


def test_lanes_keep_unequal_schedulers_full_until_they_end_together() -> None:
    """Three replicas with the engines' own scheduler on the study's clock; what is left idle is the first and last."""
    told = study(3, 60.0, feed=5_000.0, call=0.02, slowest=0.5)
    assert told["of steady"] > 0.95
    assert told["busy_share"] > 0.95
    assert told["ends within"] < 0.04


def test_eight_of_unequal_speed_end_within_2_percent_of_two_minutes() -> None:
    """Speeds from 1 down to a quarter, one feeder, as a job has by default."""
    told = study(8, 120.0, feed=5_000.0, call=0.02, slowest=0.25, feeders=1)
    assert told["ends within"] < 0.02
    assert told["busy_share"] > 0.97


def test_more_places_than_the_cache_has_room_for_change_nothing() -> None:
    """vLLM's own 1,024 on such a GPU: what waits in an engine cannot be dealt anew at the end."""
    told = study(8, 60.0, feed=5_000.0, call=0.02, slowest=0.25, feeders=1, places=1_024)
    assert told["ends within"] < 0.06
    assert told["of steady"] > 0.96


def test_answers_that_run_to_their_longest_keep_no_places_of_others() -> None:
    """One in fifty, as of a model that does not always end: their calls last as long as they do, their places not."""
    roofline = H100.model_copy(update={"max_num_seqs": 1_024, "kv_cache_tokens": 990_000, "kv_bytes_per_token": 57_344})
    rows, draw = 10_000, random.Random(1)

    def deal(_: int) -> Dealt:
        groups = [[list(range(at, min(at + 64, rows)))] for at in range(0, rows, 64)]
        return Dealt(groups, [2_348.0] * rows, lambda row: array("i", [draw.getrandbits(30)]) * 300)

    study = Study([1.0], deal, feed=5_000.0, call=0.02, max_tokens=60, runaway=0.02, longest=2_048, roofline=roofline)
    assert study.run([rows])["mean_running"] > 600


@pytest.mark.parametrize("wrong", [["--slowest", "3"], ["--slowest", "0"], ["--study", "0"], []])
def test_what_makes_no_fleet_is_refused(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fleet.py", "--study", "2", *wrong] if wrong else ["fleet.py"])
    with pytest.raises(SystemExit):
        main()
    assert "spanfill bench fleet: error:" in capsys.readouterr().err
