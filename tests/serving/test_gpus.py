"""GPUs by their data sheets, models by their configurations, and rates that the simulated engine's clock confirms."""

import asyncio
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batching import Scheduler, Sequence
from serving.config import RooflineConfig
from serving.errors import ConfigError, ModelError
from serving.gpus import GPUS, PRECISIONS, find_gpu, find_precision, replica_roofline
from serving.models import CODEGEN25_7B, model_shape, resolve_model
from serving.roofline import bound_rows_per_second
from serving.shapes import shape_of
from serving.steady import Load, batch_size, steady_rows_per_second

WARM_UP, MEASURED = 3, 8
"""Generations of a full batch."""


def test_codegen25_on_an_h100_is_the_published_bound() -> None:
    bf16, fp8 = (replica_roofline(GPUS["H100"], CODEGEN25_7B, p) for p in PRECISIONS)
    assert bf16.kv_bytes_per_token == 512 * 1024
    assert bf16.kv_cache_tokens // 1_064 == 104
    bound = bound_rows_per_second(bf16, prompt_tokens=1_000, output_tokens=64)
    assert bound == pytest.approx(40.7, rel=0.03)
    assert bound_rows_per_second(fp8, prompt_tokens=1_000, output_tokens=64) == pytest.approx(2 * bound, rel=0.01)


def test_fp8_on_an_a100_is_weights_alone() -> None:
    bf16, fp8 = (replica_roofline(GPUS["A100"], CODEGEN25_7B, p) for p in PRECISIONS)
    assert fp8.weight_bytes == bf16.weight_bytes / 2
    assert (fp8.flops_per_second, fp8.kv_bytes_per_token) == (bf16.flops_per_second, bf16.kv_bytes_per_token)


def test_two_gpus_have_twice_the_rates_and_more_than_twice_the_cache() -> None:
    one = replica_roofline(GPUS["L40S"], CODEGEN25_7B, "bf16")
    two = replica_roofline(GPUS["L40S"], CODEGEN25_7B, "bf16", tensor_parallel_size=2)
    assert two.flops_per_second == 2 * one.flops_per_second
    assert two.kv_cache_tokens > 2 * one.kv_cache_tokens


