"""The pure parts of ``bench gpu``: shares of the roofline, running sequences, table, report."""

import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from serving.config import RooflineConfig
from serving.gpus import find_gpu, replica_roofline
from serving.models import CODEGEN25_7B, resolve_model
from tests.benchmarks.gpu import __main__ as command
from tests.benchmarks.gpu.hardware import REPEATS, seconds_of
from tests.benchmarks.gpu.model import FULL, SMALL, write_model
from tests.benchmarks.gpu.report import line_of, roofline_of, running_of, table
from tests.benchmarks.peers import rounds
from tests.benchmarks.peers.rounds import Attempt
from tests.benchmarks.peers.setting import Setting

H100 = find_gpu("H100")
HARDWARE = {"name": "H100", "flops_per_second": H100.bf16_flops, "bytes_per_second": H100.bytes_per_second}
ENGINES = {"replicas": 1, "busy_share": 0.8, "mean_running": 100.0, "occupancy": 0.5}


def figures(rate: float, **more: Any) -> dict[str, Any]:
    """A contestant's, as its process tells them, of prompts of 1,000 tokens and 64 output tokens."""
    told = {"rows": 9, "rows_per_second": rate, "mean_prompt_tokens": 1_000.0, "mean_output_tokens": 64.0}
    others = {"output_tokens_per_second": 64 * rate, "startup_seconds": 50.0, "busy_seconds": 20.0, "failure": ""}
    return told | others | {"cached_share": 0.0, "ideal_share": 0.3, "extra": {"engines": ENGINES}} | more


def test_the_full_size_is_codegen25s() -> None:
    assert FULL.shape == CODEGEN25_7B


def test_the_bound_of_a_measured_h100_is_the_one_of_its_data_sheet() -> None:
    roofline = roofline_of(HARDWARE, FULL.shape, {})
    sheet = replica_roofline(H100, FULL.shape, "bf16")
    for name in ("flops_per_second", "bytes_per_second", "parameters", "weight_bytes", "kv_bytes_per_token"):
        assert getattr(roofline, name) == getattr(sheet, name)
    assert line_of(figures(20.0), roofline)["roofline"]["rows_per_second"] == pytest.approx(40.0, abs=0.1)
    assert roofline_of(HARDWARE, FULL.shape, {"kv_cache_dtype": "fp8"}).kv_bytes_per_token == 262_144


def test_cached_tokens_raise_one_bound_and_not_the_other() -> None:
    roofline = RooflineConfig(flops_per_second=2e3, bytes_per_second=1e30, parameters=1)
    told = line_of(figures(0.5, cached_share=0.5), roofline)["roofline"]
    assert told["rows_per_second"] == pytest.approx(1e3 / 563, abs=1e-3)
    assert told["share"] == pytest.approx(0.5 * 563 / 1e3, abs=1e-4)
    assert told["uncached_share"] == pytest.approx(0.5 * 1_063 / 1e3, abs=1e-4)


def test_the_most_that_fit_is_what_the_occupancy_is_a_share_of() -> None:
    assert running_of(ENGINES) == {"mean": 80.0, "most": 160, "share": 0.5}
    assert running_of({}) == {}


def test_a_failed_attempt_keeps_its_words_and_no_figures() -> None:
    failed = {"failure": "exit code 1: no room"}
    assert line_of(failed, RooflineConfig()) == failed


def report(**lines: dict[str, Any]) -> dict[str, Any]:
    """A report of one input."""
    setting: dict[str, Any] = {"max_tokens": 64, "engine_args": {"quantization": "fp8"}}
    return {"hardware": HARDWARE, "model": {"parameters": 6.9e9}, "setting": setting, "inputs": {"spans100": lines}}


def test_the_table_tells_what_was_measured_and_what_went_wrong() -> None:
    roofline = roofline_of(HARDWARE, FULL.shape, {})
    lines = {
        "vllm": line_of(figures(20.0), roofline),
        "spanfill": line_of(figures(30.0, mean_output_tokens=63.5, cached_share=0.25), roofline),
        "spanfill-1": {"failure": "exit code 1: [/no room]"},
    }
    told = io.StringIO()
    Console(file=told, width=250).print(table(report(**lines)))
    bounds = (f"{lines[name]['roofline']['share']:.4f}" for name in ("vllm", "spanfill"))
    remarks = ("rows ended before their 64 output tokens", "[/no room]", "although the weights are quantized")
    for words in (*bounds, *remarks, "3,350 GB/s", "989.0 TFLOP/s", "80 of 160", "1.50", "0.250", "failed"):
        assert words in told.getvalue()


def test_work_is_timed_without_its_first_rounds() -> None:
    assert len(seconds_of(lambda: None, lambda: None)) == REPEATS


def test_a_model_of_a_configuration_alone_is_known_by_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", SMALL)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    found = resolve_model(str(folder), weights=False)
    assert (found.format, found.context) == ("codegen25", 2_048)


def test_a_setting_of_a_gpu_leaves_the_kv_cache_and_the_batch_to_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    setting = Setting(rows="", model="m", kv_cache_gib=None, device="gpu", engine_args={"max_num_seqs": 7})
    assert setting.engine_arguments()["max_num_seqs"] == 7
    assert "VLLM_CPU_KVCACHE_SPACE" not in setting.environment()
    assert not setting.engine_arguments().keys() & {"kv_cache_memory_bytes", "enforce_eager", "max_num_batched_tokens"}
    setting.dump(tmp_path / "setting.json")
    assert Setting.load(tmp_path / "setting.json") == setting


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """Settings of the attempts, which cost nothing."""
    seen: list[Setting] = []

    def attempt(name: str, setting: Setting, *_: Any) -> Attempt:
        seen.append(setting)
        return Attempt({"failure": "no"} if name == "spanfill-1" else figures(2.0))

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(rounds, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "_attempt", attempt)
    monkeypatch.setattr(command, "_hardware", lambda _: dict(HARDWARE))
    return seen


def test_engine_arguments_go_to_all_alike_and_the_report_holds_every_line(
    ran: list[Setting], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--small", "--rows", "4", "--engine-arg", "max_num_seqs=3", "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    assert command.main() == 0
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert list(told["inputs"]) == ["spans100", "unshared"]
    assert all(list(lines) == ["vllm", "spanfill"] for lines in told["inputs"].values())
    assert told["hardware"]["name"] == "H100"
    assert told["command"].startswith("spanfill bench gpu --small")
    assert {setting.job_engine_args["max_num_seqs"] for setting in ran} == {3}
    assert {setting.job_engine_args["load_format"] for setting in ran} == {"dummy"}
    assert len(ran) == 4


def test_a_failed_contestant_is_told_by_the_exit_code(ran: list[Setting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--rows", "4", "--contestants", "vllm", "spanfill-1"])
    assert command.main() == 1
    assert len(ran) == 4


@pytest.mark.parametrize(
    ("options", "says"), [([], "--small is for a CPU"), (["--small", "--engine-arg", "max_num_sequences=3"], "unknown")]
)
def test_what_cannot_run_is_refused_first(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "is_gpu_build", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    with pytest.raises(SystemExit):
        command.main()
    assert says in capsys.readouterr().err
