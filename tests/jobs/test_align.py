"""The pure parts of ``bench align``: rows, turns, differences, table."""

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmarks import align
from tests.benchmarks.align import Line, cut_rows, gap_of, measure, peers_rows, shown, table_of, told
from tests.benchmarks.peers.inputs import make_rows


def manifest(rate: float) -> dict[str, Any]:
    """What is read of a job's manifest."""
    shares = {"ideal_hit_share": 0.5, "prefix_cache_hit_share": 0.4, "finish_reasons": {"eom": 1}}
    return shares | {"rows_per_second": rate, "rows": 2, "prompt_tokens": 20, "truncated": 2}


BASE = Line(
    64, [manifest(2.0), manifest(4.0), manifest(9.0)], [True, False, True], [True, True], [8.0, 8.0, 8.0], [4, 4, 4]
)
LINE = Line(256, [manifest(5.0)], [False, False, True], [True, False], [12.0, 8.0, 10.0], [4, 4, 4])


@pytest.mark.parametrize(("spans", "files"), [(20, 13), (100, 5)])
def test_spans_a_file_are_that_many_of_whole_files(spans: int, files: int) -> None:
    cut = cut_rows(spans, 520)
    texts = Counter(row["prefix"] + row["middle"] + row["suffix"] for row in cut.rows)
    assert set(texts.values()) == {spans}
    assert (cut.files, len(cut.rows), cut.spans) == (files, spans * files, spans)
    assert cut.title == f"{spans} spans a file, {files} files, {spans * files} rows"
    assert cut_rows(spans, 520) == cut


def test_where_files_hold_fewer_lines_the_mean_is_told() -> None:
    cut = cut_rows(100_000, 1_000)
    assert cut.spans == len(cut.rows) / cut.files < 1_000
    assert cut.title.startswith(f"{cut.spans:.4g} spans a file, {cut.files} files")


def test_the_rows_of_the_peers_benchmark_know_their_gaps() -> None:
    cut = peers_rows("spans20", 60)
    assert (cut.files, len(cut.rows), cut.title) == (3, 60, "spans20: 20 spans a file, 3 files, 60 rows")
    texts = {row["prefix"] + row["middle"] + row["suffix"] for row in cut.rows}
    assert len(texts) == 3
    assert cut.rows == make_rows("spans20", 60)


def test_differences_are_paired() -> None:
    assert gap_of([12.0, 8.0, 10.0], [8.0, 8.0, 8.0]) == pytest.approx((2.0, 2 / 3**0.5))
    assert gap_of([1.0], [2.0]) == (-1.0, 0.0)


def test_a_line_tells_its_differences_and_their_errors() -> None:
    line = told(LINE, BASE)
    assert line["against"] == 64
    assert (line["bits/byte"], line["bits/byte gap"]) == (2.5, 0.5)
    assert line["bits/byte gap error"] == pytest.approx(2 / 3**0.5 / 4)
    assert line["exact match gap"] == pytest.approx(-1 / 3)
    assert line["exact match gap error"] == pytest.approx(1 / 3)
    assert (line["eom due"], line["eom due rows"], line["eom due gap"]) == (0.5, 2, -0.5)
    assert told(BASE, BASE)["rows/s"] == 4.0
    assert told(BASE, BASE)["rates"] == [2.0, 4.0, 9.0]


def test_the_table_names_its_base_and_is_legible_where_it_is_redirected() -> None:
    stream = io.StringIO()
    Console(file=stream, width=200).print(shown(table_of(cut_rows(20, 40), [BASE, LINE])))
    text = stream.getvalue()
    for words in ("20 spans a file, 2 files, 40 rows", "bits/byte against 64", "+0.5000 ± 0.2887", "-0.3333 ± 0.3333"):
        assert words in text


def test_alignments_take_turns_and_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def infill(rows: list[dict[str, str]], at: int) -> tuple[dict[str, Any], list[bool], list[bool]]:
        calls.append(f"run {at}")
        return manifest(1.0), [True], []

    def bits(rows: list[dict[str, str]], at: int) -> tuple[list[float], list[int]]:
        calls.append(f"score {at}")
        return [1.0], [1]

    monkeypatch.setattr(align, "infill", infill)
    monkeypatch.setattr(align, "bits", bits)
    sizes: list[int] = []
    lines = measure([], [1, 64], 2, lambda found: sizes.append(sum(len(line.manifests) for line in found)))
    assert calls == ["run 1", "score 1", "run 64", "score 64", "run 1", "run 64"]
    assert sizes == [1, 2, 3, 4]
    assert [len(line.manifests) for line in lines] == [2, 2]


def test_what_was_measured_is_on_disk_after_every_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "align.json"
    options = ["--rows", "40", "--spans", "20", "--align", "1", "64", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["align", *options])

    def infill(rows: list[dict[str, str]], at: int) -> tuple[dict[str, Any], list[bool], list[bool]]:
        if at == 64:
            raise KeyboardInterrupt
        return manifest(1.0), [True] * len(rows), []

    monkeypatch.setattr(align, "infill", infill)
    monkeypatch.setattr(align, "bits", lambda rows, at: ([1.0] * len(rows), [1] * len(rows)))
    with pytest.raises(KeyboardInterrupt):
        align.main()
    report = json.loads(path.read_text())
    assert {"command", "rounds", "machine", "versions"} <= report.keys()
    table = report["tables"]["20"]
    assert (table["files"], table["spans_per_file"], [line["align"] for line in table["lines"]]) == (2, 20, [1])
