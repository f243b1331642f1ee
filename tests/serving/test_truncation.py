import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.formats import load_format
from serving.truncation import room_for_text, window

LENGTH = st.integers(0, 3_000)
SHARE = st.floats(0, 1)
ALIGN = st.sampled_from([1, 16, 64, 256, 512])


@given(LENGTH, LENGTH, st.integers(1, 2_000), SHARE, ALIGN)
def test_what_is_kept_fits_and_keeps_the_right_ends(
    prefix: int, suffix: int, room: int, share: float, align: int
) -> None:
    kept = window(prefix, suffix, room, suffix_share=share, align=align)
    assert 0 <= kept.prefix_start <= prefix
    assert 0 <= kept.suffix_stop <= suffix
    assert prefix - kept.prefix_start + kept.suffix_stop <= room
    if prefix + suffix <= room:
        assert (kept.prefix_start, kept.suffix_stop) == (0, suffix)


@given(LENGTH, LENGTH, st.integers(64, 2_000), SHARE)
def test_room_is_not_wasted_without_alignment(prefix: int, suffix: int, room: int, share: float) -> None:
    kept = window(prefix, suffix, room, suffix_share=share, align=1)
    assert prefix - kept.prefix_start + kept.suffix_stop == min(room, prefix + suffix)
    if suffix > int(room * share) and prefix > room - int(room * share):
        assert kept.suffix_stop == int(room * share)


@given(st.integers(2_000, 9_000), st.integers(1_024, 2_000), ALIGN)
def test_a_cut_prefix_starts_at_a_multiple_and_uses_a_quarter_of_its_room_at_least(
    prefix: int, room: int, align: int
) -> None:
    start = window(prefix, 0, room, align=align).prefix_start
    assert start % align == 0
    assert prefix - start > room - align
    assert prefix - start >= room // 4


def test_an_alignment_beyond_the_room_is_the_largest_power_of_two_that_leaves_a_quarter_of_it() -> None:
    assert window(1_000, 0, 100, align=512).prefix_start % 64 == 0
    assert {1_000 - window(1_000 + i, 0, 100, align=512).prefix_start + i for i in range(64)} == set(range(37, 101))


def test_cursors_of_one_file_share_their_windows_start() -> None:
    starts = [window(length, 400, 1_000, align=256).prefix_start for length in range(1_300, 1_500)]
    assert len(set(starts)) <= 2


def test_max_tokens_beyond_the_context_is_refused_with_the_most_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"max_tokens = 2048 .*--max-tokens 2043"):
        room_for_text(2_048, 2_048, 4)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.sampled_from(["漢é🙂" * 90, "a b " * 200])


@given(TEXT, TEXT, st.integers(6, 120), SHARE, ALIGN)
def test_a_prompt_holds_whole_characters_and_says_how_many(
    prefix: str, suffix: str, context: int, share: float, align: int
) -> None:
    fmt = load_format("codegen25")
    prompt = fmt.prompt(prefix, suffix, max_tokens=1, max_context=context, prefix_align=align, suffix_share=share)
    assert len(prompt.token_ids) + 1 <= context
    mask, end, sep = (fmt.tokenizer.special_id(t) for t in ("<mask_1>", "<|endoftext|>", "<sep>"))
    first = prompt.token_ids.index(mask)
    assert prompt.token_ids[-3:] == [end, sep, mask]
    assert fmt.tokenizer.decode(prompt.token_ids[:first]) == prefix[len(prefix) - prompt.prefix_chars :]
    assert fmt.tokenizer.decode(prompt.token_ids[first + 1 : -3]) == suffix[: prompt.suffix_chars]
    assert prompt.truncated == (prompt.prefix_chars < len(prefix) or prompt.suffix_chars < len(suffix))


def test_a_prefix_of_ten_megabytes_is_cut_like_any_other() -> None:
    fmt = load_format("codegen25")
    prompt = fmt.prompt("x = 1\n" * 1_700_000, "y\n", max_tokens=16, max_context=256)
    assert prompt.truncated
    assert 0 < prompt.prefix_chars < 1_000
