"""Sequence parallelism of transformers models: losses, gradients, HF's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_ranks, spawn_ranks
from tests.integrations.hf_models import build, tokens

F64 = torch.float64


def make(mode: str) -> Any:
    from race_dist.integrations.transformers import convert

    if mode == "implementation":
        return build("qwen3", implementation="race", dtype=F64).train()
    rope = mode == "inherited"
    return convert(build("llama", dtype=F64), inherit_rope=rope, race={"decay": "none" if rope else "token"}).train()


def batch(kind: str) -> dict[str, torch.Tensor]:
    rows = 1 if kind == "packed" else 2
    ids = tokens(rows, 2 if kind == "short" else 24)
    whole = {"input_ids": ids, "labels": ids.masked_fill(ids < 20, -100)}
    if kind == "packed":
        whole["position_ids"] = torch.cat([torch.arange(n) for n in (8, 12, 4)])[None]
    if kind == "inside":  # without position_ids
        mask = (tokens(rows, 24, seed=5) > 40).long()
        whole |= {"attention_mask": mask, "labels": whole["labels"].masked_fill(mask == 0, -100)}
    if kind == "short":  # fewer tokens than ranks: some shards are empty
        whole |= {"attention_mask": torch.ones_like(ids), "labels": ids}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        whole |= {
            "attention_mask": mask,
            "labels": whole["labels"].masked_fill(mask == 0, -100),
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        }
    return whole


def loss_and_gradients(group: Any, mode: str, kind: str, layout: str, checkpointing: bool = False) -> dict[str, Any]:
    """The loss and gradients of the whole batch: the shares of the ranks, summed."""
    from race_dist.integrations.transformers import sequence_parallel, shard_batch
    from tests.integrations.test_transformers_models import checkpoint

    model = make(mode)
    sequence_parallel(model, group, layout=layout)
    if checkpointing:
        checkpoint(model)
    loss = model(**shard_batch(batch(kind), group, layout=layout), use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
    for x in found.values():
        if group is not None:
            dist.all_reduce(x, group=group)
    return found


@pytest.mark.parametrize(
    ("kind", "layout", "world"),
    [
        ("plain", "contiguous", 2),
        ("plain", "zigzag", 3),
        ("packed", "contiguous", 3),
        ("packed", "zigzag", 2),
        ("padded", "contiguous", 2),
        ("padded", "zigzag", 2),
        ("inside", "contiguous", 2),
        ("inside", "zigzag", 2),
        ("short", "contiguous", 3),
    ],
)
@pytest.mark.parametrize("mode", ["implementation", "converted", "inherited"])
def test_shares_add_up_to_the_loss_and_gradients_of_one_rank(mode: str, kind: str, layout: str, world: int) -> None:
    expected = loss_and_gradients(None, mode, kind, "contiguous")
    for found in run_ranks(world, loss_and_gradients, mode, kind, layout, checkpointing=mode == "converted"):
        for name, value in expected.items():
            # transformers computes its loss in float32 for every dtype of the model
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_of_one_rank_is_that_of_transformers() -> None:
    from race_dist.integrations.transformers import shard_batch

    model, whole = make("converted"), batch("padded")
    torch.testing.assert_close(model(**shard_batch(whole, None), use_cache=False).loss, model(**whole, use_cache=False).loss)


@pytest.mark.parametrize("mode", ["implementation", "converted", "inherited"])
def test_padding_inside_a_row_has_the_loss_of_the_rows_without_it(mode: str) -> None:
    model, whole = make(mode), batch("inside")
    total, count = 0.0, 0
    for row in range(2):
        real = whole["attention_mask"][row].bool()
        ids, labels = whole["input_ids"][row, real][None], whole["labels"][row, real][None]
        targets = int((labels[:, 1:] != -100).sum())
        total, count = total + float(model(ids, labels=labels, use_cache=False).loss.detach()) * targets, count + targets
    mine = {name: x for name, x in whole.items() if name != "labels"} | shifted(whole)
    assert float(model(**mine, use_cache=False).loss.detach()) == pytest.approx(total / count, abs=1e-6)


def shifted(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The target of each real token is the next real token."""
    targets = torch.full_like(whole["labels"], -100)
    for row, mask in enumerate(whole["attention_mask"].bool()):
        targets[row, mask] = torch.nn.functional.pad(whole["labels"][row, mask][1:], (0, 1), value=-100)
    return {"labels": whole["labels"], "shift_labels": targets}


