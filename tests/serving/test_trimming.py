import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.trimming import TRIMMINGS

TEXT = st.text("ab\n ", max_size=30)


@pytest.mark.parametrize(
    ("name", "infill", "suffix", "kept"),
    [
        ("suffix-overlap", "x = 1\nreturn x\n", "return x\n\nmore", "x = 1\n"),
        ("suffix-overlap", "f(a)", ")", "f(a)"),
        ("suffix-echo", "a = 1\nfor item in sorted(items): b", "\n  for item in sorted(items):\n", "a = 1\n"),
        ("suffix-echo", "short", "short", "short"),
        ("next-line", "a = 1\n    return a", "\n    return a\n", "a = 1\n"),
        ("next-line", "return a", "\nreturn a\n", "return a"),
        ("repeated-lines", "a\nb\nb\nb\nb\n", "", "a\nb\n"),
        ("repeated-lines", "\n\n\n\na", "", "\n\n\n\na"),
    ],
)
def test_each_trimming_cuts_what_it_says(name: str, infill: str, suffix: str, kept: str) -> None:
    assert TRIMMINGS[name](infill, "", suffix) == kept


@given(st.sampled_from(sorted(TRIMMINGS)), TEXT, TEXT)
def test_a_trimming_only_ever_shortens(name: str, infill: str, suffix: str) -> None:
    assert infill.startswith(TRIMMINGS[name](infill, "", suffix))
