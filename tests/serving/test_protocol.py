import pickle
from typing import Any

import pytest

from serving.protocol import Completion, Growth, Request, Result

GROWTH = Growth(1, 2, [3], [-0.5], [((4, -0.5),)], "stop", 5, 6, "code", "words")


@pytest.mark.parametrize(
    "told",
    [
        Request(1, [2, 3], (4, 5), "until"),
        Completion([1], "stop", 2, [-0.5, -1.0], [((1, -0.5),), ((2, -1.0),)]),
        Result(1, (Completion([1], "length"),), 3, [-0.5], [((1, -0.5),)], "code", "words"),
        GROWTH,
        Growth(1, 2, [3]),
    ],
)
def test_what_crosses_by_the_thousand_comes_whole(told: Any) -> None:
    assert pickle.loads(pickle.dumps(told)) == told
