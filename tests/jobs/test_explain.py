"""What people see of prompts and infills: every character, and nothing that commands their terminal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import serving
from jobs.ledger import FORMAT_VERSION
from jobs.visible import visible
from serving.formats import Infill
from tests.conftest import Command, WriteRows

USAGE = 2
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\u202e"
SEEN = "␛]0;owned␇␛[2J⟦U+009B⟧31m␍␀⟦U+202E⟧"


def test_hidden_characters_are_seen_and_others_are_left_alone() -> None:
    assert visible(HOSTILE) == SEEN
    assert visible("\x7f\ud800\ufeff") == "␡⟦U+D800⟧⟦U+FEFF⟧"
    assert visible("a\tb\n é漢 ⟦␍⟧") == "a\tb\n é漢 ⟦␍⟧"


def test_no_two_texts_look_alike_where_it_must_be_exact() -> None:
    assert visible("␍\r⟦<sep>⟧⟦", exact=True) == "⟦U+240D⟧␍⟦U+27E6⟧<sep>⟧⟦U+27E6⟧"


def test_an_explained_prompt_is_exact(spanfill: Command, write_rows: WriteRows, checkpoint: Path) -> None:
    line = "x = 1  # " + "long " * 100
    rows = write_rows(prefix=[f"\tif a:\r\n{line}\n<sep>  "], suffix=[f"{HOSTILE}\n\n"])
    done = spanfill("explain", "--input", rows, "--model", checkpoint)
    prompt, facts = done.stdout.split("\n\n⟦ ⟧ hold", 1)
    assert prompt == f"\tif a:␍\n{line}\n<sep>  ⟦<mask_1>⟧{SEEN}\n\n⟦<|endoftext|>⟧⟦<sep>⟧⟦<mask_1>⟧"
    assert "nothing was cut\nstops at: <eom> (50318)" in facts


def test_prompts_are_explained_and_planned_before_the_weights_are_there(
    spanfill: Command, write_rows: WriteRows, checkpoint: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("*.bin*"))
    rows = write_rows(prefix=["a = "], suffix=["\n"])
    explained = spanfill("explain", "--input", rows, "--model", bare)
    assert (explained.code, "stops at: <eom>" in explained.stdout) == (0, True), explained.stderr
    planned = spanfill("plan", "--input", rows, "--model", bare)
    assert (planned.code, "1 rows" in planned.stdout) == (0, True), planned.stderr
    refused = spanfill("run", "--input", rows, "--model", bare, "--output", tmp_path / "out")
    assert (refused.code, "no weights" in refused.stderr) == (USAGE, True)


def test_an_infill_is_printed_in_place_as_it_is(
    spanfill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "infill", lambda *_, **__: Infill("\tb" + "!" * 200 + "\x1b[31m", "eom"))
    (tmp_path / "tab.py").write_bytes(b"\tif a:\r\n\t\tc\r\n")
    done = spanfill("infill", f"{tmp_path / 'tab.py'}:2:2")
    assert done.stdout == "\tif a:␍\n\t\tb" + "!" * 200 + "␛[31m\tc␍\n"


@pytest.mark.parametrize("option", [("--max-tokens", 0), ("--temperature", -1)])
def test_a_wrong_option_of_infill_is_found_before_anything_starts(
    spanfill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, int]
) -> None:
    monkeypatch.setattr(serving, "infill", lambda *_, **__: pytest.fail("was started"))
    (tmp_path / "a.py").write_text("x = 1\n")
    done = spanfill("infill", f"{tmp_path / 'a.py'}:1:1", *option)
    assert (done.code, option[0] in done.stderr) == (USAGE, True)


def job_folder(folder: Path, **columns: Any) -> Path:
    """A job's folder with one part of these columns, or none."""
    (folder / "_spanfill").mkdir()
    (folder / "data").mkdir()
    job = {"format_version": FORMAT_VERSION, "spec": {"columns": {}}, "fingerprint": "f", "beginning": "b"}
    job |= {"identity": {}, "versions": {}}
    (folder / "_spanfill" / "job.json").write_text(json.dumps(job))
    if columns:
        rows = len(columns["infill"])
        added = {"finish_reason": ["eom"] * rows, "completion_tokens": pa.array([3] * rows, pa.int32())}
        pq.write_table(pa.table(columns | added), folder / "data" / "part-00000-0.parquet")
    return folder


def not_utf8(*values: bytes) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_show_prints_rows_as_they_are(spanfill: Command, tmp_path: Path) -> None:
    text = "\tx = '" + "a" * 200 + "'\r\n"
    rows = {"id": [f"[/]\n{HOSTILE}", "2"], "prefix": [text, "p"], "infill": [HOSTILE, "y\n"], "middle": ["m\x1b", "y"]}
    done = spanfill("show", job_folder(tmp_path, **rows))
    shown = text.replace("\r", "␍")
    assert done.stdout == (
        f"── [/]␊{SEEN} · eom · 3 tokens ──\n{shown}{SEEN}\ntrue middle: m␛\n── 2 · eom · 3 tokens ──\npy\n"
    )


def test_show_survives_bytes_that_are_not_utf8(spanfill: Command, tmp_path: Path) -> None:
    bad = not_utf8(b"a\xff")
    folder = job_folder(tmp_path, id=bad, prefix=["p "], infill=["i"], other=bad, middle=[{"not": "text"}])
    done = spanfill("show", folder, "--row", 0)
    assert (done.code, done.stdout) == (0, "── a\\xff · eom · 3 tokens ──\np i\n")


@pytest.mark.parametrize("options", [[], ["--row", 0]])
def test_show_of_no_rows_says_so(spanfill: Command, tmp_path: Path, options: list[object]) -> None:
    done = spanfill("show", job_folder(tmp_path), *options)
    assert done.code == USAGE
    assert "has no finished rows. See how the job stands: spanfill status" in done.stderr
    assert "no row -1" not in done.stderr


def test_show_of_a_row_beyond_the_last_says_which_there_are(spanfill: Command, tmp_path: Path) -> None:
    done = spanfill("show", job_folder(tmp_path, prefix=["p"], infill=["i"]), "--row", 1)
    assert (done.code, "has 1 finished rows, no row 1. Choose 0 to 0" in done.stderr) == (USAGE, True)
