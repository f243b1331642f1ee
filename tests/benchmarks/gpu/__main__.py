"""CodeGen2.5-7B at full size with random weights, on one GPU: what spanfill makes of it, and bare vLLM.

    spanfill bench gpu --json gpu.json
    spanfill bench gpu --engine-arg kv_cache_dtype=fp8 --engine-arg quantization=fp8 --json fp8.json
    spanfill bench gpu --small          # a tiny model on a CPU: whether all of it works

Prompts of about 1,000 tokens, 64 output tokens each whatever the weights say; shuffled rows of 100 spans a file, and of
one span a file. Bare ``LLM.generate`` takes them in the order given, spanfill from Parquet to Parquet. Each is a
process of its own, as is the measurement of memory bandwidth and FLOP/s, of which the roofline is made
(``serving.roofline``). Random weights are right for speed and memory; the text means nothing. The tiny model is nearly
all embeddings, which the roofline takes for matrices to multiply with at every token: its shares say nothing. The
``--json`` file is written after every contestant. Nothing else may run on the machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from jobs.options import pairs_of, scalars_of
from serving.engine_args import CPU_BLOCK_SIZE, check_engine_args, is_gpu_build
from serving.errors import ConfigError
from tests.benchmarks.gpu.model import FULL, SMALL, Sizes, write_model
from tests.benchmarks.gpu.report import line_of, roofline_of, table
from tests.benchmarks.output import check_files, console, origin, parser_of, positive, publish_json
from tests.benchmarks.peers.inputs import INPUTS, make_rows, write_rows
from tests.benchmarks.peers.rounds import Attempt, play
from tests.benchmarks.peers.setting import Setting
from tests.benchmarks.signals import end_by_signals

CONTESTANTS = ("vllm", "vllm-aligned", "vllm-sorted", "spanfill", "spanfill-1")
"""Those of ``spanfill bench peers`` that know how to use a GPU."""

ENGINE_ARGS = {
    "load_format": "dummy",
    "logits_processors": ["tests.benchmarks.gpu.endless:Endless"],
    "disable_log_stats": False,
}
"""For both alike; bare vLLM keeps no statistics otherwise."""

BLOCK_SIZE = {"gpu": 16, "cpu": CPU_BLOCK_SIZE}
MEASURING_SECONDS = 300


def main() -> int:
    """The command."""
    parser = _parser()
    options = parser.parse_args()
    sizes, engine_args = _checked(parser, options)
    end_by_signals()
    with tempfile.TemporaryDirectory(prefix="spanfill-gpu-") as temporary:
        folder = Path(temporary)
        setting = _setting(write_model(folder / "model", sizes), sizes, engine_args)
        try:
            report = _about(options, sizes, setting, _hardware(folder))
        except subprocess.SubprocessError as error:
            print(f"The device could not be measured: {error}", file=sys.stderr)
            return 1
        for name in options.inputs:
            rows = make_rows(name, options.rows or sizes.rows, seed=options.seed)
            path = write_rows(rows, folder / f"{name}.parquet")
            _play(report, name, replace(setting, rows=str(path)), sizes, folder, options)
    console().print(table(report))
    return 1 if any(line.get("failure") for lines in report["inputs"].values() for line in lines.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("gpu", __doc__)
    add = parser.add_argument
    add("--small", action="store_true", help="a tiny model, few rows, short prompts, for a CPU")
    add("--rows", type=positive, help=f"of each input at most [default: {FULL.rows:,}; small: {SMALL.rows}]")
    add("--inputs", nargs="+", choices=list(INPUTS), default=["spans100", "unshared"])
    add("--contestants", nargs="+", choices=CONTESTANTS, default=["vllm", "spanfill"])
    alike = "of vLLM, for all alike; repeatable; logits_processors=null lets stop tokens end rows"
    add("--engine-arg", action="append", metavar="KEY=VALUE", help=alike)
    add("--seed", type=int, default=0, help="which files, spans and order of the rows")
    add("--timeout", type=float, default=3_600.0, help="seconds of one contestant")
    add("--json", type=Path, help="the report with the hardware's and every contestant's figures")
    return parser


def _checked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Sizes, dict[str, Any]]:
    """The sizes and the engine arguments; ends with the parser's error where something cannot be done."""
    check_files(parser, options.json, None)
    if not options.small and not is_gpu_build():
        parser.error("the full size is for a GPU, and vLLM's CPU build is installed; --small is for a CPU")
    try:
        engine_args = ENGINE_ARGS | (scalars_of(pairs_of(options.engine_arg, "--engine-arg")) or {})
        check_engine_args(engine_args)
    except ConfigError as error:
        parser.error(str(error))
    return SMALL if options.small else FULL, engine_args


def _setting(model: Path, sizes: Sizes, engine_args: dict[str, Any]) -> Setting:
    """That of every input, whose rows are yet to come."""
    device: Literal["cpu", "gpu"] = "gpu" if is_gpu_build() else "cpu"
    return Setting(
        rows="",
        model=str(model),
        context=sizes.prompt_tokens + sizes.output_tokens,
        max_tokens=sizes.output_tokens,
        kv_cache_gib=1 if device == "cpu" else None,
        block_size=int(engine_args.get("block_size") or BLOCK_SIZE[device]),
        device=device,
        engine_args=engine_args,
    )


def _hardware(folder: Path) -> dict[str, Any]:
    """Measured in a process of its own, so that its memory is free when the engines start."""
    result = folder / "hardware.json"
    command = [sys.executable, "-m", "tests.benchmarks.gpu.hardware", str(result)]
    subprocess.run(command, check=True, timeout=MEASURING_SECONDS)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _about(options: argparse.Namespace, sizes: Sizes, setting: Setting, hardware: dict[str, Any]) -> dict[str, Any]:
    """What was asked, where, of which versions; the temporary paths are left out."""
    told = {key: value for key, value in asdict(setting).items() if key not in ("rows", "model")}
    arguments = {key: value for key, value in setting.engine_arguments().items() if key != "model"}
    return origin("gpu") | {
        "seed": options.seed,
        "model": sizes.config() | {"parameters": sizes.shape.parameters, "weights": "random"},
        "setting": told | {"engine_arguments": arguments},
        "hardware": hardware,
        "inputs": {},
    }


def _play(
    report: dict[str, Any], name: str, setting: Setting, sizes: Sizes, folder: Path, options: argparse.Namespace
) -> None:
    """Every contestant once on one input; the report is on disk after each."""
    attempts: dict[str, list[Attempt]] = {contestant: [] for contestant in options.contestants}
    roofline = roofline_of(report["hardware"], sizes.shape, setting.engine_args)

    def publish() -> None:
        report["inputs"][name] = {
            contestant: line_of(made[0].figures, roofline) for contestant, made in attempts.items() if made
        }
        if options.json:
            publish_json(options.json, report)

    play(attempts, 1, setting, folder, options.timeout, tell=publish)


if __name__ == "__main__":
    sys.exit(main())
