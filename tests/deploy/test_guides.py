"""What the guides say of the tests is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "deploy" / "guides").glob("*.md"))


@pytest.mark.parametrize("guide", [ROOT / "README.md", *GUIDES], ids=lambda path: path.name)
def test_every_link_leads_somewhere_and_every_named_test_exists(guide: Path) -> None:
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#:]+)\)", guide.read_text()):
        path = guide.parent / target
        assert path.exists(), target
        if text.startswith("`test_"):
            assert f"def {text.strip('`')}(" in path.read_text(), text


def test_every_promise_has_a_test() -> None:
    lines = (ROOT / "deploy" / "guides" / "promises.md").read_text().splitlines()
    promises = [line for line in lines if line.startswith("| ")][2:]
    assert len(promises) >= 12
    assert all(re.search(r"\[`test_\w+`\]", line) for line in promises)
