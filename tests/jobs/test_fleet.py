from tests.benchmarks.fleet import study


def test_lanes_keep_unequal_schedulers_full_until_they_end_together() -> None:
    """Three replicas with the engines' own scheduler on the study's clock; what is left idle is the first and last."""
    told = study(3, 60.0, feed=5_000.0, call=0.02, slowest=0.5)
    assert told["of steady"] > 0.95
    assert told["busy_share"] > 0.95
    assert told["ends within"] < 0.04
