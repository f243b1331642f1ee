"""The pure parts of ``bench peers``: inputs, medians, table, comparison."""

import io
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs import bench
from serving.errors import ConfigError
from serving.formats import load_format
from tests.benchmarks.peers.check import compare
from tests.benchmarks.peers.inputs import HEADER_ROWS, INPUTS, make_prompts, make_rows, read_rows, write_rows
from tests.benchmarks.peers.report import plot, summarise, table
from tests.benchmarks.peers.setting import Setting

SETTING = Setting(rows="", model="")


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_the_same_for_the_same_seed(name: str, tmp_path: Path) -> None:
    rows = make_rows(name, 12)
    assert rows == make_rows(name, 12)
    assert len({row["id"] for row in rows}) == 12
    assert read_rows(write_rows(rows, tmp_path / "rows.parquet")) == rows


def test_spans_come_from_as_few_files_as_were_asked_for() -> None:
    files = Counter(row["id"].rpartition(":")[0] for row in make_rows("spans20", 60))
    assert list(files.values()) == [20, 20, 20]


def test_unshared_rows_are_of_files_of_their_own() -> None:
    assert len({row["id"].rpartition(":")[0] for row in make_rows("unshared", 30)}) == 30


def test_rows_of_a_header_share_its_tokens_and_nothing_is_cut() -> None:
    prompts = sorted(make_prompts(make_rows("header600", HEADER_ROWS), SETTING, align=1))
    assert all(a[:590] == b[:590] for a, b in pairwise(prompts))
    assert all(600 < len(prompt) < 1_084 for prompt in prompts)


def test_humaneval_holds_every_line_span_of_a_problem() -> None:
    rows = make_rows("humaneval", 7_000)
    assert len(rows) > 5_000
    ids = Counter(row["id"].rpartition(":")[0] for row in rows)
    assert len(ids) == 164
    assert all(any(lines * (lines + 1) == 2 * count for lines in range(1, 40)) for count in ids.values())


def test_an_aligned_prompt_is_the_end_of_the_sliding_one() -> None:
    rows = make_rows("spans20", 20)
    for slid, aligned in zip(make_prompts(rows, SETTING, align=1), make_prompts(rows, SETTING, align=128), strict=True):
        mask = load_format("codegen25").tokenizer.special_id("<mask_1>")
        head = aligned[: aligned.index(mask)]
        assert slid[: slid.index(mask)][-len(head) :] == head or not head


def figures(rate: float, **more: Any) -> dict[str, Any]:
    """One round of a contestant, as its process tells it."""
    names = ("startup_seconds", "busy_seconds", "output_tokens_per_second", "mean_prompt_tokens", "mean_output_tokens")
    shares = {"cached_tokens": 10, "cached_share": 0.2, "ideal_share": 0.25}
    return dict.fromkeys(names, 1.0) | shares | {"rows_per_second": rate, "note": "", "failure": ""} | more


ROUNDS = {
    "vllm": [figures(2.0), figures(4.0), figures(3.0)],
    "raydata": [figures(2.0, cached_tokens=None, cached_share=None, note="tells no cached tokens")],
    "spanfill": [figures(6.0), {"failure": "exit code 1: no room"}],
    "runbatch": [{"failure": "exit code 1: no chat"}],
}


def test_medians_are_of_the_rounds_that_went_well() -> None:
    told = summarise(ROUNDS)
    assert told["results"]["vllm"]["median"]["rows_per_second"] == 3.0
    assert told["results"]["vllm"]["rows_per_second"] == {"lowest": 2.0, "highest": 4.0}
    assert told["results"]["spanfill"]["median"]["rows_per_second"] == 6.0
    assert told["results"]["runbatch"]["failure"] == "exit code 1: no chat"
    assert told["ratios"]["all"]["rows_per_second"] == 2.0
    assert told["ratios"]["beside Ray Data LLM"]["rows_per_second"] == 3.0
    assert "alignment" not in told["ratios"]


def test_the_table_and_the_plot_show_every_contestant(tmp_path: Path) -> None:
    report = {"input": "spans100", "rows": 9, "rounds": 3, "setting": {"dtype": "bfloat16"}} | summarise(ROUNDS)
    told = io.StringIO()
    Console(file=told, width=200).print(table(report))
    for words in (*ROUNDS, "2.00-4.00", "not told", "tells no cached tokens", "no chat", "0.80"):
        assert words in told.getvalue()
    plot(report, tmp_path / "rates.svg")
    assert "<svg" in (tmp_path / "rates.svg").read_text()


def test_outputs_are_compared_row_for_row() -> None:
    found = compare({0: [1], 1: [2], 2: [3]}, {0: [1], 1: [9], 3: [3]})
    assert (found.compared, found.unequal, found.missing, found.equal) == (2, [1], [2, 3], False)
    assert compare({0: [1]}, {0: [1]}).equal
    assert not compare({}, {}).equal


def test_outside_a_clone_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "jobs" / "bench.py"))
    with pytest.raises(ConfigError, match="from a clone"):
        bench.from_clone("tests.benchmarks.peers", [])
