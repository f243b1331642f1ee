"""``transformers``' ``generate`` as CodeGen2.5's model card shows it: one row at a time, no cache between rows."""

import time
from typing import Any

from jobs.process import since_birth
from serving.cores import available_cores
from serving.formats import load_format
from tests.benchmarks.peers.figures import Measured, until_stop
from tests.benchmarks.peers.inputs import FORMAT, Row, make_prompts
from tests.benchmarks.peers.setting import Setting


def run_transformers(rows: list[Row], setting: Setting) -> Measured:
    """Generate for the first ``transformers_rows`` rows; the rate is theirs."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(available_cores()))
    prompts = make_prompts(rows[: setting.transformers_rows], setting, align=1)
    stops = load_format(FORMAT).stop_token_ids
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=getattr(torch, setting.dtype)).eval()
    startup, started = since_birth(), time.monotonic()
    outputs = {row: until_stop(_generate(model, prompt, setting, stops), stops) for row, prompt in enumerate(prompts)}
    busy = time.monotonic() - started
    scaled = {"scaled_busy_seconds": round(busy / len(prompts) * len(rows), 1), "scaled_to_rows": len(rows)}
    note = f"the first {len(prompts)} of {len(rows)} rows; the rate is theirs"
    return Measured(startup, busy, prompts, outputs, 0, note=note, extra=scaled)


def _generate(model: Any, prompt: list[int], setting: Setting, stops: tuple[int, ...]) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=setting.max_tokens,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        )
    found: list[int] = answer[0, len(prompt) :].tolist()
    return found
