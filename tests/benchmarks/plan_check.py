"""Whether ``spanfill plan --calibrate`` foretells real runs of this machine: three shapes, each from the other two, and
from each two of them a fourth whose rows share beginnings.

    python -m tests.benchmarks.plan_check --rows 600

Prints one JSON object: the runs' rates and, for each shape, the rate predicted from two other runs and from each
alone, with the error. What caches save of the fourth the plan finds in its rows. Runs of the demo model take half a
minute each and as long to start; with ``max_num_seqs`` of 16 the batch stays full. A plan is told the output tokens
that its run had: what is checked is the cost model, not a guess of lengths. Compare on a quiet machine alone.
"""

import argparse
import json
import subprocess
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.estimate import Wish, plan_job
from jobs.pairs import standard_library
from jobs.spec import JobSpec
from tests.runs import Run

SHAPES = {
    "long prompt, short output": {"chars": 2_600, "max_tokens": 8},
    "short prompt, long output": {"chars": 300, "max_tokens": 64},
    "middling": {"chars": 1_200, "max_tokens": 32},
    "shared beginnings": {"chars": 1_200, "max_tokens": 32, "shared": 1_200},
}
SHARED_ROWS = 30
SEQUENCES, RUN_SECONDS, STARTS = 16, 600, 20


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600, help="enough for half a minute: a short run tells its start")
    with tempfile.TemporaryDirectory(prefix="spanfill-plan-") as folder:
        print(json.dumps(check(Path(folder), rows=parser.parse_args().rows), indent=1))


def check(folder: Path, *, rows: int) -> dict[str, Any]:
    """Run every shape and predict it from the others; returns the figures."""
    jobs = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        source, output = folder / f"{number}.parquet", folder / f"out-{number}"
        write_rows(source, rows, chars=shape["chars"], first=number, shared=shape.get("shared", 0))
        spec = JobSpec(input=str(source), output=str(output), max_tokens=shape["max_tokens"])
        jobs[name] = (spec, run(spec, folder / "log"))
    found: dict[str, Any] = {}
    for name, (spec, manifest) in jobs.items():
        others = [job.output for other, (job, _) in jobs.items() if other != name and "shared" not in SHAPES[other]]
        chosen = [*combinations(others, 2), *combinations(others, 1)]
        found[name] = {
            "rows_per_second": manifest["rows_per_second"],
            "prompt_tokens": manifest["prompt_tokens"] / rows,
            "cached_tokens": manifest["cached_tokens"] / rows,
            "completion_tokens": manifest["completion_tokens"] / rows,
            "predicted": [predict(spec, manifest, outputs) for outputs in chosen],
        }
    return found


def write_rows(path: Path, rows: int, *, chars: int, first: int, shared: int = 0) -> None:
    """Prefixes of ``chars`` characters of the standard library, to be continued: no suffix, nothing shared.

    But for the first ``shared`` characters, of which ``SHARED_ROWS`` rows have the same.
    """
    texts = (p.read_text(errors="ignore") for p in sorted(standard_library().glob("*.py")))
    long = [text for text in texts if len(text) > 12_000]
    places = [(text, 3_000 * at + 700 * first) for at in range(STARTS) for text in long]
    prefixes = [text[start : start + chars] for text, start in places if start + chars <= len(text)]
    heads = (prefixes[row // SHARED_ROWS * SHARED_ROWS][:shared] for row in range(len(prefixes)))
    pq.write_table(pa.table({"prefix": [head + own for head, own in zip(heads, prefixes, strict=True)][:rows]}), path)


def run(spec: JobSpec, log: Path) -> dict[str, Any]:
    """The manifest of a real run."""
    options = ("--input", spec.input, "--output", spec.output, "--max-tokens", spec.max_tokens)
    job = Run(log, *options, "--engine-arg", f"max_num_seqs={SEQUENCES}", "--batch-rows", SEQUENCES)
    try:
        code = job.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        job.process.terminate()
        code = job.wait(RUN_SECONDS)
    if code:
        raise SystemExit(log.read_text())
    manifest: dict[str, Any] = json.loads(job.stdout)
    return manifest


def predict(spec: JobSpec, manifest: dict[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
    """What a plan that is calibrated with these jobs says of a run, and how far it is off."""
    plan = plan_job(spec, Wish(calibrate=outputs, like=spec.output))
    assert plan.calibrated
    assert plan.calibration
    rate = plan.calibrated.predicted_rows_per_second or 0.0
    return {
        "from": [list(SHAPES)[int(output.rpartition("-")[2])] for output in outputs],
        "rows_per_second": rate,
        "error": rate / manifest["rows_per_second"] - 1,
        "prompt_seconds": plan.calibration.prompt_seconds,
        "output_seconds": plan.calibration.output_seconds,
    }


if __name__ == "__main__":
    main()
