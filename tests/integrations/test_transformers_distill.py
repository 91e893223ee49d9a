"""Distillation: the values of the two losses, and that training on them works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from race_dist.integrations.transformers import RaceSelfAttention, convert, freeze_all_but, trained_parts
from race_dist.integrations.transformers.distill import layer_loss, prediction_loss
from tests.integrations.hf_models import build, tokens

ROOT = Path(__file__).parents[2]


def test_layer_loss_is_one_for_zero_outputs_and_zero_for_the_teachers_outputs() -> None:
    teacher, student = build("llama"), convert(build("llama"), layers=[1])
    layer = next(m for m in student.modules() if isinstance(m, RaceSelfAttention))
    batch = {"input_ids": tokens(2, 12)}
    with torch.no_grad():
        layer.o_proj.weight.zero_()
    assert layer_loss(teacher, student, batch).item() == pytest.approx(1, abs=1e-6)
    layer.forward = lambda x, **_: (
        teacher.model.layers[1].self_attn(  # type: ignore[method-assign]
            x, position_embeddings=teacher.model.rotary_emb(x, torch.arange(12)[None]), attention_mask=None
        )[0],
        None,
    )
    assert layer_loss(teacher, student, batch).item() == pytest.approx(0, abs=1e-10)


def test_padding_plays_no_part_in_the_layer_loss() -> None:
    teacher, student = build("llama"), convert(build("llama"))
    ids = tokens(1, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = layer_loss(teacher, student, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(padded, layer_loss(teacher, student, {"input_ids": ids[:, 5:]}), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_nan_of_the_teacher_is_ignored_at_padding_and_an_error_elsewhere(side: str) -> None:
    teacher, student = build("llama", dtype=torch.float64), convert(build("llama", dtype=torch.float64))
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, {"left": slice(0, 5), "right": slice(7, 12), "inside": slice(3, 8)}[side]] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = layer_loss(teacher, student, {"input_ids": ids[:, mask[0].bool()]})
    last = teacher.model.layers[1].self_attn
    for where, refused in ((mask == 0, False), (mask == 1, True)):
        nan = lambda _module, _args, out, where=where: (out[0].masked_fill(where[..., None], torch.nan), out[1])
        handle = last.register_forward_hook(nan)
        if refused:
            with pytest.raises(ValueError, match="the teacher's hidden states at layer 1 hold NaN"):
                layer_loss(teacher, student, batch)
        else:
            torch.testing.assert_close(layer_loss(teacher, student, batch), expected, atol=1e-6, rtol=1e-6)
        handle.remove()


def test_training_on_layer_loss_changes_race_layers_only_and_lowers_the_loss() -> None:
    teacher, student = build("llama"), convert(build("llama"), layers=[0])
    freeze_all_but(student, trained_parts(student))
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = {"input_ids": tokens(4, 24)}, []
    for _ in range(30):
        loss = layer_loss(teacher, student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    trained = {n for n, p in student.named_parameters() if p.grad is not None}
    assert trained
    assert all(name.startswith("model.layers.0.self_attn.") for name in trained)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_prediction_loss_is_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, theirs = (torch.randn(2, 5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(7, (2, 5), generator=draw)
    targets[0, 3:] = -100
    counts = targets != -100
    p, q = (x[counts].div(2.0).softmax(-1) for x in (theirs, logits))
    divergence = (p * (p / q).log()).sum(-1).mean() * 4
    entropy = -logits[counts].log_softmax(-1).gather(1, targets[counts][:, None]).mean()
    found = prediction_loss(logits, theirs, targets, temperature=2.0, share=0.25)
    torch.testing.assert_close(found.double(), 0.25 * divergence + 0.75 * entropy, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"share from 0 to 1; got 1\.0 and 2"):
        prediction_loss(logits, theirs, targets, share=2)


def test_a_model_without_race_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="the student has no RACE layer"):
        layer_loss(build("llama"), build("llama"), {"input_ids": tokens(1, 4)})


@pytest.mark.slow
def test_the_example_runs_and_reads_its_student_back(tmp_path: Path) -> None:
    out = tmp_path / "linearize.json"
    command = [
        sys.executable,
        str(ROOT / "examples/linearize.py"),
        "--teacher-steps",
        "20",
        "--layer-steps",
        "20",
        "--steps",
        "20",
        "--every",
        "20",
        "--length",
        "64",
        "--batch",
        "4",
        "--save",
        str(tmp_path / "student"),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["read back"] == pytest.approx(report["phases"]["predictions"][-1]["bits_per_byte"], abs=1e-6)
    assert report["phases"]["layers"][-1]["loss"] < report["phases"]["layers"][0]["loss"]
    assert out.with_suffix(".png").stat().st_size > 10_000