def test_a_model_that_does_not_fit_says_so() -> None:
    config = {"hidden_size": 8_192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    big = shape_of(config | {"intermediate_size": 28_672, "vocab_size": 32_000}, name="big")
    assert big.parameters == pytest.approx(69e9, rel=0.01)
    with pytest.raises(ModelError, match=r"138.0 GB of weights leave room for 0 tokens.*--tensor-parallel-size"):
        replica_roofline(GPUS["H100"], big, "bf16")
    assert replica_roofline(GPUS["H100"], big, "bf16", tensor_parallel_size=2).kv_cache_tokens > 0


def test_unknown_names_are_answered_with_the_known() -> None:
    assert find_gpu("h100") is GPUS["H100"]
    with pytest.raises(ConfigError, match=r"GPU H1000 is unknown. Did you mean H100"):
        find_gpu("H1000")
    with pytest.raises(ConfigError, match=r"precision int4 is unknown. Known: bf16, fp8"):
        find_precision("int4")


@pytest.mark.parametrize(
    ("config", "parameters", "kv_values"),
    [
        # The published sizes: StarCoder2-7B 7.17 billion, Qwen2.5-Coder-7B 7.62 billion, StarCoderBase-1B 1.14 billion.
        (
            {"model_type": "starcoder2", "hidden_size": 4_608, "num_hidden_layers": 32, "num_attention_heads": 36}
            | {
                "num_key_value_heads": 4,
                "intermediate_size": 18_432,
                "vocab_size": 49_152,
                "tie_word_embeddings": True,
            },
            7.17e9,
            2 * 32 * 4 * 128,
        ),
        (
            {"model_type": "qwen2", "hidden_size": 3_584, "num_hidden_layers": 28, "num_attention_heads": 28}
            | {"num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 152_064},
            7.62e9,
            2 * 28 * 4 * 128,
        ),
        (
            {"model_type": "gpt_bigcode", "n_embd": 2_048, "n_layer": 24, "n_head": 16, "multi_query": True}
            | {"n_inner": 8_192, "vocab_size": 49_152, "tie_word_embeddings": True},
            1.12e9,
            2 * 24 * 128,
        ),
    ],
)
def test_a_configuration_tells_the_published_size(config: dict[str, Any], parameters: float, kv_values: int) -> None:
    shape = shape_of(config, name="m")
    assert shape.parameters == pytest.approx(parameters, rel=0.02)
    assert shape.kv_values_per_token == kv_values


def test_what_a_configuration_does_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no num_hidden_layers"):
        shape_of({"hidden_size": 8}, name="m")
    with pytest.raises(ModelError, match="mixture of experts"):
        shape_of({"hidden_size": 8, "num_experts": 8}, name="m")
    with pytest.raises(ModelError, match=r"config.json is in the hub's cache"):
        model_shape(resolve_model("nobody/no-such-model", format="starcoder"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="no hidden_size"):
        model_shape(resolve_model(str(tmp_path), format="codegen25"))


def test_the_packaged_model_has_its_known_size() -> None:
    assert model_shape(resolve_model("demo-codegen25")).parameters == pytest.approx(12.5e6, rel=0.02)


def test_cached_prompts_cost_the_bound_no_compute() -> None:
    roofline = RooflineConfig()
    bounds = [
        bound_rows_per_second(roofline, prompt_tokens=1_000, output_tokens=1, cached_share=c) for c in (0.0, 0.5, 1.0)
    ]
    assert bounds[1] == pytest.approx(2 * bounds[0], rel=0.03)
    assert bounds[2] > 50 * bounds[0]


def prompts(length: int, *, shared: bool, draw: random.Random) -> Iterator[list[int]]:
    """Random prompts; those that share have one of eight beginnings, three quarters of their length."""
    heads = [[draw.randrange(50_000) for _ in range(length * 3 // 4)] for _ in range(8)]
    for number in itertools.count():
        head = heads[number % 8] if shared else []
        yield [*head, *(draw.randrange(50_000) for _ in range(length - len(head)))]


def outputs(mean: int, *, varied: bool, draw: random.Random) -> Iterator[int]:
    """Output lengths without stop tokens: all equal, or each from 1 to twice the mean as often as any other."""
    while True:
        yield from draw.sample(range(1, 2 * mean), 2 * mean - 1) if varied else [mean]


def simulated(
    roofline: RooflineConfig, length: int, output: int, *, shared: bool, varied: bool, stop: int = 0
) -> tuple[float, float]:
    """Rows a second of the simulated engine's scheduler between two moments of full batches, and its cached share.

    ``stop`` tokens end each row.
    """
    draw, loop = random.Random(0), asyncio.new_event_loop()
    texts, lengths = prompts(length, shared=shared, draw=draw), outputs(output, varied=varied, draw=draw)
    scheduler, places = Scheduler(roofline), batch_size(roofline, Load(length, output, varied=varied))
    done, seconds, first = 0, 0.0, None
    while done < (WARM_UP + MEASURED) * places:
        while len(scheduler.waiting) < places:
            scheduler.add(Sequence(next(texts), next(lengths) + stop, None, loop.create_future()), 0)
        seconds += scheduler.step()
        running = len(scheduler.running)
        scheduler.finish_step()
        done += running - len(scheduler.running)
        if first is None and done >= WARM_UP * places:
            first = (done, seconds, scheduler.queries, scheduler.hits)
    loop.close()
    assert first is not None
    rate = (done - first[0]) / (seconds - first[1])
    return rate, (scheduler.hits - first[3]) / (scheduler.queries - first[2])


@pytest.mark.parametrize("visible", range(2, 9))
@pytest.mark.parametrize("places", [8, 48])
def test_a_stop_token_takes_a_step_of_the_simulated_engine_too(visible: int, places: int) -> None:
    """With few places the weights are what a step takes, so that who leaves it out is off by a tenth to a half."""
    roofline = RooflineConfig.parse({"max_num_seqs": places})
    rate, cached = simulated(roofline, 40, visible, shared=False, varied=True, stop=1)
    load = Load(40, visible, cached, stop_share=1.0)
    assert steady_rows_per_second(roofline, load) == pytest.approx(rate, rel=0.05)
    if places == 8:
        assert steady_rows_per_second(roofline, replace(load, stop_share=0.0)) > 1.09 * rate


@given(
    roofline=st.builds(
        RooflineConfig,
        flops_per_second=st.floats(1e12, 1e16),
        bytes_per_second=st.floats(1e10, 1e13),
        kv_bytes_per_token=st.floats(1e3, 1e6),
        kv_cache_tokens=st.integers(1, 500_000),
        max_num_seqs=st.integers(1, 512),
        max_num_batched_tokens=st.integers(1, 16_384),
        step_overhead_seconds=st.sampled_from([0.0, 0.0005]),
        efficiency=st.sampled_from([0.5, 1.0]),
    ),
    load=st.builds(
        Load,
        st.floats(1, 8_000),
        st.floats(0, 500) | st.integers(1, 8).map(float),
        cached_share=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
        varied=st.booleans(),
        stop_share=st.floats(0, 1),
        n=st.sampled_from([1, 2, 100]),
        shared_share=st.floats(0, 1),
    ),
)
def test_no_steady_rate_is_beyond_the_bound(roofline: RooflineConfig, load: Load) -> None:
    bound = bound_rows_per_second(
        roofline, prompt_tokens=load.prompt_tokens, output_tokens=load.steps, cached_share=load.cached_share
    )
    assert 0 < steady_rows_per_second(roofline, load) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("varied", [False, True], ids=["equal", "varied"])
@pytest.mark.parametrize("shared", [False, True], ids=["unshared", "shared"])
@pytest.mark.parametrize("output", [16, 128])
@pytest.mark.parametrize("length", [200, 1_000])
@pytest.mark.parametrize(
    "hardware",
    [{}, {"max_num_seqs": 48}, {"kv_cache_tokens": 30_000, "efficiency": 0.5}],
    ids=["h100", "few-places", "small-cache"],
)
def test_the_steady_rate_is_the_simulated_engines_within_5_percent(
    length: int, output: int, shared: bool, varied: bool, hardware: dict[str, Any]
) -> None:
    roofline = RooflineConfig.parse(hardware)
    rate, cached = simulated(roofline, length, output, shared=shared, varied=varied)
    assert cached == pytest.approx(0.73 if shared else 0.0, abs=0.05)
    predicted = steady_rows_per_second(roofline, Load(length, output, cached, varied))
    assert predicted == pytest.approx(rate, rel=0.05)


def held(places: int, length: int, shared: int, output: int, *, n: int, varied: bool) -> float:
    """Tokens that are given on average to places that are always full, with ``n`` samples of each prompt in a row."""
    lengths = outputs(output, varied=varied, draw=random.Random(0))
    samples = ((number // n, next(lengths), 1) for number in itertools.count())
    running = list(itertools.islice(samples, places))
    total, steps = 0, 20 * output
    for step in range(2 * steps):
        running = [(row, size, at + 1) if at < size else next(samples) for row, size, at in running]
        if step >= steps:
            rows = {row for row, _, _ in running}
            total += shared * len(rows) + sum(length - shared + size for _, size, _ in running)
    return total / steps


@pytest.mark.parametrize("varied", [False, True], ids=["equal", "varied"])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_batch_of_samples_fills_the_cache_in_which_they_share_their_prompt(n: int, varied: bool) -> None:
    load = Load(1_262, 24, varied=varied, n=n, shared_share=1_248 / 1_262)
    roofline = RooflineConfig.parse({"kv_cache_tokens": 110_000, "max_num_seqs": 10_000})
    places = batch_size(roofline, load)
    assert held(places, 1_262, 1_248, 24, n=n, varied=varied) == pytest.approx(110_000, rel=0.02)
    assert replace(load, n=1).held == Load(1_262, 24, varied=varied).held
