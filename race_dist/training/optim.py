"""AdamW with weight decay on linear layers only, and the learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from race_dist.training.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two parameter groups: weight decay applies to the matrices of linear layers, and not to norms, embeddings,
    convolutions, the sharpness beta, decay rates and planes. With ``planes_lr`` the planes have their own group, whose
    ``scale`` is the ratio of ``planes_lr`` to ``lr``."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # includes a tied head
    trained = [p for p in model.parameters() if p.requires_grad]
    planes = (
        set()
        if config.planes_lr is None
        else {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] == "planes"}
    )
    decayed = [p for p in trained if id(p) in linear - embedded]
    undecayed = [p for p in trained if id(p) not in (linear - embedded) | planes]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    if config.planes_lr is not None:
        scale = config.planes_lr / config.lr
        groups.append(
            {"params": [p for p in trained if id(p) in planes], "weight_decay": 0.0, "lr": config.planes_lr, "scale": scale}
        )
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step ``0 <= step < steps``: linear warm-up, then cosine decay to
    ``lr * final_lr`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps + 1) / (steps - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, times the group's ``scale``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's states by name, ``optim.NAME.exp_avg`` and so on: the tensors themselves, to save or to fill.

    They are created here if no step has been made yet.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors |= {f"optim.{name}.{kind}": value for kind, value in state.items()}
    return {name: value.detach() for name, value in tensors.items()}
