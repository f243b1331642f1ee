"""The locality study: the job's order and lanes over schedulers with prefix caches of any size."""

import random

import pytest

from tests.benchmarks.locality import Case, cases, measure

BLOCK = 16


def shared(groups: int, each: int, seed: int = 0) -> list[list[int]]:
    """Shuffled prompts of 320 tokens; those of a group share the first 256."""
    draw = random.Random(seed)
    heads = [draw.choices(range(1_000, 9_000), k=256) for _ in range(groups)]
    prompts = [head + draw.choices(range(1_000, 9_000), k=64) for head in heads for _ in range(each)]
    draw.shuffle(prompts)
    return prompts


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(replicas=4),
        Case(replicas=8),
        Case(replicas=4, kv=8_000),
        Case(replicas=4, rows_per_part=100, order="global"),
        Case(replicas=4, rows_per_part=100, order="global", feeders=2),
        Case(replicas=4, window=4.0),
    ],
)
def test_what_a_part_shares_is_found_by_any_number_of_replicas(case: Case) -> None:
    """At least 0.95 of what could be, where the KV cache holds a group (here 2,000 tokens) and the rows under way."""
    prompts = shared(groups=40, each=25)
    told = measure(case, prompts, sorted(prompts), block=BLOCK, max_tokens=8)
    assert told["ideal of all"] == pytest.approx(0.8 * 24 / 25, abs=0.001)
    assert told["cached"] / told["ideal of parts"] >= 0.95
    assert told["cached"] / told["ideal of all"] >= 0.93


def test_small_parts_of_a_shuffled_input_share_little() -> None:
    """A cache of a single group remembers nothing from part to part."""
    prompts = shared(groups=40, each=25)
    small = measure(Case(rows_per_part=100, kv=3_000), prompts, sorted(prompts), block=BLOCK, max_tokens=8)
    assert small["cached"] / small["ideal of parts"] >= 0.95
    assert small["cached"] / small["ideal of all"] < 0.8


def test_a_small_cache_loses_what_file_order_scatters_and_order_keeps() -> None:
    prompts = shared(groups=40, each=25)
    told = {
        order: measure(Case(order=order, kv=8_000), prompts, prompts, block=BLOCK, max_tokens=8)["cached"]
        for order in ("prefix", "input")
    }
    assert told["input"] < 0.7 * told["prefix"]


def test_every_case_differs_from_the_first() -> None:
    first, *others = cases(8_000)
    assert first == Case()
    assert len(set(others) | {first}) == len(others) + 1
