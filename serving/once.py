"""One infill without Ray: an engine in this process, started at the first call and kept for the next."""

import asyncio
import atexit
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from pydantic import Field

from serving.config import EngineConfig, Frozen
from serving.engine import VllmEngine
from serving.errors import EngineError
from serving.formats import Infill, load_format
from serving.models import resolve_model
from serving.protocol import INTERACTIVE_PRIORITY, Request, Sampling


class InfillOptions(Frozen):
    """What ``infill`` decodes with, checked before anything is loaded."""

    max_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0, le=10)
    top_p: float = Field(gt=0, le=1)
    seed: int = Field(ge=0, lt=1 << 63)


def infill(
    prefix: str,
    suffix: str | None = None,
    *,
    model: str = "demo-codegen25",
    format: str | None = None,  # noqa: A002
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
) -> Infill:
    """Fill the gap between ``prefix`` and ``suffix`` (None: continue the prefix).

    The engine of the latest model is kept, so the first call takes tens of seconds and the next ones do not. Returns
    the infill's ``text`` and ``finish_reason``. Raises ``ModelError`` for an unknown model, ``FormatError`` when the
    model cannot infill, ``ConfigError`` for an option out of its range or ``max_tokens`` that do not fit,
    ``EngineError`` when the engine refuses.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    InfillOptions.parse(options, where="infill")
    known = resolve_model(model, format=format)
    fmt = load_format(known.format, tokenizer_of=model)
    prompt = fmt.prompt(prefix, suffix, max_tokens=max_tokens, max_context=known.context)
    config = known.engine_config()
    sampling = Sampling(
        max_tokens, temperature, top_p, prompt.stop_token_ids, stop=stop, format=known.format, tokenizer=model
    )
    engine = _engine(config)
    request = Request(0, prompt.token_ids, (seed,))
    result = _wait(engine.generate(request, sampling, priority=INTERACTIVE_PRIORITY))
    if result.error_code is not None:
        raise EngineError(f"{result.error_code}: {result.error_message}")
    completion = result.completions[0]
    return fmt.infill(completion.token_ids, stop_token_id=completion.stop_token_id, stop=stop)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="spanfill-engine", daemon=True).start()
    return loop


def _wait(coroutine: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


_engines: dict[str, VllmEngine] = {}
"""By their configuration's fingerprint; one at most."""


def _engine(config: EngineConfig) -> VllmEngine:
    key = config.fingerprint
    if key not in _engines:
        close()
        with _no_main_module():
            _engines[key] = _wait(VllmEngine.start(config))
        # After vLLM registered its own: what is registered last runs first, and finds the engine's process alive.
        atexit.register(close)
    return _engines[key]


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep the engine's process, which multiprocessing spawns, from running the caller's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def close() -> None:
    """End the engine that ``infill`` keeps, if there is one."""
    while _engines:
        _wait(_engines.popitem()[1].shutdown())
