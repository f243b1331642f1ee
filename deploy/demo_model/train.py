"""Train ``demo-codegen25``: a tiny Llama in CodeGen2.5's format on the Python standard library without its tests.

    python deploy/demo_model/train.py --hours 2.5 --checkpoints FOLDER   # goes on from the latest checkpoint
    python deploy/demo_model/train.py --export --checkpoints FOLDER --output serving/data/demo-codegen25

Samples are windows of a file with one to eight spans masked, in CodeGen2's format (arXiv:2305.02309): every span is
replaced by ``<mask_k>``, and after ``<|endoftext|><sep>`` follow ``<mask_k> span <eom>`` in turn. The softmax is
restricted to the ids that occur; on export the other rows of the embedding get the mean of the rarest rows.
"""

import argparse
import json
import math
import random
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.heldout import held_out
from serving.tokenizer import VOCAB_SIZE, codegen25

TOKENIZER = codegen25()
CONTEXT = 1_024
BATCH = 4
CAUSAL_SHARE = 0.2
SPAN_KINDS = {"line": 0.7, "lines": 0.1, "span": 0.15, "body": 0.05}
MIDDLE_WEIGHT = 3.0
CONTEXT_LOSS_SHARE = 0.35
WARMUP_STEPS = 100
DECAY_SHARE = 0.25
MATRIX_LR, EMBEDDING_LR = 0.012, 0.004
CHECKPOINT_SECONDS = 300
SHAPE = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 512}


