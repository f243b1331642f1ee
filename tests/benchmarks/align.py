"""What ``--prefix-align`` is worth: prefix sharing and speed against quality, on the demo model's held-out modules.

    spanfill bench align [--spans 20 100 | --inputs spans100 spans20 unshared] [--align 1 64 256 512] [--rows 520]
                         [--rounds 2] [--json FILE] [--plot FILE.svg]

Rows are single lines of the held-out modules of 8,000 characters or more, so that most prompts are cut; of so many of
them, drawn, as ``--rows`` holds whole. With ``--inputs`` they are the very rows of ``bench peers`` instead, whose files
the model has mostly seen; of a longer gap its first 256 tokens are scored. At each alignment the same rows go through
``run_job`` on the real engine, all alignments in turn once a round; rates are medians of the rounds. Quality: exact
matches and ``<eom>`` of greedy infills, and bits per byte of the true line by transformers in float32, given the very
prompts. Whether ``<eom>`` is right can be told where the true text would end within the tokens that are generated:
``eom due`` is its share of those rows. Differences of exact matches, of ``eom due`` and of bits are taken row by row
against the first alignment and stand with their standard error.
"""

import math
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from jobs import JobSpec, run_job
from jobs.heldout import HELD_OUT
from jobs.pairs import draw_spans, standard_library
from serving.formats import load_format
from serving.models import resolve_model
from tests.benchmarks.output import check_files, console, origin, parser_of, positive, publish_json
from tests.benchmarks.peers.inputs import INPUTS, make_rows

MODEL = "demo-codegen25"
MAX_TOKENS = 48
MOST_SCORED = 256
FEWEST_CHARS = 8_000
ROWS = 520
COLUMNS = ("rows/s", "ideal", "reached", "prompt tokens", "exact match", "eom", "eom due", "bits/byte")

Row = dict[str, str]


@dataclass(frozen=True)
class Cut:
    """The rows of one table and how many files they are of; a file may hold fewer lines than were asked for."""

    rows: list[Row]
    files: int
    input: str = ""

    @property
    def spans(self) -> float:
        """Rows a file, in the mean."""
        return len(self.rows) / self.files

    @property
    def title(self) -> str:
        """For people."""
        named = f"{self.input}: " if self.input else ""
        return f"{named}{self.spans:.4g} spans a file, {self.files} files, {len(self.rows)} rows"


@dataclass(frozen=True)
class Line:
    """One alignment: its runs' manifests; of each row, whether the infill is exact, its line's bits and bytes.

    ``ended``, of the rows whose true text would have had room: whether the infill ended by itself.
    """

    align: int
    manifests: list[dict[str, Any]]
    exact: list[bool]
    ended: list[bool]
    bits: list[float]
    sizes: list[int]


def cut_rows(spans: int, most: int) -> Cut:
    """``spans`` lines of each of some long held-out modules, shuffled: of as many files as ``most`` rows hold whole."""
    draw = random.Random(spans)
    names = sorted(HELD_OUT)
    draw.shuffle(names)
    rows, files = list[Row](), 0
    for name in names:
        text = (standard_library() / name).read_text(encoding="utf-8")
        if len(text) < FEWEST_CHARS:
            continue
        lines = draw_spans(text, "python", "line", spans, draw)
        if rows and len(rows) + len(lines) > most:
            break
        rows += [{"prefix": text[:a], "middle": text[a:b], "suffix": text[b:]} for a, b, _ in lines]
        files += 1
    draw.shuffle(rows)
    return Cut(rows, files)


def peers_rows(name: str, most: int | None) -> Cut:
    """The rows of one input of ``bench peers``."""
    rows = make_rows(name, most)
    return Cut(rows, len({row["id"].rpartition(":")[0] for row in rows}), name)


