"""``infill`` refuses what cannot be before it looks for a model."""

from typing import Any

import pytest

from serving import infill
from serving.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0}, "top_p = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_an_option_out_of_its_range_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        infill("a", model="no such model", **options)
