"""Initial weights that depend on a seed and a parameter's name, and on nothing else.

Every parameter has its own generator, so a model starts the same on every rank and layout, whatever was drawn before,
and adding a layer does not change the others.
"""

from __future__ import annotations

import hashlib
import sys
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from race_dist import checks


class Drawn(nn.Module):
    """A module that says how its own parameters start (not those of its children)."""

    @abstractmethod
    def initial(self) -> dict[str, float | Tensor]:
        """For each own parameter: the standard deviation of the normal draw, or the values themselves."""


def initialize(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill the parameters of every :class:`Drawn` in ``module``; those on the meta device are left alone.

    Args:
        module: to fill in place.
        seed: ``0 <= seed < 2**64``.
        prefix: put before the parameters' names.
    """
    checks.instance("module", module, nn.Module)
    seed = checks.integer("seed", seed, minimum=0, maximum=2**64 - 1)
    checks.instance("prefix", prefix, str)
    for path, child in module.named_modules(prefix=prefix):
        if isinstance(child, Drawn):
            for name, how in child.initial().items():
                _fill(child.get_parameter(name), how, seed, f"{path}.{name}")


@torch.no_grad()
def _fill(parameter: Tensor, how: float | Tensor, seed: int, name: str) -> None:
    if parameter.is_meta:
        return
    if isinstance(how, Tensor):
        copy_local_shard(parameter, how.expand(parameter.shape))
        return
    copy_local_shard(parameter, seeded_normal(parameter.shape, how, seed, name))


def seeded_normal(shape: Sequence[int], std: float, seed: int, name: str) -> Tensor:
    """Normal numbers that depend on seed and name alone, float32 on the CPU: a rank that holds a part cuts it out."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu").normal_(0, std, generator=generator)


@torch.no_grad()
def copy_local_shard(parameter: Tensor, values: Tensor) -> None:
    """Copy the values, or this rank's part of them where the parameter is sharded."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
            values = values[tuple(slice(start, start + size) for start, size in zip(offset, shape))]
            parameter = parameter.to_local()
    parameter.copy_(values)


class Linear(nn.Linear, Drawn):
    """``nn.Linear`` without a bias whose weight starts normal with standard deviation ``in_features**-0.5 * gain``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        gain: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.gain = checks.number("gain", gain, minimum=0)
        in_features = checks.integer("in_features", in_features, minimum=1, maximum=2**40)
        out_features = checks.integer("out_features", out_features, minimum=1, maximum=2**40)
        checks.size(2, in_features=in_features, out_features=out_features)
        checks.factory_kwargs(device, dtype)
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Nothing: :func:`initialize` fills the weight."""

    def initial(self) -> dict[str, float | Tensor]:
        return {"weight": self.gain * self.in_features**-0.5}


class Embedding(nn.Embedding, Drawn):
    """``nn.Embedding`` whose weight starts normal with standard deviation ``std``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.std = checks.number("std", std, minimum=0)
        num_embeddings = checks.integer("num_embeddings", num_embeddings, minimum=1, maximum=2**40)
        embedding_dim = checks.integer("embedding_dim", embedding_dim, minimum=1, maximum=2**40)
        checks.size(2, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        checks.factory_kwargs(device, dtype)
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Nothing: :func:`initialize` fills the weight."""

    def initial(self) -> dict[str, float | Tensor]:
        return {"weight": self.std}
