"""Being in a Ray that does not come up at once; clusters that run are in ``tests/integration``."""

from typing import Any

import pytest
import ray

from serving.errors import EngineError
from serving.fleet import connected

Fails = list[Exception]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Fails:
    """What Ray raises at its next starts; it starts when nothing is left, and nothing of it is real."""
    left: Fails = []
    running = [False]

    def init(**_: Any) -> None:
        if left:
            raise left.pop(0)
        running[0] = True

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: running[0])
    monkeypatch.setattr(ray, "shutdown", lambda: running.__setitem__(0, False))
    return left


def test_a_ray_that_does_not_start_is_started_again(fails: Fails) -> None:
    fails.append(RuntimeError("the node timed out"))
    with connected() as embedded:
        assert (embedded, ray.is_initialized()) == (True, True)
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start_twice_is_one_sentence(fails: Fails) -> None:
    fails += [RuntimeError("first"), RuntimeError("the node\n timed out"), RuntimeError("never seen")]
    with pytest.raises(EngineError, match=r"^Ray does not start: the node timed out\."), connected():
        pass
    assert len(fails) == 1


def test_a_cluster_that_is_not_ours_is_asked_once(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    fails += [RuntimeError("no"), RuntimeError("never seen")]
    with pytest.raises(EngineError, match="no"), connected():
        pass
    assert len(fails) == 1
