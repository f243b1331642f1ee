"""``spanfill bench gpu --small``: dummy weights through both contestants' real ways, on a CPU."""

import json
import subprocess
from pathlib import Path

import pytest

from jobs.bench import from_clone

pytestmark = pytest.mark.engine


def test_no_stop_token_is_the_likeliest_in_either_of_vllms_model_runners() -> None:
    import torch

    from serving.formats import load_format
    from tests.benchmarks.gpu.endless import Endless

    stops = load_format("codegen25").stop_token_ids
    logits = torch.zeros(3, 51_200)
    logits[0, stops[0]] = logits[2, stops[-1]] = 1
    logits[:, 7] = 0.5
    for arguments in ((), ("the second runner's context",)):
        assert Endless("config", "states").apply(logits.clone(), *arguments).argmax(-1).tolist() == [7, 7, 7]


def test_the_small_run_measures_both_contestants(tmp_path: Path) -> None:
    told = tmp_path / "gpu.json"
    command, environment = from_clone("tests.benchmarks.gpu", ["--small", "--inputs", "spans100", "--json", str(told)])
    assert subprocess.run(command, env=environment).returncode == 0
    report = json.loads(told.read_text())
    assert min(report["hardware"]["bytes_per_second"], report["hardware"]["flops_per_second"]) > 0
    lines = report["inputs"]["spans100"]
    for line in (lines["vllm"], lines["spanfill"]):
        assert line["mean_output_tokens"] == report["setting"]["max_tokens"]
        assert line["rows"] == 24
        assert 0 < line["running"]["mean"] <= line["rows"]
        assert 0 < line["roofline"]["share"] <= line["roofline"]["uncached_share"]
    assert lines["spanfill"]["cached_share"] > 0
    assert lines["vllm"]["extra"]["engines"]["busy_share"] <= 1
    assert report["setting"]["engine_arguments"]["load_format"] == "dummy"
