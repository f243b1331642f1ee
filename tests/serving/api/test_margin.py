import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.margin import Margin


@pytest.mark.parametrize(
    ("text", "indent", "kept"),
    [
        ("x = 1\n    y = 2\nz", 4, "x = 1\n    y = 2\n"),
        ("x\n  y", 4, "x\n  "),
        ("x\n\t\ty\n\tz", 2, "x\n\t\ty\n\t"),
        ("x\n    y", 4, "x\n    y"),
        ("x\n    y\n\n    z", 4, "x\n    y\n"),
        ("x\n  ", 4, "x\n  "),
        ("x\n", 4, "x\n"),
        ("  x", 4, "  x"),
        ("x\ny", 0, "x\ny"),
        ("x\ny", -1, "x\ny"),
    ],
)
def test_a_text_ends_where_a_line_comes_out_of_its_block(text: str, indent: int, kept: str) -> None:
    margin = Margin(indent)
    assert margin.keep(text) == kept
    assert margin.crossed == (kept != text)


@given(st.text("ab \t\n", max_size=40), st.integers(0, 4), st.data())
def test_it_does_not_matter_in_how_many_parts_a_text_comes(text: str, indent: int, data: st.DataObject) -> None:
    whole, grown = Margin(indent), Margin(indent)
    kept = ""
    rest = text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        kept += grown.keep(rest[:size])
        rest = rest[size:]
    assert kept == whole.keep(text)
    assert grown.crossed == whole.crossed
