"""vLLM's own schedulers, in which batch rows make way for people; the model is none: each step makes token 7."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.config import EngineConfig
from serving.engine_args import vllm_arguments, yield_to_people
from serving.protocol import BATCH_PRIORITY, INTERACTIVE_PRIORITY

pytestmark = pytest.mark.engine
PLACES, BLOCK, TOKEN = 8, 16, 7


class Plan:
    """A scheduler and what came of its steps; ``ahead`` steps are planned before the first one's tokens are known."""

    def __init__(self, scheduler: Any, ahead: int) -> None:
        self.scheduler = scheduler
        self._ahead = ahead
        self._flying: deque[tuple[Any, Any]] = deque()
        self.made: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.steps: list[dict[str, int]] = []

    def add(self, name: str, priority: int, tokens: int, output: int) -> None:
        """Queue a request; no two share a prompt."""
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        params = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False)
        self.made[name] = 0
        request = Request(
            request_id=name,
            prompt_token_ids=[len(self.made) + 1_000] * tokens,
            sampling_params=params,
            pooling_params=None,
            priority=priority,
            arrival_time=float(len(self.made)),
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.scheduler.add_request(request)

    def step(self, count: int = 1) -> None:
        """Plan steps, and answer those that are due."""
        for _ in range(count):
            planned = self.scheduler.schedule()
            self.steps.append(dict(planned.num_scheduled_tokens))
            self._flying.append((planned, self._model(planned)))
            while len(self._flying) > self._ahead:
                self._answer()

    def _model(self, planned: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(planned.num_scheduled_tokens)
        made = [[] if self.scheduler.requests[name].is_prefill_chunk else [TOKEN] for name in names]
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: at for at, name in enumerate(names)}, sampled_token_ids=made
        )

    def _answer(self) -> None:
        planned, output = self._flying.popleft()
        for told in self.scheduler.update_from_output(planned, output).values():
            for answer in told.outputs:
                self.made[answer.request_id] += len(answer.new_token_ids)
                if answer.finish_reason is not None:
                    self.ended[answer.request_id] = str(answer.finish_reason)

    def finish(self) -> None:
        """Until everything is answered."""
        while len(self.ended) < len(self.made):
            self.step()
            assert len(self.steps) < 5_000
        while self._flying:
            self._answer()


MakePlan = Callable[..., Plan]


@pytest.fixture(params=["a step at a time", "a step ahead"])
def plan(checkpoint: Path, request: pytest.FixtureRequest) -> MakePlan:
    """Make a plan; ``chunked``: long prompts are computed in parts, as on GPUs."""
    is_ahead = request.param == "a step ahead"

    def make(*, beside: int, blocks: int = 1_000, chunked: bool = True) -> Plan:
        import torch
        from vllm import AsyncEngineArgs
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        arguments: dict[str, Any] = {"max_num_seqs": PLACES, "enable_chunked_prefill": chunked}
        arguments |= {"max_num_batched_tokens": 1_024}
        config = EngineConfig(model=str(checkpoint), max_model_len=1_024, dtype="float32", engine_args=arguments)
        told = AsyncEngineArgs(**vllm_arguments(config, on_cpu=True)).create_engine_config()
        told.scheduler_config.async_scheduling = is_ahead
        told.cache_config.num_gpu_blocks = blocks
        yield_to_people(told, beside)
        layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        cache = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)]
        )
        scheduler = resolve_obj_by_qualname(told.scheduler_config.scheduler_cls)(
            vllm_config=told,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(told),
            block_size=BLOCK,
            log_stats=True,
        )
        return Plan(scheduler, ahead=int(is_ahead))

    return make


def test_rows_stand_still_while_a_person_is_served_and_go_on_after(plan: MakePlan) -> None:
    made = plan(beside=1)
    for number in range(4):
        made.add(f"row {number}", BATCH_PRIORITY, 40, 60)
    made.step(10)
    assert set(made.steps[-1]) == {f"row {number}" for number in range(4)}
    made.add("person", INTERACTIVE_PRIORITY, 40, 20)
    made.step(20)
    assert all(set(step) == {"row 0", "person"} for step in made.steps[-20:])
    made.finish()
    assert made.made == {**{f"row {number}": 60 for number in range(4)}, "person": 20}


def test_a_place_is_kept_free_and_more_are_made_for_people(plan: MakePlan) -> None:
    made = plan(beside=1)
    for number in range(20):
        made.add(f"row {number}", BATCH_PRIORITY, 20, 60)
    made.step(10)
    assert len(made.steps[-1]) == PLACES - 1
    for number in range(6):
        made.add(f"person {number}", INTERACTIVE_PRIORITY, 20, 10)
    made.step(3)
    assert set(made.steps[-1]) == {"row 0", *(f"person {number}" for number in range(6))}
    assert len(made.scheduler.running) == PLACES
    made.finish()
    assert set(made.made.values()) == {60, 10}


@pytest.mark.parametrize("beside", [0, 1])
def test_cache_is_made_free_for_people(plan: MakePlan, beside: int) -> None:
    made = plan(beside=beside, blocks=40)
    for number in range(7):
        made.add(f"row {number}", BATCH_PRIORITY, 60, 20)
    made.step(10)
    made.add("person", INTERACTIVE_PRIORITY, 500, 10)
    made.step(3)
    assert "person" in made.steps[-1]
    made.finish()
    assert made.made == {**{f"row {number}": 20 for number in range(7)}, "person": 10}


@pytest.mark.parametrize("chunked", [True, False])
def test_steps_of_rows_alone_are_short_and_those_of_people_are_not_cut(plan: MakePlan, chunked: bool) -> None:
    made = plan(beside=2, chunked=chunked)
    for number in range(7):
        made.add(f"row {number}", BATCH_PRIORITY, 400, 20)
    made.step(6)
    if chunked:
        assert max(sum(step.values()) for step in made.steps) <= 512 + PLACES
    made.finish()
    made.add("person", INTERACTIVE_PRIORITY, 900, 2)
    made.step(1)
    assert made.steps[-1] == {"person": 900}
    made.finish()


def test_what_is_stopped_while_it_stands_still_is_gone(plan: MakePlan) -> None:
    from vllm.v1.request import RequestStatus

    made = plan(beside=0)
    for number in range(3):
        made.add(f"row {number}", BATCH_PRIORITY, 40, 60)
    made.step(5)
    made.add("person", INTERACTIVE_PRIORITY, 40, 400)
    made.step(5)
    made.scheduler.finish_requests(["row 1", "person"], RequestStatus.FINISHED_ABORTED)
    for name in ("row 1", "person"):
        made.ended[name] = "abort"
    made.step(2)
    assert set(made.steps[-1]) == {"row 0", "row 2"}
    made.finish()
    assert (made.made["row 0"], made.made["row 2"]) == (60, 60)
