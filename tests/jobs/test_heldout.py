import sys

import pytest

from jobs.heldout import FEWEST_CHARS, HELD_OUT, REPEATED, excluded, held_out, left_out
from jobs.pairs import standard_library

on_training_python = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the model was trained on Python 3.11")


def library_texts() -> dict[str, str]:
    """Every module of use, tests and tables and tiny files aside, by its path."""
    root = standard_library()
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    texts = {name: (root / name).read_text(encoding="utf-8", errors="ignore") for name in names if not excluded(name)}
    return {name: text for name, text in texts.items() if len(text) >= FEWEST_CHARS}


def longer_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 12]


def test_about_a_twentieth_is_left_out_always_the_same() -> None:
    names = [f"pkg/m{i}.py" for i in range(4_000)]
    assert 0.04 < sum(map(left_out, names)) / len(names) < 0.06
    assert left_out("opcode.py")
    assert not left_out("wave.py")


def test_what_is_drawn_was_left_out_and_is_no_table_and_no_test() -> None:
    assert all(left_out(path) and not excluded(path) for path in HELD_OUT)
    assert not HELD_OUT & set(REPEATED)


@pytest.mark.parametrize(
    "path",
    [
        "wave.py",
        "zipfile.py",
        "zipfile/__init__.py",
        "chunk.py",
        "encodings/cp858.py",
        "pydoc_data/topics.py",
        "test/test_ast.py",
    ],
)
def test_texts_that_were_trained_on_or_never_of_use_are_not_drawn(path: str) -> None:
    assert not held_out(path)


def test_every_supported_python_has_modules_to_draw_from() -> None:
    root = standard_library()
    assert sum((root / path).is_file() for path in HELD_OUT) >= 10


@on_training_python
def test_the_list_is_what_the_rule_leaves() -> None:
    assert {name for name in library_texts() if left_out(name)} - set(REPEATED) == HELD_OUT


@on_training_python
def test_most_lines_of_what_is_drawn_were_never_trained_on() -> None:
    texts = library_texts()
    trained = {line for name, text in texts.items() if not left_out(name) for line in longer_lines(text)}
    for name in HELD_OUT | set(REPEATED):
        lines = longer_lines(texts[name])
        share = sum(line in trained for line in lines) / len(lines)
        assert share == pytest.approx(REPEATED[name], abs=0.005) if name in REPEATED else share < 0.5
