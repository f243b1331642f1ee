"""What vLLM reports after each engine step, added up."""

from typing import Any

from serving.occupancy import Occupancy
from serving.protocol import EngineStats


class Readings:
    """Adds up what vLLM reports after each engine step; one engine, so the latest gauge is the gauge."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self._occupancy = Occupancy()

    def logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        """What vLLM makes its loggers with."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        readings = self

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                self.engine_index = engine_index

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                readings.add(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                """Nothing to say: the replica says it."""

        return Logger(vllm_config, engine_index)

    def add(self, scheduler: Any, iteration: Any) -> None:
        """vLLM's ``SchedulerStats`` and ``IterationStats`` of a step, or None for either."""
        before = self.stats
        if scheduler:
            self._occupancy.tell(scheduler.num_running_reqs)
        self.stats = EngineStats(
            running=scheduler.num_running_reqs if scheduler else before.running,
            waiting=scheduler.num_waiting_reqs if scheduler else before.waiting,
            kv_cache_usage=scheduler.kv_cache_usage if scheduler else before.kv_cache_usage,
            prefix_cache_queries=before.prefix_cache_queries
            + (scheduler.prefix_cache_stats.queries if scheduler else 0),
            prefix_cache_hits=before.prefix_cache_hits + (scheduler.prefix_cache_stats.hits if scheduler else 0),
            output_tokens=before.output_tokens + (iteration.num_generation_tokens if iteration else 0),
            steps=before.steps + 1,
            busy_seconds=self._occupancy.busy_seconds,
            row_seconds=self._occupancy.row_seconds,
        )