def library_files() -> list[tuple[str, str]]:
    """Path and text of the modules to learn from: no tests, no generated tables, nothing held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"}
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not skip & set(name.split("/")) and not held_out(name):
            files.append((name, path.read_text(encoding="utf-8", errors="ignore")))
    return [(name, text) for name, text in files if len(text) > 200]


class Sampler:
    """Endless training samples: token ids and a weight for each."""

    def __init__(self, files: list[tuple[str, str]], seed: int) -> None:
        self.random = random.Random(seed)
        self.texts = [text for _, text in files]
        self.sizes = [len(text) for text in self.texts]
        special = TOKENIZER.special_id
        self.masks = [special(f"<mask_{k}>") for k in range(1, 9)]
        self.end, self.sep, self.eom = special("<|endoftext|>"), special("<sep>"), special("<eom>")

    def row(self) -> tuple[list[int], list[float]]:
        """One row of ``CONTEXT + 1`` tokens, several samples side by side."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < CONTEXT + 1:
            room = CONTEXT + 1 - len(ids)
            size = room if room < 200 else min(room, self.random.choice([200, 400, 700, 1_000]))
            more, heavy = self.sample(size)
            if size >= 200 and len(more) > size * 1.3:
                continue
            ids += more
            weights += heavy
        return ids[: CONTEXT + 1], weights[: CONTEXT + 1]

    def sample(self, size: int) -> tuple[list[int], list[float]]:
        """About ``size`` tokens of one file."""
        text = self.random.choices(self.texts, self.sizes)[0]
        length = int(size * 2.9)
        start = max(0, self.random.randrange(-length // 4, max(1, len(text) - length // 2)))
        start = text.rfind("\n", 0, start) + 1
        window = text[start : start + length]
        if self.random.random() < CAUSAL_SHARE or size < 100:
            ids = [*TOKENIZER.encode(window), self.end]
            return ids, [1.0] * len(ids)
        count = 1 if self.random.random() < 0.4 else self.random.randint(2, 8)
        spans = self.spans(window, min(count, 1 + size // 100))
        return self.infill(window, spans)

    def spans(self, text: str, count: int) -> list[tuple[int, int]]:
        """Places of spans that do not touch, in order."""
        starts = [i + 1 for i, c in enumerate(text[:-1]) if c == "\n"]
        found: list[tuple[int, int]] = []
        for _ in range(count * 3):
            if len(found) == count or len(starts) < 4:
                break
            span = self.span(text, starts, self.random.choices(list(SPAN_KINDS), list(SPAN_KINDS.values()))[0])
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
        while last < len(starts) - 1 and self.deeper(text, starts[last], indent) and last - at < 8:
            last += 1
        body = starts[at + 1]
        return (body, starts[last] - 1) if last > at + 1 else None

    def deeper(self, text: str, start: int, indent: int) -> bool:
        """Whether the line at ``start`` is blank or indented more than ``indent``."""
        line = text[start : text.find("\n", start)]
        return not line.strip() or len(line) - len(line.lstrip()) > indent

    def infill(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[float]]:
        """The sample in CodeGen2's format; each piece is encoded alone, as it is when a model is asked."""
        ids: list[int] = []
        answer: list[int] = []
        at = 0
        for mask, (begin, end) in zip(self.masks, spans, strict=False):
            ids += [*TOKENIZER.encode(text[at:begin]), mask]
            answer += [mask, *TOKENIZER.encode(text[begin:end]), self.eom]
            at = end
        ids += [*TOKENIZER.encode(text[at:]), self.end, self.sep]
        return ids + answer, [1.0] * len(ids) + [MIDDLE_WEIGHT] * len(answer)


def known_ids(files: list[tuple[str, str]], sampler: Sampler) -> list[int]:
    """The ids that training may meet, sorted: those of the corpus as it stands and as samples cut it."""
    seen = Counter(i for ids in TOKENIZER.encode_batch([text for _, text in files]) for i in ids)
    for _ in range(600):
        seen.update(sampler.row()[0])
    seen.update([*sampler.masks, sampler.end, sampler.sep, sampler.eom, *range(256)])
    return sorted(seen)


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


def build(vocabulary: int) -> LlamaForCausalLM:
    """The model over a compact vocabulary."""
    torch.manual_seed(0)
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


def learning_rate(elapsed: float, budget: float, step: int) -> float:
    """A share of the peak: warm-up by steps, then level, then a straight decay over the budget's last quarter."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = max(0.0, budget - elapsed) / (budget * DECAY_SHARE)
    return warm * min(1.0, max(0.02, left))


def train(folder: Path, hours: float, seed: int) -> None:
    """Train until ``hours`` of CPU time are spent in all, from the latest checkpoint on."""
    folder.mkdir(parents=True, exist_ok=True)
    files = library_files()
    ids_file, state_file = folder / "ids.json", folder / "state.pt"
    if not ids_file.exists():
        ids_file.write_text(json.dumps(known_ids(files, Sampler(files, seed + 1))))
    ids = json.loads(ids_file.read_text())
    compact = torch.full((VOCAB_SIZE,), 0, dtype=torch.long)
    compact[torch.tensor(ids)] = torch.arange(len(ids))
    model = build(len(ids))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=MATRIX_LR)
    adam = torch.optim.AdamW(others, lr=EMBEDDING_LR, betas=(0.9, 0.98), weight_decay=0.01)
    step, elapsed, curve = 0, 0.0, []
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        step, elapsed, curve = state["step"], state["elapsed"], state["curve"]
    print(f"{len(files)} files, {len(ids)} ids, step {step}, {elapsed / 3600:.2f} h so far", flush=True)
    sampler = Sampler(files, seed * 1_000_003 + step)
    draw = torch.Generator().manual_seed(seed + step)
    started, saved, losses = time.process_time() - elapsed, time.monotonic(), []
    budget = hours * 3600
    while (elapsed := time.process_time() - started) < budget:
        rate = learning_rate(elapsed, budget, step)
        for optimizer, peak in ((muon, MATRIX_LR), (adam, EMBEDDING_LR)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        rows = [sampler.row() for _ in range(BATCH)]
        tokens = compact[torch.tensor([r[0] for r in rows])]
        weights = torch.tensor([r[1] for r in rows])[:, 1:]
        # The softmax costs more than the layers: of the context's tokens only a share is asked for.
        chosen = (weights.flatten() > 1) | (torch.rand(weights.numel(), generator=draw) < CONTEXT_LOSS_SHARE)
        weights, targets = weights.flatten()[chosen], tokens[:, 1:].flatten()[chosen]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)[chosen]
            logits = model.lm_head(hidden)
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        heavy = weights > 1
        losses.append(
            (loss.detach().mean().item(), loss.detach()[heavy].mean().item() if heavy.any() else float("nan"))
        )
        (loss * weights).sum().div(weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            every, middles = (sum(x) / len(x) for x in zip(*losses, strict=True))
            curve.append((step, round(elapsed), round(every, 4), round(middles, 4)))
            print(f"step {step} {elapsed:.0f} s loss {every:.3f} middles {middles:.3f} rate {rate:.2f}", flush=True)
            losses = []
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            save(state_file, model, muon, adam, step, elapsed, curve)
    save(state_file, model, muon, adam, step, elapsed, curve)


def save(file: Path, model: Any, muon: Any, adam: Any, step: int, elapsed: float, curve: list[Any]) -> None:
    """Publish a checkpoint whole."""
    state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
    temporary = file.with_suffix(".tmp")
    torch.save(state | {"step": step, "elapsed": elapsed, "curve": curve}, temporary)
    temporary.replace(file)


def export(folder: Path, output: Path) -> None:
    """Write config and bf16 safetensors over all 51,200 ids."""
    ids = json.loads((folder / "ids.json").read_text())
    state = torch.load(folder / "state.pt")
    small = build(len(ids))
    small.load_state_dict(state["model"])
    model = LlamaForCausalLM(config(VOCAB_SIZE))
    weights = dict(small.state_dict())
    rows = weights["model.embed_tokens.weight"]
    rare = rows[torch.argsort(rows.norm(dim=1))[: len(ids) // 10]].mean(dim=0)
    full = rare.repeat(VOCAB_SIZE, 1)
    full[torch.tensor(ids)] = rows
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = full
    model.load_state_dict(weights)
    model.config.eos_token_id = TOKENIZER.special_id("<|endoftext|>")
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.to(torch.bfloat16).save_pretrained(output)
    facts = {"steps": state["step"], "tokens": state["step"] * BATCH * CONTEXT, "cpu_hours": state["elapsed"] / 3600}
    (output / "training.json").write_text(json.dumps(facts | {"curve": state["curve"]}))
    draw_curve(state["curve"], output / "loss.svg")


def draw_curve(curve: list[tuple[int, int, float, float]], file: Path) -> None:
    """The loss over the steps, as a small picture."""
    from matplotlib.figure import Figure

    steps, _, every, middles = zip(*curve, strict=True)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, every, label="asked tokens")
    axes.plot(steps, middles, label="middles and <eom>")
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", ylim=(2, 6))
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """Train or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.export:
        export(options.checkpoints, options.output)
    else:
        train(options.checkpoints, options.hours, options.seed)


if __name__ == "__main__":
    main()
