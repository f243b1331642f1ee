"""Which replica is which lane, as replicas come and go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.router import settled

REPLICAS = st.frozensets(st.sampled_from("abcdefgh"), max_size=8)


@pytest.mark.parametrize(
    ("lanes", "present", "then"),
    [
        ("", "ba", "ab"),
        ("bc", "abc", "bca"),
        ("abcd", "acd", "adc"),
        ("abcd", "abc", "abc"),
        ("abcd", "acdx", "axcd"),
        ("abcd", "cdxyz", "xycdz"),
        ("abcd", "b", "b"),
        ("ab", "", ""),
    ],
)
def test_few_lanes_change_their_replica(lanes: str, present: str, then: str) -> None:
    assert "".join(settled(list(lanes), set(present))) == then


@given(st.lists(REPLICAS, max_size=8))
def test_each_replica_that_is_there_is_one_lane_and_a_lane_moves_only_where_it_must(
    times: list[frozenset[str]],
) -> None:
    lanes: list[str] = []
    for present in times:
        before, lanes = lanes, settled(lanes, present)
        assert sorted(lanes) == sorted(present)
        gone = len(set(before) - present)
        moved = sum(was in present and lanes.index(was) != lane for lane, was in enumerate(before))
        assert moved <= gone
        if len(present - set(before)) >= gone:
            assert moved == 0
