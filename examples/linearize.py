"""Linearize a softmax model on two CPU cores: train a small Llama on text, convert it to RACE, and distill it.

    python examples/linearize.py --out docs/benchmarks/linearize.json

There are three phases. The softmax teacher is trained on bytes of the Python standard library. Its layers are converted (with
--softmax-every 4 every fourth layer stays softmax) and trained on the outputs of the teacher's layers. Then the whole student
is trained on the teacher's predictions and the text. The baseline is a converted student that is trained on the text alone,
for as many tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from race_dist.integrations.transformers import convert, freeze_all_but, from_pretrained, trained_parts
from race_dist.integrations.transformers.distill import layer_loss, prediction_loss
from race_dist.training.data.corpus import load_corpus

WIDTH, LAYERS, HEADS, KV_HEADS = 128, 4, 4, 2


class Text:
    """Batches of bytes from a text; the same seed gives the same batch."""

    def __init__(self, path: str, batch: int, length: int) -> None:
        self.corpus, self.batch, self.length = load_corpus(path), batch, length

    def train(self, seed: int) -> Tensor:
        """``[batch, length + 1]`` int64."""
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.corpus.train) - self.length - 1, (self.batch,), generator=draw)
        return self._windows(self.corpus.train, starts.tolist())

    def held_out(self, windows: int) -> Tensor:
        """``windows`` windows, evenly spaced over the held-out text."""
        side = self.corpus.held_out
        step = (len(side) - self.length - 1) // windows
        return self._windows(side, [n * step for n in range(windows)])

    def _windows(self, side: Any, starts: list[int]) -> Tensor:
        rows = [torch.from_numpy(side.read(start, self.length + 1).copy()) for start in starts]
        return torch.stack(rows).long()


@torch.no_grad()
def bits_per_byte(model: Any, text: Text, windows: int = 64) -> float:
    """The model's bits per byte on held-out text."""
    model.eval()
    total = 0.0
    for rows in text.held_out(windows).split(text.batch):
        logits = model(rows[:, :-1], use_cache=False).logits
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    model.train()
    return total / (windows * text.length) / math.log(2)


def fit(
    model: Any, loss_of: Callable[[Tensor], Tensor], text: Text, *, steps: int, rate: float, seed: int, every: int, label: str
) -> list[dict[str, Any]]:
    """Train the parameters with requires_grad by AdamW; return one record per ``every`` steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    records, began = [], time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20) * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
        loss = loss_of(text.train(seed + step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % every == 0 or step in (1, steps):
            records.append({"step": step, "loss": float(loss.detach()), "bits_per_byte": bits_per_byte(model, text)})
            print(
                f"{label:>12} {step:5d}/{steps}  loss {records[-1]['loss']:.4f}  held out "
                f"{records[-1]['bits_per_byte']:.3f} bits/byte  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return records


def language_loss(model: Any) -> Callable[[Tensor], Tensor]:
    """The loss of next-byte prediction on the text."""

    def loss(rows: Tensor) -> Tensor:
        logits = model(rows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    return loss


def taught(student: Any, teacher: Any, share: float) -> Callable[[Tensor], Tensor]:
    """The distillation loss: ``share`` of the divergence from the teacher's predictions, the rest cross-entropy on the text."""

    def loss(rows: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(rows[:, :-1], use_cache=False).logits
        return prediction_loss(student(rows[:, :-1], use_cache=False).logits, target, rows[:, 1:], share=share)

    return loss


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run all phases and return the figures."""
    torch.manual_seed(0)
    text = Text(options.data, options.batch, options.length)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=352,
        max_position_embeddings=4 * options.length,
    )
    teacher = LlamaForCausalLM(config).train()
    report: dict[str, Any] = {
        "command": " ".join(["python examples/linearize.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "options": vars(options) | {"out": str(options.out)},
        "phases": {},
    }
    phases, every = report["phases"], options.every
    phases["teacher"] = fit(
        teacher, language_loss(teacher), text, steps=options.teacher_steps, rate=3e-3, seed=0, every=every, label="teacher"
    )
    teacher.eval()
    layers = [n for n in range(LAYERS) if not options.softmax_every or (n + 1) % options.softmax_every]
    student = convert(copy.deepcopy(teacher), layers=layers).train()
    untaught = copy.deepcopy(student)
    report["converted, untrained"] = bits_per_byte(student, text)
    freeze_all_but(student, trained_parts(student))
    phases["layers"] = fit(
        student,
        lambda rows: layer_loss(teacher, student, {"input_ids": rows[:, :-1]}),
        text,
        steps=options.layer_steps,
        rate=3e-3,
        seed=10**6,
        every=every,
        label="layers",
    )
    student.requires_grad_(True)
    phases["predictions"] = fit(
        student,
        taught(student, teacher, options.share),
        text,
        steps=options.steps,
        rate=1e-3,
        seed=2 * 10**6,
        every=every,
        label="predictions",
    )
    phases["without a teacher"] = fit(
        untaught,
        language_loss(untaught),
        text,
        steps=options.layer_steps + options.steps,
        rate=1e-3,
        seed=10**6,
        every=every,
        label="no teacher",
    )
    if options.save is not None:
        student.save_pretrained(options.save)
        again = from_pretrained(options.save)
        report["read back"] = bits_per_byte(again, text)
    return report


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot the curves and save them as an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    phases = report["phases"]
    start = phases["layers"][-1]["step"]
    curves = (
        ("layer outputs (MSE)", phases["layers"], 0, "#9bb8d3"),
        ("predictions (KL + CE)", phases["predictions"], start, "#c8502d"),
        ("the same steps without a teacher", phases["without a teacher"], 0, "#8a8a8a"),
    )
    for label, records, offset, color in curves:
        axes.plot(
            [offset + r["step"] for r in records],
            [r["bits_per_byte"] for r in records],
            label=label,
            color=color,
            marker="o",
            markersize=3,
        )
    axes.axhline(
        phases["teacher"][-1]["bits_per_byte"], color="#444444", linewidth=0.9, linestyle="--", label="the softmax teacher"
    )
    axes.set(xlabel="step after conversion", ylabel="bits per byte, held out", title="From softmax to RACE by distillation")
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)
    figure.savefig(path)


def main() -> None:
    """Parse the command line and run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-stdlib", help="a text file, a folder, or python-stdlib")
    parser.add_argument("--length", type=int, default=256, help="bytes per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--layer-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=250, help="steps on the teacher's predictions")
    parser.add_argument("--share", type=float, default=0.5, help="weight of the teacher's predictions in the loss, 0 to 1")
    parser.add_argument("--softmax-every", type=int, default=4, help="every N-th layer stays softmax; 0: none does")
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--save", type=Path, help="folder to save the student in")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; an image is written next to it")
    options = parser.parse_args()
    report = run(options)
    if options.out is not None:
        options.out.write_text(
            json.dumps(report | {"options": report["options"] | {"save": str(options.save)}}, indent=1) + "\n", encoding="utf-8"
        )
        draw(report, options.out.with_suffix(".png"))
        print(f"written: {options.out} and {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
