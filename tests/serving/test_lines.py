import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from serving import lines as module
from serving.lines import LineEncoder
from serving.tokenizer import codegen25

ENCODING: tiktoken.Encoding = codegen25()._encoding
BLANKS = [
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "    ",
    "\t\t",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1f",
    "\x85",
    "\u00a0",
    "\u2028",
    "\u3000",
]
WORDS = ["def f(x):", "return", "'s", "it's", "x1", "漢字", "é", "<eom>", "\u0301", "\ufeff", "0", "_", "'"]
TEXT = st.lists(
    st.sampled_from(BLANKS) | st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=24,
).map("".join)


@given(st.lists(st.lists(TEXT, max_size=6), max_size=3))
def test_whatever_was_met_before_the_ids_are_those_of_the_whole_text(batches: list[list[str]]) -> None:
    encoder = LineEncoder(ENCODING)
    for texts in batches * 2:
        found = [ids.tolist() for ids in encoder.encode_batch(texts)]
        assert found == [ENCODING.encode_ordinary(text) for text in texts]


def test_a_file_cut_anywhere_has_the_ids_of_its_pieces() -> None:
    text = "".join(f"def f{i}(x):\n    \n    return x  \n\n\n# {'é' * (i % 7)}\t\n" for i in range(300))
    texts = [part for at in range(0, len(text), 97) for part in (text[:at], text[at:])]
    encoder = LineEncoder(ENCODING)
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == [ENCODING.encode_ordinary(t) for t in texts]


def test_beyond_the_bound_lines_are_forgotten_and_ids_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REMEMBERED", 200)
    encoder = LineEncoder(ENCODING)
    for i in range(20):
        text = f"a = {i}\n    b = {i}\n\tc\n"
        assert encoder.encode_batch([text])[0].tolist() == ENCODING.encode_ordinary(text)
        assert len(encoder._known) < 20
