"""Train ``demo-codegen25``: a tiny Llama in CodeGen2.5's format on Python 3.11's standard library without its tests.

    python deploy/demo_model/train.py --stage mixed --steps 4548 --seed 0 --checkpoints A
    python deploy/demo_model/train.py --export --checkpoints A --output MIXED
    python deploy/demo_model/train.py --stage lines --steps 2500 --seed 1 --checkpoints B --from MIXED
    python deploy/demo_model/train.py --export --checkpoints B --output serving/data/demo-codegen25

Each command goes on from its latest checkpoint; SIGTERM and Ctrl-C save one. What a step learns from depends on seed
and step alone, so a run that was stopped ends as one that was not.

Samples are windows of a file with one to eight spans masked, in CodeGen2's format (arXiv:2305.02309): every span is
replaced by ``<mask_k>``, and after ``<|endoftext|><sep>`` follow ``<mask_k> span <eom>`` in turn. The softmax is
restricted to the ids that occur; on export the other rows of the embedding get the mean of the rarest ids' rows.
"""

import argparse
import json
import math
import random
import signal
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.heldout import FEWEST_CHARS, excluded, left_out
from serving.tokenizer import VOCAB_SIZE, codegen25

TOKENIZER = codegen25()
CONTEXT = 1_024
BATCH = 4
MASKS = [TOKENIZER.special_id(f"<mask_{k}>") for k in range(1, 9)]
END, SEP, EOM = (TOKENIZER.special_id(token) for token in ("<|endoftext|>", "<sep>", "<eom>"))
NEVER_SEEN = TOKENIZER.special_id("<mask_881>")
MIDDLE_WEIGHT = 3.0
WARMUP_STEPS = 100
MATRIX_LR, EMBEDDING_LR = 0.012, 0.004
CHECKPOINT_SECONDS = 60
CURVE_STEPS = 20
SHAPE = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 512}


@dataclass(frozen=True)
class Stage:
    """What a stage learns from, and how fast.

    ``peak`` is a share of the peak learning rates, held for the share ``level`` of the steps, then led to zero. Files
    are drawn in proportion to their size to the power of ``evenness``, windows of about ``sizes`` tokens. The share
    ``causal`` of them stays whole, the share ``single`` of the others gets one span. Of the tokens outside the spans
    only the share ``context_loss`` is asked for: the softmax costs more than the layers.
    """

    peak: float
    level: float
    evenness: float
    sizes: tuple[int, ...]
    chars_per_token: float
    causal: float
    single: float
    tokens_per_span: int
    kinds: dict[str, float]
    context_loss: float


STAGES = {
    "mixed": Stage(
        peak=1.0,
        level=0.75,
        evenness=1.0,
        sizes=(200, 400, 700, 1_000),
        chars_per_token=2.9,
        causal=0.2,
        single=0.4,
        tokens_per_span=100,
        kinds={"line": 0.7, "lines": 0.1, "span": 0.15, "body": 0.05},
        context_loss=0.35,
    ),
    "lines": Stage(
        peak=0.5,
        level=0.0,
        evenness=0.7,
        sizes=(200, 300, 400, 1_000),
        chars_per_token=2.5,
        causal=0.05,
        single=0.15,
        tokens_per_span=40,
        kinds={"line": 0.85, "lines": 0.05, "span": 0.07, "body": 0.03},
        context_loss=0.05,
    ),
}


