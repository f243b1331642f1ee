"""The demo model's recipe: stopped and killed runs end as undisturbed ones, and what ships is what it promises."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from jobs.demo import cut_demo_pairs
from serving.formats import load_format
from serving.models import resolve_model
from serving.tokenizer import VOCAB_SIZE

RECIPE = Path(__file__).resolve().parents[2] / "deploy" / "demo_model" / "train.py"
SHIPPED = resolve_model("demo-codegen25")
STEPS = 60
SMALL = {
    "SHAPE": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "CONTEXT": 256,
    "BATCH": 1,
    "CURVE_STEPS": 7,
    "WARMUP_STEPS": 5,
    "CHECKPOINT_SECONDS": 0.3,
}
CORPUS = [
    (f"m{k}.py", "".join(f"def f{i}(a, b):\n    c = a + {i * k}\n    return b * c\n\n\n" for i in range(40)))
    for k in (1, 2)
]
SLOW = f"""
import sys, time
sys.path.insert(0, {str(RECIPE.parent)!r})
import train
for name, value in {SMALL!r}.items():
    setattr(train, name, value)
train.corpus_files = lambda: {CORPUS!r}
step = train.Trainer.step
train.Trainer.step = lambda self: (time.sleep(0.03), step(self))[1]
train.sys.version_info = (3, 11)
train.main()
"""


class Run:
    """The recipe on a small model and corpus, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        arguments = ["--steps", str(STEPS), "--checkpoints", str(folder)]
        command = [sys.executable, "-c", SLOW, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=RECIPE.parents[2])

    def until_step(self, least: int) -> None:
        """Read on until the run has told of a step."""
        assert self.process.stdout
        for line in self.process.stdout:
            found = re.match(r"step (\d+)", line)
            if found and int(found[1]) >= least:
                return
        pytest.fail(f"the run ended before step {least}")

    def ended(self) -> int:
        """The exit code."""
        self.process.communicate(timeout=120)
        return self.process.returncode


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """The curve of a finished run, times aside."""
    state = torch.load(folder / "state.pt")
    assert state["done"] == STEPS
    return [(step, every, middles) for step, _, every, middles in state["curve"]]


