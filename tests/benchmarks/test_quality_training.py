"""The quality benchmark's baselines, tasks and runs, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from race_dist.benchmarks.quality.language import Language, bits_by_token
from race_dist.benchmarks.quality.mixers import BASELINE_MIXERS, gated_delta, gated_linear
from race_dist.benchmarks.quality.protocol import Pairs, Protocol, Run, load_protocol
from race_dist.benchmarks.quality.recall import Recall, make_batch
from race_dist.benchmarks.quality.variants import build_model, hidden
from race_dist.benchmarks.quality.worker import train
from race_dist.cli import app
from race_dist.nn import RaceConfig, Sequence

CPU, F64 = torch.device("cpu"), torch.float64
CONFIGS = Path(__file__).parents[2] / "configs" / "quality"


def step_by_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, write: Tensor | None) -> Tensor:
    """The recurrence, token by token."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(q.shape[2]):
        state = log_decay[:, :, t, None, None].exp() * state
        new = v[:, :, t]
        if write is not None:
            new = write[:, :, t, None] * (new - (k[:, :, t, None] @ state)[..., 0, :])
        state = state + k[:, :, t, :, None] * new[..., None, :]
        out.append((q[:, :, t, None] @ state)[..., 0, :])
    return torch.stack(out, 2)


@pytest.mark.parametrize("length", [1, 16, 37])
def test_baselines_compute_their_recurrence(length: int) -> None:
    q, k = torch.randn(2, 2, 3, length, 5, dtype=F64)
    k, v = F.normalize(k, dim=-1), torch.randn(2, 3, length, 4, dtype=F64)
    log_decay, write = -torch.rand(2, 3, length, dtype=F64), torch.rand(2, 3, length, dtype=F64)
    torch.testing.assert_close(gated_linear(q, k, v, log_decay, chunk=8), step_by_step(q, k, v, log_decay, None))
    torch.testing.assert_close(gated_delta(q, k, v, log_decay, write, chunk=8), step_by_step(q, k, v, log_decay, write))


@pytest.mark.parametrize("name", BASELINE_MIXERS)
def test_baselines_are_causal_and_train_every_parameter(name: str) -> None:
    layer = BASELINE_MIXERS[name](RaceConfig(dim=16, num_heads=2, conv_values=True, num_tables=2, num_planes=2), dtype=F64)
    x = torch.randn(2, 70, 16, dtype=F64)
    y, carry = layer(x)
    assert carry is None
    changed = x.clone()
    changed[:, 40:] += 1
    torch.testing.assert_close(layer(changed)[0][:, :40], y[:, :40])
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with pytest.raises(ValueError, match="whole unpadded sequences"):
        layer(x, None, Sequence.of(70, key_mask=torch.ones(2, 70, dtype=torch.bool)))


def test_sequences_of_recall_hold_each_pair_and_ask_for_it_once() -> None:
    kind = Pairs(length=64, pairs=8)
    ids, places, values = make_batch(kind, 50, 512, 0.01, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 64)
    keys = ids[:, 0:16:2]
    assert bool(((keys >= 1) & (keys < 256)).all())
    assert torch.equal(ids[:, 1:16:2], values)
    assert bool(((values >= 256) & (values < 512)).all())
    for row in range(50):
        assert len(set(keys[row].tolist())) == len(set(values[row].tolist())) == len(set(places[row].tolist())) == 8
        assert torch.equal(ids[row, places[row]], keys[row])  # the query is the key whose value is the target
    assert bool(((places >= 16) & (places < 64) & (places % 2 == 0)).all())
    near = (places < 16 + 8).double().mean()
    assert near > 2 * 8 / 48  # short distances are more likely than under a uniform distribution


