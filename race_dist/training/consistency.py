"""The check that all ranks of a run have the same code, configuration, text, weights and planes before it starts."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

import race_dist
from race_dist.parallel import check_same_on_all_ranks
from race_dist.training.config import TrainConfig
from race_dist.training.data.splits import Corpus

_HEAD = 4096  # elements of each tensor that are compared


def check_ranks_consistent(config: TrainConfig, corpus: Corpus, model: nn.Module, group: ProcessGroup | None) -> None:
    """Raise ValueError on every rank, naming the ranks and what differs, unless all ranks are set up for the same run."""
    if group is None:
        return
    check_same_on_all_ranks(
        {
            "the code": f"race-dist {race_dist.__version__} ({code_digest()[:12]})",
            "torch": torch.__version__,
            "the configuration": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
            "the text": corpus.digest()[:12],
            "the initial weights": tensors_digest(model.named_parameters())[:12],
            "the planes": tensors_digest(model.named_buffers())[:12],
        },
        group,
        what="the run",
    )


def code_digest() -> str:
    """SHA-256 of the package's source files, wherever its parts are installed."""
    digest = hashlib.sha256()
    for package in ("race_dist", "race_dist.kernels"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for root in map(Path, spec.submodule_search_locations or ()):
            for file in sorted(root.rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes, dtypes and the first elements of each tensor. The elements of sharded tensors differ between
    ranks and do not count."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if isinstance(tensor.detach(), DTensor):
            continue
        head = tensor.detach().reshape(-1)[:_HEAD].cpu().contiguous()
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
