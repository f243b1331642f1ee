from jobs.heldout import held_out
from jobs.pairs import standard_library


def test_about_a_twentieth_is_held_out_always_the_same() -> None:
    names = [f"pkg/m{i}.py" for i in range(4_000)]
    share = sum(map(held_out, names)) / len(names)
    assert 0.04 < share < 0.06
    assert [n for n in names[:60] if held_out(n)] == [n for n in names[:60] if held_out(n)]


def test_the_standard_library_has_held_out_modules() -> None:
    root = standard_library()
    assert sum(held_out(p.relative_to(root).as_posix()) for p in root.glob("*.py")) >= 3
