"""People and a job on one engine, in simulated seconds: no machine's speed decides."""

import statistics

from tests.benchmarks.two_loads import study


def test_people_hardly_notice_a_job_that_takes_what_is_idle() -> None:
    draws = [study(2.0, seed=seed) for seed in range(3)]
    for found in draws:
        assert found.people > 1_000
        assert 0.3 < found.idle < 0.8
        assert found.end_to_end <= 1.15
        assert found.share >= 0.8 * found.idle
    assert draws[0].first_token <= 1.3
    assert statistics.mean(found.first_token for found in draws) <= 1.3