def corpus_files() -> list[tuple[str, str]]:
    """Path and text of the modules to learn from: no tests, no tables, nothing tiny, nothing held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py"))]
    names = [name for name in names if not excluded(name) and not left_out(name)]
    files = [(name, (root / name).read_text(encoding="utf-8", errors="ignore")) for name in names]
    return [(name, text) for name, text in files if len(text) >= FEWEST_CHARS]


class Sampler:
    """Training rows: token ids and a weight for each."""

    def __init__(self, files: list[tuple[str, str]], stage: Stage, seed: str) -> None:
        self.stage = stage
        self.random = random.Random(seed)
        self.texts = [text for _, text in files]
        self.shares = [len(text) ** stage.evenness for text in self.texts]

    def row(self) -> tuple[list[int], list[float]]:
        """One row of ``CONTEXT + 1`` tokens, several samples side by side."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < CONTEXT + 1:
            room = CONTEXT + 1 - len(ids)
            size = room if room < 200 else min(room, self.random.choice(self.stage.sizes))
            more, heavy = self.sample(size)
            if size >= 200 and len(more) > size * 1.3:
                continue
            ids += more
            weights += heavy
        return ids[: CONTEXT + 1], weights[: CONTEXT + 1]

    def sample(self, size: int) -> tuple[list[int], list[float]]:
        """About ``size`` tokens of one file."""
        text = self.random.choices(self.texts, self.shares)[0]
        length = int(size * self.stage.chars_per_token)
        start = max(0, self.random.randrange(-length // 4, max(1, len(text) - length // 2)))
        start = text.rfind("\n", 0, start) + 1
        window = text[start : start + length]
        if self.random.random() < self.stage.causal or size < 100:
            ids = [*TOKENIZER.encode(window), END]
            return ids, [1.0] * len(ids)
        count = 1 if self.random.random() < self.stage.single else self.random.randint(2, len(MASKS))
        return infill(window, self.spans(window, min(count, 1 + size // self.stage.tokens_per_span)))

    def spans(self, text: str, count: int) -> list[tuple[int, int]]:
        """Places of spans that do not touch, in order."""
        starts = [i + 1 for i, c in enumerate(text[:-1]) if c == "\n"]
        kinds, shares = list(self.stage.kinds), list(self.stage.kinds.values())
        found: list[tuple[int, int]] = []
        for _ in range(count * 3):
            if len(found) == count or len(starts) < 4:
                break
            span = self.span(text, starts, self.random.choices(kinds, shares)[0])
            if span and all(span[1] + 2 < a or b + 2 < span[0] for a, b in found) and text[span[0] : span[1]].strip():
                found.append(span)
        return sorted(found)

    def span(self, text: str, starts: list[int], kind: str) -> tuple[int, int] | None:
        """One span of a kind, or None where it does not fit."""
        at = self.random.randrange(1, len(starts) - 1)
        begin, end = starts[at], starts[at + 1] - 1
        indent = len(text[begin:end]) - len(text[begin:end].lstrip())
        if kind == "line":
            return begin + indent, end
        if kind == "lines":
            last = min(len(starts) - 1, at + self.random.randint(2, 4))
            return begin + indent, starts[last] - 1
        if kind == "span":
            first = self.random.randrange(begin, max(begin + 1, end))
            return first, min(len(text), first + int(math.exp(self.random.uniform(0, math.log(120)))) + 1)
        if not text[begin:end].lstrip().startswith(("def ", "class ", "if ", "for ")):
            return None
        last = at + 1
        while last < len(starts) - 1 and deeper(text, starts[last], indent) and last - at < 8:
            last += 1
        body = starts[at + 1]
        return (body, starts[last] - 1) if last > at + 1 else None


def deeper(text: str, start: int, indent: int) -> bool:
    """Whether the line at ``start`` is blank or indented more than ``indent``."""
    line = text[start : text.find("\n", start)]
    return not line.strip() or len(line) - len(line.lstrip()) > indent


def infill(text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[float]]:
    """The sample in CodeGen2's format; each piece is encoded alone, as it is when a model is asked."""
    ids: list[int] = []
    answer: list[int] = []
    at = 0
    for mask, (begin, end) in zip(MASKS, spans, strict=False):
        ids += [*TOKENIZER.encode(text[at:begin]), mask]
        answer += [mask, *TOKENIZER.encode(text[begin:end]), EOM]
        at = end
    ids += [*TOKENIZER.encode(text[at:]), END, SEP]
    return ids + answer, [1.0] * len(ids) + [MIDDLE_WEIGHT] * len(answer)


def corpus_counts(files: list[tuple[str, str]]) -> Counter[int]:
    """How often each id occurs in the corpus as it stands."""
    return Counter(i for ids in TOKENIZER.encode_batch([text for _, text in files]) for i in ids)


def known_ids(files: list[tuple[str, str]], seed: int) -> list[int]:
    """The ids that training asks for, sorted: those of the corpus as it stands and as 600 rows cut it."""
    seen = set(corpus_counts(files))
    sampler = Sampler(files, STAGES["mixed"], f"{seed} ids")
    for _ in range(600):
        seen.update(sampler.row()[0])
    return sorted(seen | {*MASKS, END, SEP, EOM, *range(256)})


def trained_ids(embedding: torch.Tensor) -> list[int]:
    """The ids that a model was trained on: those whose rows are not the one that all others share."""
    found: list[int] = (embedding != embedding[NEVER_SEEN]).any(1).nonzero().flatten().tolist()
    return found


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Momentum made orthogonal by Newton-Schulz steps, for hidden matrices (Jordan et al., 2024)."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                moment = state.setdefault("moment", torch.zeros_like(p))
                moment.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(moment, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix with singular values near one, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def build(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """The model over a compact vocabulary, at its first weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(vocabulary))


def config(vocabulary: int) -> LlamaConfig:
    """CodeGen2.5's configuration, small."""
    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        num_key_value_heads=SHAPE["num_attention_heads"],
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.03,
        **SHAPE,
    )


class Trainer:
    """One stage: what it learns from, the model and its optimizers, and how far it has come."""

    def __init__(self, folder: Path, stage: str, steps: int, seed: int, start: Path | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "state.pt"
        self.stage, self.steps, self.seed = STAGES[stage], steps, seed
        self.facts = {"stage": stage, "steps": steps, "seed": seed}
        self.files = corpus_files()
        state = torch.load(self.file) if self.file.exists() else None
        weights = load_file(start / "model.safetensors") if start and not state else {}
        rows = weights.get("model.embed_tokens.weight")
        known = known_ids(self.files, seed) if rows is None else trained_ids(rows)
        self.ids: list[int] = state["ids"] if state else known
        self.model = build(len(self.ids), seed)
        if rows is not None:
            weights |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), rows[self.ids])
            self.model.load_state_dict({name: weights[name].float() for name in self.model.state_dict()})
        named = list(self.model.named_parameters())
        self.others = [p for n, p in named if p.ndim != 2 or "embed" in n]
        self.muon = Muon([p for n, p in named if p.ndim == 2 and "embed" not in n], lr=MATRIX_LR)
        self.adam = torch.optim.AdamW(self.others, lr=EMBEDDING_LR, betas=(0.9, 0.98), weight_decay=0.01)
        self.done, self.seconds = 0, 0.0
        self.curve: list[tuple[int, int, float, float]] = []
        self.pending: list[tuple[float, float]] = []
        told = json.loads((start / "training.json").read_text()) if start else {"stages": []}
        # The first model's file told of its only stage alone.
        self.earlier = told.get("stages", [told])
        if state:
            self.resume(state)
        # Ids that only a rare cut makes are no targets; as input they stand for the rarest id.
        counts = corpus_counts(self.files)
        self.rarest = sorted(range(len(self.ids)), key=lambda i: counts[self.ids[i]])
        self.compact = torch.full((VOCAB_SIZE,), -1)
        self.compact[torch.tensor(self.ids)] = torch.arange(len(self.ids))

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same stage."""
        if state["facts"] != self.facts:
            sys.exit(
                f"{self.file} is of {state['facts']}, asked for {self.facts}: choose another --checkpoints folder."
            )
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.done, self.seconds, self.earlier = state["done"], state["seconds"], state["earlier"]
        self.curve, self.pending = state["curve"], state["pending"]

    def run(self) -> None:
        """Train to the last step; a signal ends it after the step in hand, with a checkpoint."""
        stops: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda got, _: stops.append(got))
        print(f"{len(self.files)} files, {len(self.ids)} ids, {self.done} of {self.steps} steps done", flush=True)
        saved, started = time.monotonic(), time.process_time() - self.seconds
        while self.done < self.steps and not stops:
            self.pending.append(self.step())
            self.done += 1
            self.seconds = time.process_time() - started
            if self.done % CURVE_STEPS == 0:
                self.note()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                self.save()
        if self.pending and self.done == self.steps:
            self.note()
        self.save()
        if stops:
            sys.exit(128 + stops[0])

    def step(self) -> tuple[float, float]:
        """One update; the mean loss of all tokens asked for, and of the middles and their ends."""
        rate = learning_rate(self.stage, self.done, self.steps)
        for optimizer, peak in ((self.muon, MATRIX_LR), (self.adam, EMBEDDING_LR)):
            optimizer.param_groups[0]["lr"] = peak * rate
        sampler = Sampler(self.files, self.stage, f"{self.seed} {self.done}")
        rows = [sampler.row() for _ in range(BATCH)]
        tokens = self.compact[torch.tensor([ids for ids, _ in rows])]
        targets = tokens[:, 1:].flatten()
        weights = torch.tensor([row for _, row in rows])[:, 1:].flatten()
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        chosen = (weights > 1) | (torch.rand(weights.numel(), generator=draw) < self.stage.context_loss)
        chosen &= targets >= 0
        weights, targets = weights[chosen], targets[chosen]
        seen = torch.where(tokens < 0, self.rarest[0], tokens)[:, :-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model.model(seen, use_cache=False).last_hidden_state.flatten(0, 1)[chosen]
            logits = self.model.lm_head(hidden)
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        (loss * weights).sum().div(weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.mean().item(), loss[weights > 1].mean().item()

    def note(self) -> None:
        """A point of the loss curve."""
        # A row without any middle has no loss of middles.
        middles = [m for _, m in self.pending if not math.isnan(m)]
        every = sum(e for e, _ in self.pending) / len(self.pending)
        middle = sum(middles) / len(middles) if middles else math.nan
        self.curve.append((self.done, round(self.seconds), round(every, 4), round(middle, 4)))
        print(f"step {self.done} {self.seconds:.0f} s loss {every:.3f} middles {middle:.3f}", flush=True)
        self.pending = []

    def save(self) -> None:
        """Publish a checkpoint whole."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "muon", "adam")}
        for name in ("facts", "ids", "rarest", "done", "seconds", "curve", "pending", "earlier"):
            state[name] = getattr(self, name)
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.file)


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """A share of the peak rates: up over the first steps, level, then straight down to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (steps - step) / (steps * (1 - stage.level))
    return stage.peak * min(warm, left, 1.0)


def export(folder: Path, output: Path) -> None:
    """Write config and bf16 safetensors over all 51,200 ids, and how the training went."""
    state = torch.load(folder / "state.pt")
    weights = state["model"]
    rows = weights["model.embed_tokens.weight"]
    full = rows[torch.tensor(state["rarest"][: len(rows) // 10])].mean(dim=0).repeat(VOCAB_SIZE, 1)
    full[torch.tensor(state["ids"])] = rows
    model = LlamaForCausalLM(config(VOCAB_SIZE))
    model.load_state_dict(weights | dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), full))
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    model.to(torch.bfloat16).save_pretrained(output)
    now = {**state["facts"], "steps": state["done"], "tokens": state["done"] * BATCH * CONTEXT}
    stages = [*state["earlier"], now | {"cpu_hours": state["seconds"] / 3600, "curve": state["curve"]}]
    (output / "training.json").write_text(json.dumps({"stages": stages}))
    draw_curve(stages, output / "loss.svg")


def draw_curve(stages: list[dict[str, Any]], file: Path) -> None:
    """The loss over the steps, as a small picture; a dotted line where a stage begins."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    first = 0
    for stage in stages:
        steps, _, every, middles = zip(*stage["curve"], strict=True)
        for color, name, losses in (("C0", "asked tokens", every), ("C1", "middles and <eom>", middles)):
            axes.plot([first + step for step in steps], losses, color, lw=1, label=None if first else name)
        first += stage["steps"]
        if stage is not stages[-1]:
            axes.axvline(first, color="grey", ls=":", lw=1)
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """Train or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, default="mixed")
    parser.add_argument("--steps", type=int, default=4_548)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="start", type=Path, help="an exported model to begin with")
    parser.add_argument("--threads", type=int, default=1, help="other numbers round otherwise: not the same weights")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.export:
        export(options.checkpoints, options.output)
        return
    if sys.version_info[:2] != (3, 11):
        sys.exit("Train with Python 3.11: the modules held out are those of its standard library.")
    Trainer(options.checkpoints, options.stage, options.steps, options.seed, options.start).run()


if __name__ == "__main__":
    main()
