"""vLLM's schedulers, in which batch rows make way for people (``serving.yielding``).

vLLM's priorities decide who begins first; they neither stop a row that runs nor keep a place free, and only a request
that runs already takes KV cache from one of lower priority. These classes are named to vLLM by ``scheduler_cls``, which
it does not hold for a stable interface: they use what ``_Yielding`` names, of vLLM 0.32. Imported in the engine's
process alone, besides by tests.
"""

import time
from itertools import takewhile
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from serving.protocol import BATCH_PRIORITY
from serving.yielding import BESIDE, SEATS, STEP_TOKENS, turn


def _is_of_people(request: Any) -> bool:
    return bool(request.priority < BATCH_PRIORITY)


class _Yielding:
    """What both have: rows beyond their turn are not eligible in the next step, and as many begin as may."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        me: Any = self
        self._beside = int(me.vllm_config.additional_config[BESIDE])
        self._most_tokens: int = me.max_num_scheduled_tokens
        # Where prompts are not computed in chunks, any prompt must fit a step.
        chunked = me.scheduler_config.enable_chunked_prefill
        self._row_tokens = STEP_TOKENS if chunked else max(STEP_TOKENS, me.max_model_len)

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        """Plan a step."""
        me: Any = self
        waiting = list(takewhile(_is_of_people, me.waiting))
        self._make_way(waiting)
        rows = [request for request in me.running if not _is_of_people(request)]
        people = len(me.running) - len(rows) + len(waiting)
        pool = me.kv_cache_manager.block_pool
        now = turn(
            people=people,
            rows=len(rows),
            beside=self._beside,
            places=me.max_num_running_reqs,
            is_full=pool.get_num_free_blocks() < pool.num_gpu_blocks // SEATS,
        )
        for request in rows[now.going :]:
            # ``schedule`` counts the step before it looks.
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, me.current_step + 2)
        me.max_num_active_reqs = min(me.max_num_running_reqs, len(me.running) + len(waiting) + now.beginning)
        step = self._most_tokens if people else min(self._most_tokens, len(rows) + self._row_tokens)
        me.max_num_scheduled_tokens = step
        return super().schedule(*arguments, **named)  # type: ignore[misc]

    def _make_way(self, people: list[Any]) -> None:
        """Let batch rows leave, the latest first, until all people who wait find places and KV cache."""
        me: Any = self
        manager = me.kv_cache_manager
        needed = sum(-(-request.num_tokens // me.block_size) for request in people) + manager.watermark_blocks
        rows = [request for request in me.running if not _is_of_people(request)]
        while people and rows:
            has_places = len(me.running) + len(people) <= me.max_num_running_reqs
            if has_places and needed <= manager.block_pool.get_num_free_blocks():
                return
            self._send_back(rows.pop())

    def _send_back(self, row: Any) -> None:
        """Let a row wait again; what is computed stays in the prefix cache for as long as nobody needs its blocks."""
        me: Any = self
        me.running.remove(row)
        me._preempt_request(row, time.monotonic())
        # The worker must be told all of it when it begins again, be that in this very step.
        me.prev_step_scheduled_req_ids.discard(row.request_id)


class YieldingScheduler(_Yielding, Scheduler):  # type: ignore[misc]
    """For engines that schedule a step when the one before has ended."""


class AsyncYieldingScheduler(_Yielding, AsyncScheduler):  # type: ignore[misc]
    """For engines that schedule a step ahead."""
