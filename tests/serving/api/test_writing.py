"""The text of a choice as its tokens come is what it is when all have come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.ask import Piece
from serving.api.writing import Writing, prompt_tokens
from serving.formats import load_format
from serving.protocol import Growth
from serving.stopping import GrowingText

FORMAT = load_format("codegen25")
EOM = FORMAT.tokenizer.special_id("<eom>")
TEXTS = st.text(st.sampled_from("ab\n ()é😀π\t=x1END"), max_size=60)
STOPS = st.lists(st.text(st.sampled_from("ab\n END)é"), min_size=1, max_size=4), max_size=3)


def written(
    ids: list[int],
    sizes: list[int],
    stop: list[str],
    *,
    end: int | None = EOM,
    through: bool = False,
    least: int = 0,
) -> list[Piece]:
    """The pieces when so many tokens come at a time."""
    writing = Writing(0, FORMAT, stop, detailed=True, through=through, least=least)
    pieces: list[Piece | None] = []
    at = 0
    for size in [*sizes, len(ids)]:
        part, at = ids[at : at + size], at + size
        if at >= len(ids):
            pieces.append(writing.add(Growth(0, 0, part, finish_reason="stop" if end else "length", stop_token_id=end)))
            break
        pieces.append(writing.add(Growth(0, 0, part)))
    return [piece for piece in pieces if piece is not None]


@given(text=TEXTS, stop=STOPS, sizes=st.lists(st.integers(1, 5), max_size=30))
def test_pieces_join_to_the_infill(text: str, stop: list[str], sizes: list[int]) -> None:
    ids = FORMAT.tokenizer.encode(text)
    infill = FORMAT.infill(ids, stop_token_id=EOM, stop=stop)
    pieces = written(ids, sizes, stop)
    assert "".join(piece.text for piece in pieces) == infill.text
    assert [piece.reason for piece in pieces] == [None] * (len(pieces) - 1) + [infill.finish_reason]


@given(text=TEXTS, stop=STOPS, sizes=st.lists(st.integers(1, 5), max_size=30), least=st.integers(0, 30))
def test_stop_strings_within_the_first_tokens_end_nothing(
    text: str, stop: list[str], sizes: list[int], least: int
) -> None:
    ids = FORMAT.tokenizer.encode(text)
    growing = GrowingText(FORMAT.decode)
    needless = len("".join(growing.add(token_id) for token_id in ids[:least]))
    shown = "".join(piece.text for piece in written(ids, sizes, stop, least=least))
    assert shown == FORMAT.infill(ids, stop_token_id=EOM, stop=stop, least=needless).text
    assert len(shown) > needless - max(map(len, stop), default=0) or shown == text


@given(text=TEXTS, stop=STOPS, sizes=st.lists(st.integers(1, 5), max_size=30))
def test_no_part_of_a_stop_string_that_came_is_shown(text: str, stop: list[str], sizes: list[int]) -> None:
    shown = "".join(piece.text for piece in written(FORMAT.tokenizer.encode(text), sizes, stop))
    assert not any(word in shown for word in stop)
    assert text.startswith(shown)


@given(text=TEXTS, sizes=st.lists(st.integers(1, 3), max_size=30))
def test_no_character_is_split(text: str, sizes: list[int]) -> None:
    pieces = written(FORMAT.tokenizer.encode(text), sizes, [])
    assert not any("\ufffd" in piece.text for piece in pieces)


@given(text=TEXTS, stop=STOPS, sizes=st.lists(st.integers(1, 5), max_size=30))
def test_tokens_stand_where_their_text_does(text: str, stop: list[str], sizes: list[int]) -> None:
    pieces = written(FORMAT.tokenizer.encode(text), sizes, stop)
    shown = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    for token in tokens:
        assert text.startswith(token.text, token.offset)
        assert token.offset <= len(shown)
    assert "".join(token.text for token in tokens) == shown
    told = ""
    for piece in pieces:
        told += piece.text
        assert all(token.offset + len(token.text) <= len(told) for token in piece.tokens)


@pytest.mark.parametrize("sizes", [[1] * 9, [9], [2, 1]], ids=str)
@pytest.mark.parametrize("text", ["a😀", "a 😀", "é 😀"])
def test_a_character_that_never_became_whole_is_shown_as_broken_at_the_end(text: str, sizes: list[int]) -> None:
    broken = FORMAT.tokenizer.encode(text)[:-1]
    pieces = written(broken, sizes, [], end=None)
    shown = "".join(piece.text for piece in pieces)
    assert shown == FORMAT.decode(broken)
    assert shown.endswith("\ufffd")
    assert pieces[-1].reason == "length"
    assert "".join(token.text for piece in pieces for token in piece.tokens) == shown


def test_the_stop_string_that_ended_it_is_named() -> None:
    (*_, last) = written(FORMAT.tokenizer.encode("abc\n\ndef"), [1] * 9, ["zzz", "\n\n"])
    assert (last.reason, last.stop_word) == ("stop", "\n\n")


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("ab c", ["abX", "b"], "a"),
        ("abX", ["abX", "b"], ""),
        ("aaab", ["aab", "ab"], "a"),
        ("x = 1\n\ny", ["\n\ny = 2", "\n"], "x = 1"),
        ("x = 1\n\ny = 2", ["1\n\ny = 2", "\n"], "x = "),
    ],
)
def test_a_stop_string_that_begins_before_another_takes_back_what_it_holds(
    text: str, stop: list[str], shown: str
) -> None:
    ids = [token_id for character in text for token_id in FORMAT.tokenizer.encode(character)]
    pieces = written(ids, [1] * len(ids), stop)
    assert "".join(piece.text for piece in pieces) == shown
    assert pieces[-1].reason == "stop"


def test_nothing_counts_behind_a_control_token() -> None:
    ids = [*FORMAT.tokenizer.encode("abc"), EOM, *FORMAT.tokenizer.encode("more")]
    pieces = written(ids, [1] * 9, [], end=None)
    assert "".join(piece.text for piece in pieces) == "abc"
    assert pieces[-1].reason == "eom"


def test_through_writes_on_behind_a_control_token() -> None:
    ids = [*FORMAT.tokenizer.encode("abc"), EOM, *FORMAT.tokenizer.encode("more")]
    pieces = written(ids, [1] * 9, [], end=None, through=True)
    assert "".join(piece.text for piece in pieces) == "abcmore"
    assert pieces[-1].reason == "length"


def test_a_cut_shows_what_no_stop_string_can_take_back() -> None:
    writing = Writing(3, FORMAT, ["\nEND"])
    shown = writing.add(Growth(0, 0, FORMAT.tokenizer.encode("x = 1\ny\n")))
    cut = writing.cut()
    assert shown is not None
    assert shown.text + cut.text == "x = 1\ny"
    assert (cut.index, cut.reason) == (3, "time")


@pytest.mark.parametrize("text", ["def f():\n    return 1\n", "π = 3.14  # 😀"])
def test_an_echo_is_the_prompts_text(text: str) -> None:
    ids = FORMAT.tokenizer.encode(text)
    tokens = prompt_tokens(FORMAT, ids, [-1.0] * (len(ids) - 1), None)
    assert "".join(token.text for token in tokens) == text
    assert tokens[0].logprob is None
    assert {token.logprob for token in tokens[1:]} == {-1.0}


def test_an_echo_of_a_text_is_what_was_sent_though_its_prompt_begins_with_a_control_token() -> None:
    (begin, *rest) = FORMAT.prompt("", None, max_tokens=1, max_context=99).token_ids
    assert rest == []
    (token,) = prompt_tokens(FORMAT, [begin], None, None, as_sent=True)
    assert (token.token_id, token.text) == (begin, "")


def test_an_echo_shows_control_tokens_by_their_names() -> None:
    ids = [*FORMAT.tokenizer.encode("a"), FORMAT.tokenizer.special_id("<mask_1>")]
    assert "".join(token.text for token in prompt_tokens(FORMAT, ids, None, None)) == "a<mask_1>"