def wrong(group: Any, what: str) -> None:
    from race_dist.integrations.transformers import sequence_parallel, shard_batch

    if what == "softmax":
        sequence_parallel(build("llama"), group)
    model = build("llama", implementation="race", num_hidden_layers=1 + (what == "models" and dist.get_rank(group)))
    sequence_parallel(model, group)
    if what == "switched":
        model.set_attn_implementation("sdpa")
    whole = batch("packed" if what == "positions" else "plain")
    if what == "rows":
        shard_batch(whole | {"position_ids": torch.cat([torch.arange(8), torch.arange(16)])[None]}, group)
    mine = shard_batch(whole, group)
    if what == "labels":
        mine.pop("shift_labels")
    if what == "positions":
        mine.pop("cu_seq_lens_q")
    if what == "cache":
        from transformers import DynamicCache

        mine["past_key_values"] = DynamicCache()
    model(**mine)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("softmax", r"layers \[0, 1\] are softmax attention"),
        ("models", "the ranks do not agree on the model"),
        ("labels", "labels of a shard need shift_labels"),
        ("rows", "must be in one row; got 2 rows"),
        ("positions", "position_ids restart inside a shard"),
        ("switched", "was changed to 'sdpa' after sequence_parallel was called"),
        ("cache", "decoding over a shared sequence"),
    ],
)
def test_batches_that_cannot_be_sharded_are_refused(what: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(2, wrong, what)


def train(group: Any, folder: str, sp: int) -> dict[str, Any]:
    """Train a converted model on 12 rows with HF's Trainer; ``sp`` ranks share each row."""
    from transformers import Trainer, TrainingArguments

    from race_dist.integrations.transformers import sequence_parallel_trainer
    from race_dist.parallel import build_mesh

    rows = [{"input_ids": x, "labels": x.masked_fill(x < 5 + 3 * n, -100)} for n, x in enumerate(tokens(12, 24))]
    world = dist.get_world_size()
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=sp if world > 1 else 2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        num_train_epochs=2,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        gradient_accumulation_steps=1,
    )
    model = make("converted").float()
    options = {"train_dataset": rows, "eval_dataset": rows[:4], "data_collator": stack}
    if sp > 1:
        trainer = sequence_parallel_trainer()(model, arguments, group=build_mesh(world // sp, sp)["sp"].get_group(), **options)
    else:
        trainer = Trainer(model, arguments, **options)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {
        "losses": losses,
        "eval": trainer.evaluate()["eval_loss"],
        "weights": [float(p.detach().double().norm()) for p in model.parameters()],
        "accelerate": accelerated(rows, build_mesh(1, world)["sp"].get_group()),
    }


def accelerated(rows: list[dict[str, torch.Tensor]], group: Any) -> list[float]:
    """The weights after an accelerate loop in which all ranks share each batch of two rows."""
    from accelerate import Accelerator

    from race_dist.integrations.transformers import ShardedLoader, sequence_parallel
    from race_dist.parallel import group_size

    accelerator, model = Accelerator(cpu=True), make("converted").float()
    sequence_parallel(model, group)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=stack)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), loader)
    for batch in ShardedLoader(loader, group):
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss * group_size(group))  # DDP averages over the ranks, but shares must be summed
        optimizer.step()
        optimizer.zero_grad()
    return [float(p.detach().double().norm()) for p in model.parameters()]


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_the_trainer_has_the_same_losses_when_ranks_share_sequences(tmp_path: Path) -> None:
    (alone,) = spawn_ranks(1, train, str(tmp_path / "1"), 1, timeout=60.0)
    assert alone.error is None, alone.error
    both = spawn_ranks(2, train, str(tmp_path / "2"), 2, timeout=60.0)
    for outcome in both:
        assert outcome.error is None, outcome.error
        assert len(outcome.value["losses"]) == len(alone.value["losses"]) == 12
        for name, value in alone.value.items():
            assert outcome.value[name] == pytest.approx(value, abs=2e-4), name
    assert alone.value["losses"][-1] < alone.value["losses"][0]
