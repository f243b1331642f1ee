from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.cursor import split_at
from serving.errors import UsageError


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=60), data=st.data())
def test_the_two_halves_are_the_file(tmp_path_factory: pytest.TempPathFactory, text: str, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("c") / "f.py"
    file.write_bytes(text.encode())
    at = data.draw(st.integers(0, len(text)))
    line, column = text[:at].count("\n") + 1, at - (text[:at].rfind("\n") + 1) + 1
    assert split_at(f"{file}:{line}:{column}") == (text[:at], text[at:])


@pytest.mark.parametrize(
    ("suffix", "words"),
    [(":9:1", "no line 9"), (":1:99", "characters"), (":x:1", "FILE:LINE:COL"), (":0:1", "counted")],
)
def test_wrong_cursors_say_what_is_wrong(tmp_path: Path, suffix: str, words: str) -> None:
    file = tmp_path / "f.py"
    file.write_text("a = 1\n")
    with pytest.raises(UsageError, match=words):
        split_at(f"{file}{suffix}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.py"):
        split_at(f"{tmp_path}/nothing.py:1:1")
