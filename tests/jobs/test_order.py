from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.order import cut, grouped, ideal_cached_tokens, prefix_order, shared_tokens, sort_key
from jobs.sharing import ideal_cached_share

TOKENS = st.lists(st.integers(0, 51_199), max_size=12)


@given(st.lists(TOKENS, max_size=30))
def test_keys_sort_as_token_lists_do(prompts: list[list[int]]) -> None:
    order = prefix_order([sort_key(p) for p in prompts])
    assert [prompts[i] for i in order] == sorted(prompts)


@given(TOKENS, TOKENS)
def test_shared_tokens_counts_the_common_prefix(left: list[int], right: list[int]) -> None:
    common = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    assert shared_tokens(sort_key(left), sort_key(right)) == common


@given(st.lists(TOKENS, max_size=60), st.integers(1, 9))
def test_every_row_is_in_exactly_one_batch_in_order(prompts: list[list[int]], size: int) -> None:
    keys = [sort_key(p) for p in prompts]
    order = prefix_order(keys)
    batches = cut(keys, order, size)
    assert [row for batch in batches for row in batch] == order
    assert all(1 <= len(batch) <= size for batch in batches)
    assert all(len(batch) >= size // 2 for batch in batches[:-1])


def test_batches_end_where_neighbours_share_least() -> None:
    prompts = [[1, 1, i] for i in range(3)] + [[2, 2, i] for i in range(3)]
    keys = [sort_key(p) for p in prompts]
    assert cut(keys, prefix_order(keys), 4) == [[0, 1, 2], [3, 4, 5]]


@given(st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=30), st.integers(1, 4))
def test_the_ideal_of_sorted_prompts_is_that_of_a_cache_that_forgets_nothing(
    prompts: list[list[int]], block_size: int
) -> None:
    keys = [sort_key(p) for p in prompts]
    order = prefix_order(keys)
    total = sum(map(len, prompts))
    share = ideal_cached_share([prompts[i] for i in order], block_size)
    assert sum(ideal_cached_tokens(keys, order, block_size)) == pytest.approx(share * total)


@given(st.lists(TOKENS, max_size=40), st.integers(1, 9), st.integers(1, 3))
def test_groups_hold_all_micro_batches_and_share_no_block(prompts: list[list[int]], size: int, block: int) -> None:
    keys = [sort_key(p) for p in prompts]
    batches = cut(keys, prefix_order(keys), size)
    groups = grouped(keys, batches, block)
    assert [batch for group in groups for batch in group] == batches
    for before, after in pairwise(groups):
        assert shared_tokens(keys[before[-1][-1]], keys[after[0][0]]) < block