def measure(rows: list[Row], aligns: Sequence[int], rounds: int, tell: Callable[[list[Line]], None]) -> list[Line]:
    """Run each alignment once a round, in turn, and score it after its first run; ``tell`` hears after every run."""
    lines: dict[int, Line] = {}
    for _ in range(rounds):
        for align in aligns:
            manifest, exact, ended = infill(rows, align)
            if align in lines:
                lines[align].manifests.append(manifest)
            else:
                lines[align] = Line(align, [manifest], exact, ended, *bits(rows, align))
            tell(list(lines.values()))
    return list(lines.values())


def infill(rows: list[Row], align: int) -> tuple[dict[str, Any], list[bool], list[bool]]:
    """The job's manifest; of each row whether its infill is the true line but for blanks around it; ``Line.ended``."""
    with tempfile.TemporaryDirectory(prefix="spanfill-align-") as folder:
        source, output = Path(folder, "rows.parquet"), Path(folder, "out")
        pq.write_table(pa.Table.from_pylist(rows), source)
        spec = JobSpec(input=str(source), output=str(output), model=MODEL, max_tokens=MAX_TOKENS, prefix_align=align)
        manifest = run_job(spec)
        table = pq.read_table(output / "data", columns=["infill", "finish_reason"])
    encode = load_format("codegen25").tokenizer.encode
    pairs = list(zip(table.to_pylist(), rows, strict=True))
    exact = [found["infill"].strip() == row["middle"].strip() for found, row in pairs]
    ended = [found["finish_reason"] == "eom" for found, row in pairs if len(encode(row["middle"])) < MAX_TOKENS]
    return manifest, exact, ended


def bits(rows: list[Row], align: int) -> tuple[list[float], list[int]]:
    """The bits of each row's true text, ``<eom>`` left out, and the bytes of what of it was scored."""
    import torch
    from transformers import AutoModelForCausalLM

    known, fmt = resolve_model(MODEL), load_format("codegen25")
    network = AutoModelForCausalLM.from_pretrained(known.path, dtype=torch.float32)
    found, sizes = list[float](), list[int]()
    with torch.no_grad():
        for row in rows:
            middle = fmt.tokenizer.encode(row["middle"])[:MOST_SCORED]
            room = {"max_tokens": max(MAX_TOKENS, len(middle)), "max_context": known.context}
            prompt = fmt.prompt(row["prefix"], row["suffix"], prefix_align=align, **room).token_ids
            logits = network(torch.tensor([[*prompt, *middle]]), logits_to_keep=len(middle) + 1).logits[0, :-1]
            told = logits.log_softmax(-1).gather(1, torch.tensor(middle)[:, None]).sum().item()
            found.append(-told / math.log(2))
            sizes.append(len(fmt.tokenizer.decode_bytes(middle)))
    return found, sizes


def told(line: Line, base: Line) -> dict[str, Any]:
    """One line of the table; shares are of its first run, differences are against ``base``."""
    manifest, rates = line.manifests[0], [manifest["rows_per_second"] for manifest in line.manifests]
    size = statistics.mean(line.sizes)
    gap, error = gap_of(line.bits, base.bits)
    exact_gap, exact_error = gap_of(line.exact, base.exact)
    ended_gap, ended_error = gap_of(line.ended, base.ended) if line.ended else (0.0, 0.0)
    return {
        "align": line.align,
        "rows/s": statistics.median(rates),
        "rates": rates,
        "ideal": manifest["ideal_hit_share"],
        "reached": manifest["prefix_cache_hit_share"],
        "prompt tokens": manifest["prompt_tokens"] / manifest["rows"],
        "truncated": manifest["truncated"] / manifest["rows"],
        "exact match": statistics.mean(line.exact),
        "exact match gap": exact_gap,
        "exact match gap error": exact_error,
        "eom": manifest["finish_reasons"].get("eom", 0) / manifest["rows"],
        "eom due": statistics.mean(line.ended) if line.ended else 0.0,
        "eom due rows": len(line.ended),
        "eom due gap": ended_gap,
        "eom due gap error": ended_error,
        "bits/byte": statistics.mean(line.bits) / size,
        "bits/byte gap": gap / size,
        "bits/byte gap error": error / size,
        "against": base.align,
    }