def test_a_run_that_was_stopped_and_then_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    undisturbed = Run(plain)
    stopped = Run(broken)
    stopped.until_step(14)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.ended() == 128 + signal.SIGTERM
    saved = torch.load(broken / "state.pt")
    assert 14 <= saved["done"] < STEPS
    assert len(saved["pending"]) == saved["done"] % 7

    killed = Run(broken)
    killed.until_step(saved["done"] + 20)
    killed.process.kill()
    assert killed.ended() == -signal.SIGKILL
    saved = torch.load(broken / "state.pt")
    assert saved["done"] < STEPS

    assert Run(broken).ended() == 0
    assert undisturbed.ended() == 0
    assert losses(broken) == losses(plain)
    ours, theirs = (torch.load(folder / "state.pt")["model"] for folder in (broken, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The recipe as a module, made small."""
    spec = importlib.util.spec_from_file_location("demo_recipe", RECIPE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_recipe", module)
    spec.loader.exec_module(module)
    for name, value in SMALL.items():
        setattr(module, name, value)
    module.corpus_files = lambda: CORPUS  # type: ignore[attr-defined]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_seed_reaches_first_weights_and_rows(recipe: ModuleType) -> None:
    first, same, other = (recipe.build(300, seed).state_dict() for seed in (0, 0, 1))
    name = "model.embed_tokens.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
    stage = recipe.STAGES["lines"]
    rows = [recipe.Sampler(CORPUS, stage, seed).row() for seed in ("0 7", "0 7", "0 8", "1 7")]
    assert rows[0] == rows[1]
    assert rows[2] not in (rows[0], rows[3])


@pytest.mark.parametrize("stage", ["mixed", "lines"])
def test_rates_follow_the_steps_alone_and_end_at_nothing(recipe: ModuleType, stage: str) -> None:
    rates = [recipe.learning_rate(recipe.STAGES[stage], step, 1_000) for step in range(1_000)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.01


def test_a_sample_is_asked_as_the_format_asks(recipe: ModuleType) -> None:
    text = CORPUS[0][1][:200]
    at = text.index("return")
    prompt = load_format("codegen25").prompt(text[:at], text[at + 12 :], max_tokens=8).token_ids
    ids, weights = recipe.infill(text, [(at, at + 12)])
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == recipe.EOM
    assert weights.count(recipe.MIDDLE_WEIGHT) == len(ids) - len(prompt) + 1


def test_ids_outside_the_known_ones_are_no_targets(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = recipe.Trainer(tmp_path, "mixed", 2, 0, None)
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(trainer.model, "lm_head", keep_rows(trainer.model.lm_head, asked))
    trainer.step()
    trainer.compact[recipe.TOKENIZER.encode(" return")] = -1
    trainer.step()
    assert 0 < asked[1].shape[0] < asked[0].shape[0]


def keep_rows(head: Any, kept: list[torch.Tensor]) -> torch.nn.Module:
    """A head that keeps what it is asked."""

    class Head(torch.nn.Module):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor) -> Any:
            kept.append(hidden.detach())
            return head(hidden)

    return Head()


def test_other_rows_are_the_mean_of_those_that_the_corpus_holds_least(recipe: ModuleType, tmp_path: Path) -> None:
    recipe.Trainer(tmp_path / "a", "mixed", 8, 0, None).run()
    recipe.export(tmp_path / "a", tmp_path / "model")
    state = torch.load(tmp_path / "a" / "state.pt")
    counts = recipe.corpus_counts(CORPUS)
    rare = state["rarest"][: len(state["ids"]) // 10]
    others = set(state["rarest"]) - set(rare)
    assert max(counts[state["ids"][i]] for i in rare) <= min(counts[state["ids"][i]] for i in others)

    start = recipe.Trainer(tmp_path / "b", "lines", 8, 1, tmp_path / "model")
    assert start.ids == state["ids"]
    rows = state["model"]["model.embed_tokens.weight"]
    assert torch.equal(start.model.model.embed_tokens.weight, rows.bfloat16().float())
    full = recipe.load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert full.shape[0] == VOCAB_SIZE
    assert torch.equal(full[recipe.NEVER_SEEN], rows[torch.tensor(rare)].mean(0).bfloat16())

    start.run()
    recipe.export(tmp_path / "b", tmp_path / "model")
    stages = json.loads((tmp_path / "model" / "training.json").read_text())["stages"]
    assert [(stage["stage"], stage["steps"], stage["seed"]) for stage in stages] == [("mixed", 8, 0), ("lines", 8, 1)]
    with pytest.raises(SystemExit, match="choose another --checkpoints folder"):
        recipe.Trainer(tmp_path / "b", "lines", 9, 1, tmp_path / "model")


def test_what_ships_gives_ids_that_it_never_saw_little(recipe: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    cut_demo_pairs(tmp_path / "pairs.parquet", rows=24, seed=3)
    network = AutoModelForCausalLM.from_pretrained(SHIPPED.path, dtype=torch.float32)
    rows = network.model.embed_tokens.weight
    unseen = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    unseen[recipe.trained_ids(rows)] = False
    assert unseen.sum() > VOCAB_SIZE / 2
    fmt = load_format("codegen25")
    masses = []
    with torch.no_grad():
        for row in pq.read_table(tmp_path / "pairs.parquet").to_pylist():
            prompt = fmt.prompt(row["prefix"], row["suffix"], max_tokens=64, max_context=384).token_ids
            middle = fmt.tokenizer.encode(row["middle"])
            logits = network(torch.tensor([[*prompt, *middle]]), logits_to_keep=len(middle) + 1).logits[0]
            masses += logits.softmax(-1)[:, unseen].sum(-1).tolist()
    assert sum(masses) / len(masses) < 0.05


def test_what_ships_is_small_and_tells_its_training() -> None:
    assert SHIPPED.path
    assert (SHIPPED.path / "model.safetensors").stat().st_size <= 25_000_000
    stages = json.loads((SHIPPED.path / "training.json").read_text())["stages"]
    card = (SHIPPED.path / "README.md").read_text()
    for stage in stages:
        assert f"{stage['steps']:,} steps" in card
