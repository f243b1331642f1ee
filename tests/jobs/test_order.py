from hypothesis import given
from hypothesis import strategies as st

from jobs.order import cut, prefix_order, shared_tokens, sort_key

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
