"""The pure parts of ``bench peers``: inputs, medians, table, comparison."""

import argparse
import io
import signal
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs import bench
from serving.errors import ConfigError
from serving.formats import load_format
from tests.benchmarks.output import check_files, publish_json
from tests.benchmarks.peers import __main__ as command
from tests.benchmarks.peers import rounds
from tests.benchmarks.peers.begun import begun
from tests.benchmarks.peers.check import compare
from tests.benchmarks.peers.figures import Measured, figures_of
from tests.benchmarks.peers.inputs import HEADER_ROWS, INPUTS, make_prompts, make_rows, read_rows, write_rows
from tests.benchmarks.peers.report import plot, ratio_lines, summarise, table
from tests.benchmarks.peers.rounds import Attempt, play
from tests.benchmarks.peers.setting import Setting

SETTING = Setting(rows="", model="")


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_the_same_for_the_same_seed(name: str, tmp_path: Path) -> None:
    rows = make_rows(name, 12)
    assert rows == make_rows(name, 12)
    assert len({row["id"] for row in rows}) == 12
    asked = [{name: row[name] for name in ("id", "prefix", "suffix")} for row in rows]
    assert read_rows(write_rows(rows, tmp_path / "rows.parquet")) == asked


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
    rows = make_rows("humaneval")
    assert len(rows) == 6_838
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
    told = {"rows_per_second": rate, "note": "", "failure": "", "load_before": [0.5, 0, 0]}
    return dict.fromkeys(names, 1.0) | shares | told | more


ROUNDS = {
    "vllm": [figures(2.0), figures(4.0), figures(3.0)],
    "raydata": [figures(2.0, cached_tokens=None, cached_share=None, note="tells no cached tokens")],
    "spanfill": [
        figures(6.0, mean_prompt_tokens=900.0),
        {"failure": "exit code 1: [/no room]", "load_before": [2.5, 1, 1]},
    ],
    "spanfill-1": [figures(4.5)],
    "runbatch": [{"failure": "exit code 1: no chat", "load_before": [1.0, 1, 1]}],
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


def test_beside_a_ratio_stand_the_prompt_tokens_of_both() -> None:
    told = summarise(ROUNDS)
    assert told["ratios"]["all"]["mean_prompt_tokens"] == {"of": 900.0, "to": 1.0}
    assert "same prompts: spanfill-1 / vllm = 1.50 (mean prompt tokens 1 / 1)" in list(ratio_lines(told))


def test_the_table_and_the_plot_show_every_contestant(tmp_path: Path) -> None:
    report = {"input": "spans100", "rows": 9, "rounds": 3, "setting": {"dtype": "bfloat16"}} | summarise(ROUNDS)
    told = io.StringIO()
    Console(file=told, width=200).print(table(report))
    remarks = ("tells no cached tokens", "no chat", "spanfill: medians of 1 of 2 rounds; exit code 1: [/no room]")
    for words in (*ROUNDS, "2.00-4.00", "not told", "0.80", *remarks, "load average before an attempt: 2.50"):
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


MEASURED = Measured(1.0, 2.0, [[1, 2], [1, 3], [4]], {0: [7], 1: [8], 2: [9]}, 2, prompt_tokens=5)


def test_a_rate_is_of_answered_rows_and_given_prompts() -> None:
    assert figures_of(MEASURED, 1).failure == ""
    assert figures_of(MEASURED, 1).rows_per_second == 1.5
    unanswered = figures_of(replace(MEASURED, outputs={0: [7]}, errors=1), 1)
    assert unanswered.rows_per_second == 0.5
    assert unanswered.failure == "1 error rows, 1 rows without an answer"
    assert figures_of(replace(MEASURED, outputs={}, answered=3), 1).failure == ""
    assert "2 prompts that differ" in figures_of(replace(MEASURED, different=2), 1).failure
    assert figures_of(replace(MEASURED, prompt_tokens=6), 1).failure == "6 prompt tokens where 5 were given"


def test_rounds_go_on_with_the_attempts_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    played: list[str] = []
    monkeypatch.setattr(rounds, "PAUSE_SECONDS", 0.0)

    def attempt(name: str, *_: Any) -> Attempt:
        played.append(name)
        return Attempt({"failure": "no"} if name == "b" else figures(1.0))

    monkeypatch.setattr(rounds, "_attempt", attempt)
    attempts = {"a": [Attempt(figures(1.0)), Attempt(figures(2.0))], "b": [Attempt(figures(1.0))], "c": []}
    sizes: list[int] = []
    play(attempts, 2, SETTING, tmp_path, 1.0, tell=lambda: sizes.append(sum(map(len, attempts.values()))))
    assert played == ["c", "b", "c"]
    assert sizes == [4, 5, 6]
    assert len(attempts["b"][1].figures["load_before"]) == 3


def test_a_report_of_the_same_settings_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    about = {"command": "one", "rounds": 3, "contestants": ["vllm"], "machine": {"cores": 2, "load_before": [0.0]}}
    assert begun(path, about) == {}
    publish_json(path, about | summarise({"vllm": ROUNDS["vllm"][:2]}))
    again = about | {"command": "two", "machine": {"cores": 2, "load_before": [9.0]}}
    assert begun(path, again) == {"vllm": ROUNDS["vllm"][:2]}
    assert "2 of 3 attempts are made" in capsys.readouterr().err
    assert begun(path, about | {"rounds": 5, "contestants": ["vllm", "spanfill"]}) == {"vllm": ROUNDS["vllm"][:2]}
    assert "2 of 10 attempts are made" in capsys.readouterr().err
    assert begun(path, about | {"contestants": ["spanfill"]}) == {}
    assert "other settings (contestants)" in capsys.readouterr().err
    assert begun(path, about | {"machine": {"cores": 4}}) == {}
    assert "other settings (machine)" in capsys.readouterr().err


def test_any_failed_attempt_is_told_by_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ["--rows", "4", "--rounds", "2", "--contestants", "vllm,spanfill", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["peers", *options])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "cached_model", lambda: tmp_path)
    monkeypatch.setattr(rounds, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "_attempt", lambda *_: Attempt(figures(1.0)))
    assert command.main() == 0
    path.unlink()
    failures = iter([figures(1.0), figures(1.0), {"failure": "3 error rows"}, figures(1.0)])
    monkeypatch.setattr(rounds, "_attempt", lambda *_: Attempt(next(failures)))
    assert command.main() == 1
    assert command.main() == 1  # All attempts are made; none is made again.


@pytest.mark.parametrize(
    ("name", "says"),
    [("missing/rates.svg", "must be a folder"), ("rates.gif", "must end in"), ("", "must be a folder")],
)
def test_files_that_cannot_be_written_are_refused_first(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        check_files(argparse.ArgumentParser(), None, tmp_path / name)
    assert says in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_files(argparse.ArgumentParser(), tmp_path / "a.json", tmp_path / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        check_files(argparse.ArgumentParser(), None, tmp_path / "a.svg")
    assert "needs matplotlib" in capsys.readouterr().err
