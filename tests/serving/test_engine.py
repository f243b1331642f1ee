"""What vLLM's engine is asked for; engines that run are in ``tests/integration``."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vllm import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from serving.config import EngineConfig
from serving.engine import VllmEngine
from serving.errors import ConfigError


@pytest.mark.parametrize(
    ("beside", "expected"),
    [(None, UsageContext.LLM_CLASS), (4, UsageContext.OPENAI_API_SERVER)],
    ids=["a job", "people"],
)
def test_the_batch_is_vllms_default_for_its_use(
    beside: int | None, expected: UsageContext, safe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its defaults for this use: where it is told of no use, 128 sequences and 2,048 tokens on any GPU."""
    asked: list[UsageContext | None] = []

    def refuse(self: AsyncEngineArgs, usage_context: UsageContext | None = None, **_: Any) -> None:
        asked.append(usage_context)
        raise ValueError("nothing is started")

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", refuse)
    with pytest.raises(ConfigError, match="nothing is started"):
        asyncio.run(VllmEngine.start(EngineConfig(model=str(safe_checkpoint), max_model_len=256), beside=beside))
    tokens, sequences = AsyncEngineArgs.get_batch_defaults(world_size=1)
    assert asked == [expected]
    assert (expected in tokens, expected in sequences) == (True, True)
