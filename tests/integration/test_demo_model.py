"""The demo model that ships: real infills of modules that it has not seen, the same by vLLM and by transformers."""

from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import JobSpec, run_job
from jobs.demo import cut_demo_pairs, parses
from jobs.heldout import held_out
from serving.formats import load_format
from serving.models import resolve_model

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]
ROWS = 20
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> list[dict[str, Any]]:
    """Greedy float32 infills of held-out pairs, with their token ids."""
    folder = tmp_path_factory.mktemp("demo-model")
    cut_demo_pairs(folder / "pairs.parquet", rows=ROWS, seed=3)
    run_job(
        JobSpec(
            input=str(folder / "pairs.parquet"),
            output=str(folder / "out"),
            max_tokens=MAX_TOKENS,
            dtype="float32",
            extra_columns=("token_ids",),
        )
    )
    found: list[dict[str, Any]] = pq.read_table(folder / "out" / "data").to_pylist()
    return found


def test_pairs_come_from_held_out_modules_only(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == ROWS
    assert all(held_out(row["path"]) for row in rows)


def test_greedy_infills_are_those_of_transformers(rows: list[dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    known = resolve_model("demo-codegen25")
    fmt = load_format(known.format)
    model = AutoModelForCausalLM.from_pretrained(known.path, dtype=torch.float32)
    for row in rows:
        prompt = fmt.prompt(row["prefix"], row["suffix"], max_tokens=MAX_TOKENS, max_context=known.context)
        expected = model.generate(
            torch.tensor([prompt.token_ids]),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=list(prompt.stop_token_ids),
        )[0, len(prompt.token_ids) :].tolist()
        if expected[-1] in prompt.stop_token_ids:
            expected.pop()
        assert row["token_ids"] == expected


def test_most_infills_end_and_leave_files_that_parse(rows: list[dict[str, Any]]) -> None:
    assert sum(row["finish_reason"] == "eom" for row in rows) > ROWS / 2
    assert sum(parses(row["prefix"] + row["infill"] + row["suffix"]) for row in rows) > ROWS / 3
