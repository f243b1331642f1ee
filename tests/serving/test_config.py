from pathlib import Path

import pytest

from serving.app import place
from serving.app_config import AppConfig
from serving.config import EngineConfig, ReplicaConfig, read_yaml
from serving.engine_args import check_engine_args
from serving.errors import ConfigError


def test_unknown_and_absurd_keys_are_named_with_their_values() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len = -1.*speed = 9"):
        EngineConfig.parse({"model": "m", "max_model_len": -1, "speed": 9})


def test_fingerprints_tell_configurations_apart() -> None:
    base = EngineConfig(model="m", max_model_len=2048)
    assert base.fingerprint == EngineConfig(model="m", max_model_len=2048).fingerprint
    assert base.fingerprint != EngineConfig(model="m", max_model_len=1024).fingerprint


def test_an_engine_argument_that_vllm_does_not_know_is_refused_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq is unknown.*max_num_seqs"):
        check_engine_args({"max_num_seq": 3})
    check_engine_args({"max_num_seqs": 3, "enable_chunked_prefill": True})


def test_engine_arguments_that_are_options_of_their_own_say_which() -> None:
    with pytest.raises(ConfigError, match="--dtype"):
        check_engine_args({"dtype": "float16"})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_num_seqs", "abc", "max_num_seqs = 'abc' is str, not int or None"),
        ("max_num_seqs", 2.5, "is float, not int"),
        ("max_num_seqs", True, "is bool, not int"),
        ("block_size", [16], "is list, not int"),
        ("gpu_memory_utilization", "most", "is str, not float"),
        ("gpu_memory_utilization", None, "is NoneType, not float"),
        ("enforce_eager", "maybe", "is str, not bool"),
        ("model_impl", 3, "is int, not str"),
    ],
)
def test_an_engine_argument_of_the_wrong_type_is_refused_with_the_right_one(
    name: str, value: object, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_engine_args({name: value})


def test_what_only_vllm_can_judge_is_left_to_it() -> None:
    check_engine_args(
        {"max_num_seqs": None, "gpu_memory_utilization": 1, "enforce_eager": False, "cpu_offload_gb": 0.5}
    )
    check_engine_args({"compilation_config": {"level": 3}, "kv_cache_dtype": 7, "quantization": "fp8"})


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "not YAML"), ("- 1", "not a mapping"), ("# a: 1\n", "no options"), (None, "cannot be read")],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "job.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=rf"job\.yaml .*{words}"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("nodes", "replicas", "cores"), [([8], 1, 8), ([8], 2, 4), ([8], 3, 2), ([2, 2], 2, 2), ([4, 2], 3, 2), ([1], 5, 1)]
)
def test_replicas_share_the_cores_of_their_nodes(nodes: list[int], replicas: int, cores: int) -> None:
    placed = place(ReplicaConfig(replicas=replicas), [{"CPU": float(n)} for n in nodes])
    assert (placed.cores, placed.use_gpu) == (cores, False)


def test_gpus_are_used_where_there_are_any() -> None:
    assert place(ReplicaConfig(), [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}]).use_gpu


def test_the_application_file_refuses_unknown_keys() -> None:
    with pytest.raises(ConfigError, match="replica = 2"):
        AppConfig.parse({"model": "demo-codegen25", "replica": 2})
