"""Ray Data LLM: its vLLM stage alone, on token ids in file order."""

import math
import time
from typing import Any

from jobs.process import since_birth
from serving.cores import available_cores
from serving.formats import load_format
from tests.benchmarks.peers.figures import Measured, until_stop
from tests.benchmarks.peers.inputs import FORMAT, Row, make_prompts
from tests.benchmarks.peers.setting import Setting

BATCH_ROWS = 64
NOTE = "cached tokens are not told by Ray Data LLM"


def run_raydata(rows: list[Row], setting: Setting) -> Measured:
    """Stream all prompts through one engine; the first request's time is what vLLM stamped on it."""
    import ray

    ray.init(address="local", num_cpus=len(available_cores()), include_dashboard=False, logging_level="ERROR")
    prompts, stops = make_prompts(rows, setting, align=1), load_format(FORMAT).stop_token_ids
    answers, arrivals, tokens, ended = _answers(_processed(prompts, setting), stops)
    first = min(arrivals)
    startup, extra = since_birth() - (time.time() - first), {"batch_rows": BATCH_ROWS}
    return Measured(startup, ended - first, prompts, answers, None, prompt_tokens=tokens, note=NOTE, extra=extra)


def _processed(prompts: list[list[int]], setting: Setting) -> Any:
    import ray
    from ray.data.llm import build_processor

    sampling = {
        "max_tokens": setting.max_tokens,
        "temperature": 0.0,
        "seed": 0,
        "stop_token_ids": list(load_format(FORMAT).stop_token_ids),
        "detokenize": False,
    }
    process = build_processor(
        _config(setting),
        preprocess=lambda row: {
            "row": row["row"],
            "prompt": "",
            "tokenized_prompt": row["ids"],
            "sampling_params": sampling,
        },
        postprocess=lambda row: {
            "row": row["row"],
            "ids": row["generated_tokens"],
            "arrival": row["metrics"]["arrival_time"],
            "prompt_tokens": row["num_input_tokens"],
        },
    )
    items = [{"row": row, "ids": prompt} for row, prompt in enumerate(prompts)]
    # A block a batch: by itself Ray Data makes 200 blocks, whose tasks take the cores from the engine.
    return process(ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / BATCH_ROWS)))


def _config(setting: Setting) -> Any:
    from ray.data.llm import vLLMEngineProcessorConfig

    arguments = setting.engine_arguments()
    return vLLMEngineProcessorConfig(
        model_source=arguments.pop("model"),
        engine_kwargs=arguments,
        batch_size=BATCH_ROWS,
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )


def _answers(rows: Any, stops: tuple[int, ...]) -> tuple[dict[int, list[int]], list[float], int, float]:
    """Outputs by row, when vLLM took each request by the wall clock, prompt tokens, and when the last row was held."""
    answers, arrivals, tokens, ended = dict[int, list[int]](), list[float](), 0, 0.0
    for row in rows.iter_rows():
        ended = time.time()
        answers[int(row["row"])] = until_stop(list(map(int, row["ids"])), stops)
        arrivals.append(float(row["arrival"]))
        tokens += int(row["prompt_tokens"])
    return answers, arrivals, tokens, ended