def test_recall_measures_what_a_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_protocol(CONFIGS / "mqar.toml", ["model.dim=16", "recall.examples=10", "batch_size=2"])
    task = Recall(loaded, Run(loaded.variant[0], 1e-3, 0), CPU)
    model = build_model(loaded, loaded.variant[0], 0)

    def knows(model: object, h: Tensor, places: Tensor) -> Tensor:
        return F.one_hot(known.pop(0), 8192).float()

    generator = torch.Generator().manual_seed(2**31)
    known = []
    for kind in task.task.test:
        size, done = max(1, min(10, 2 * 256 // kind.length)), 0
        while done < 10:
            known.append(make_batch(kind, min(size, 10 - done), 8192, 0.01, generator)[2])
            done += size
    known[0] = torch.zeros_like(known[0])
    monkeypatch.setattr("race_dist.benchmarks.quality.recall.answers", knows)
    monkeypatch.setattr(model, "hidden", lambda ids, return_carry: (None, None))
    rows = task.measure(model)["by_kind"]
    assert [row["accuracy"] for row in rows[1:]] == [1.0] * (len(rows) - 1)
    assert rows[0]["accuracy"] < 1


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abcdefghij klmnop " * 400)
    return path


def tiny(text: Path, **changes: object) -> Protocol:
    return Protocol.check(
        {
            "name": "tiny",
            "steps": 30,
            "batch_size": 4,
            "precision": "float32",
            "optim": {"warmup_steps": 3},
            "rates": [1e-2],
            "language": {"path": str(text), "context": 32, "eval_tokens": 256, "positions": 4},
            "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "window": 8},
            "variant": [
                {"name": "RW, conv", "model": {"layer_pattern": "RW", "softmax": {"short_conv": 3, "output_gate": True}}},
                {"name": "planes", "model": {"race": {"train_planes": True, "num_planes": 2}}, "planes_lr": 0.1},
                {"name": "delta", "mixer": "gated_delta"},
            ],
        }
        | changes
    )


def test_bits_per_byte_are_those_of_the_model(text: Path) -> None:
    p = tiny(text)
    model = build_model(p, p.variant[0], 0)
    task = Language(p, Run(p.variant[0], 1e-2, 0), CPU)
    windows = task.batch(0)[0]
    expected = model(windows[:, :-1], windows[:, 1:].contiguous()) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(bits_by_token(model, windows).mean().float(), expected.detach())
    torch.testing.assert_close(
        hidden(model, windows[:, :-1], Sequence.of(32, return_carry=False)),
        model.hidden(windows[:, :-1], return_carry=False)[0],
    )
    measured = task.measure(model)
    assert measured["bits_per_byte"] == pytest.approx(sum(measured["by_position"]) / 4, abs=1e-3)


def test_training_learns_and_depends_on_the_seed_alone(text: Path) -> None:
    p = tiny(text)
    result = train(p, Run(p.variant[0], 1e-2, 0), CPU)
    assert result["curve"][-1][1] < 0.7 * result["curve"][0][1]
    assert result["task"]["passes"] == pytest.approx(30 * 4 * 32 / 6480, rel=0.02)
    again, other = train(p, Run(p.variant[0], 1e-2, 0), CPU), train(p, Run(p.variant[0], 1e-2, 1), CPU)
    assert again["bits_per_byte"] == result["bits_per_byte"] != other["bits_per_byte"]


def test_a_loss_that_is_no_number_is_a_failure(text: Path) -> None:
    p = tiny(text, optim={"warmup_steps": 0, "clip": 0.0}, variant=[{"name": "S", "model": {"layer_pattern": "S"}}])
    assert "the loss is NaN or Inf" in train(p, Run(p.variant[0], 1e30, 0), CPU)["failed"]


def test_the_command_goes_on_where_it_was(text: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.toml", tmp_path / "out" / "tiny.json"
    config.write_text(
        f'name = "tiny"\nsteps = 3\nbatch_size = 2\nprecision = "float32"\noptim = {{ warmup_steps = 1 }}\n'
        f'language = {{ path = "{text}", context = 16, eval_tokens = 64 }}\n'
        "model = { dim = 16, num_layers = 2, num_heads = 2, ffn_dim = 16, window = 4 }\n"
        '[[variant]]\nname = "R"\n[[variant]]\nname = "delta, conv"\nmixer = "gated_delta"\n'
    )
    command = ["bench", "quality", str(config), "--out", str(out), "--device", "cpu", "--threads", "1"]
    first = CliRunner().invoke(app, [*command, "--variant", "R"])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(app, [*command, "--jobs", "2"])
    assert second.exit_code == 0, second.output
    assert "1 runs are in" in second.output
    data = json.loads(out.read_text())
    assert [(row["variant"], row["machine"]) for row in data["runs"]] == [("R", 0), ("delta, conv", 1)]
    assert data["machines"][1]["side_by_side"] == 2
    assert out.with_suffix(".md").read_text().count("| R |") == 1
    wrong = CliRunner().invoke(app, [*command, "-o", "stepz=3"])
    assert wrong.exit_code == 2
    assert "did you mean steps?" in wrong.output


def test_a_failed_run_ends_no_other(text: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "p.toml", tmp_path / "p.json"
    config.write_text(
        f'name = "p"\nsteps = 2\nbatch_size = 2\nprecision = "float32"\noptim = {{ warmup_steps = 1 }}\n'
        f'parameters = 20000\nlanguage = {{ path = "{text}", context = 16, eval_tokens = 64 }}\n'
        "model = { dim = 16, num_layers = 1, num_heads = 2 }\n"
        '[[variant]]\nname = "too large"\nmodel = { dim = 64 }\n[[variant]]\nname = "fits"\n'
    )
    done = CliRunner().invoke(app, ["bench", "quality", str(config), "--out", str(out), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    rows = {row["variant"]: row for row in json.loads(out.read_text())["runs"]}
    assert "raise it or make the model smaller" in rows["too large"]["failed"]
    assert rows["fits"]["bits_per_byte"] > 0