def gap_of(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """The mean of the differences row by row, and its standard error."""
    differences = [float(b) - float(a) for a, b in zip(base, values, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.mean(differences), error


def table_of(cut: Cut, lines: list[Line]) -> dict[str, Any]:
    """One table for JSON."""
    about = {"title": cut.title, "spans_per_file": cut.spans, "files": cut.files, "rows": len(cut.rows)}
    return about | {"lines": [told(line, lines[0]) for line in lines]}


def shown(table: dict[str, Any]) -> Table:
    """One table for people."""
    base = table["lines"][0]["align"]
    gaps = tuple(f"{name} against {base}" for name in ("exact", "eom due", "bits/byte"))
    found = Table("align", *COLUMNS, *gaps, title=table["title"])
    for line in table["lines"]:
        values = [f"{line[name]:.3f}" for name in ("ideal", "reached")]
        values += [f"{line['prompt tokens']:.0f}"] + [f"{line[name]:.3f}" for name in COLUMNS[4:]]
        for name in ("exact match", "eom due", "bits/byte"):
            values.append(f"{line[f'{name} gap']:+.4f} ± {line[f'{name} gap error']:.4f}")
        found.add_row(str(line["align"]), f"{line['rows/s']:.1f}", *values)
    return found


def plot(tables: dict[str, dict[str, Any]], path: Path) -> None:
    """Ideal and reached share, and bits per byte with its error, over the alignment."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for table in tables.values():
        lines, label = table["lines"], table["title"].rsplit(",", 2)[0]
        names = [str(line["align"]) for line in lines]
        left.plot(names, [line["ideal"] for line in lines], "--", label=f"{label}, ideal")
        left.plot(names, [line["reached"] for line in lines], label=f"{label}, reached")
        gaps, errors = [line["bits/byte gap"] for line in lines], [line["bits/byte gap error"] for line in lines]
        right.errorbar(names, gaps, errors, capsize=3, label=label)
    left.set(xlabel="prefix_align", ylabel="cached share of prompt tokens")
    right.set(xlabel="prefix_align", ylabel=f"bits per byte more than at {lines[0]['align']}")
    for axes in (left, right):
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure and print."""
    parser = parser_of("align", __doc__)
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--spans", type=positive, nargs="+", default=[20, 100])
    sources.add_argument("--inputs", choices=list(INPUTS), nargs="+", help="those of bench peers")
    parser.add_argument("--align", type=positive, nargs="+", default=[1, 64, 256, 512], help="the first is the base")
    parser.add_argument("--rows", type=positive, help="rows of one table at most [default: 520; of an input its own]")
    parser.add_argument("--rounds", type=positive, default=2, help="runs of each line; rates are their medians")
    parser.add_argument("--json", type=Path, help="written after every run")
    parser.add_argument("--plot", type=Path, help="an .svg or .png file")
    asked = parser.parse_args()
    check_files(parser, asked.json, asked.plot)
    about = origin("align") | {"rounds": asked.rounds}
    tables: dict[str, dict[str, Any]] = {}
    for source in asked.inputs or asked.spans:
        cut = peers_rows(source, asked.rows) if asked.inputs else cut_rows(source, asked.rows or ROWS)

        def tell(lines: list[Line], name: str = str(source), cut: Cut = cut) -> None:
            tables[name] = table_of(cut, lines)
            if asked.json:
                publish_json(asked.json, about | {"tables": tables})

        measure(cut.rows, asked.align, asked.rounds, tell)
        console().print(shown(tables[str(source)]))
    if asked.plot:
        plot(tables, asked.plot)


if __name__ == "__main__":
    main()
