"""Initial weights that depend only on a seed and on each parameter's name.

Every parameter has its own random generator. So a model starts with the same weights on every rank and under every layout, and
adding a layer does not change the weights of the others.
"""

from __future__ import annotations

import hashlib
import sys
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from race_dist import checks
from race_dist.nn.head_partition import HeadSlice


class SlicedNormal(NamedTuple):
    """Normal numbers with standard deviation ``std`` in ``shape``, of which a module holds the part of some heads."""

    std: float
    shape: tuple[int, ...]
    part: HeadSlice


InitialValue = float | Tensor | SlicedNormal  # a float: normal numbers with this standard deviation


class SeededModule(nn.Module):
    """A module that defines the initial values of its own parameters (not those of its children)."""

    @abstractmethod
    def initial_values(self) -> dict[str, InitialValue]:
        """The initial value of each own parameter."""


def initialize(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill the parameters of every :class:`SeededModule` in ``module``, except those on the meta device.

    Args:
        module: filled in place.
        seed: ``0 <= seed < 2**64``.
        prefix: of the parameters' names.
    """
    checks.instance("module", module, nn.Module)
    seed = checks.integer("seed", seed, minimum=0, maximum=2**64 - 1)
    checks.instance("prefix", prefix, str)
    for path, child in module.named_modules(prefix=prefix):
        if isinstance(child, SeededModule):
            for name, value in child.initial_values().items():
                _fill(child.get_parameter(name), value, seed, f"{path}.{name}")


@torch.no_grad()
def _fill(parameter: Tensor, value: InitialValue, seed: int, name: str) -> None:
    if parameter.is_meta:
        return
    if isinstance(value, Tensor):
        copy_local_shard(parameter, value.expand(parameter.shape))
    elif isinstance(value, SlicedNormal):
        copy_local_shard(parameter, value.part.stored(seeded_normal(value.shape, value.std, seed, name)))
    else:
        copy_local_shard(parameter, seeded_normal(parameter.shape, value, seed, name))


def seeded_normal(shape: Sequence[int], std: float, seed: int, name: str) -> Tensor:
    """Normal numbers that depend only on the seed and the name, float32 on the CPU, to be sliced where a rank has a part."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu").normal_(0, std, generator=generator)


@torch.no_grad()
def copy_local_shard(parameter: Tensor, values: Tensor) -> None:
    """Copy ``values`` into a parameter, or this rank's shard of them where the parameter is a DTensor."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
            values = values[tuple(slice(start, start + size) for start, size in zip(offset, shape))]
            parameter = parameter.to_local()
    parameter.copy_(values)


class Linear(nn.Linear, SeededModule):
    """``nn.Linear`` without a bias; its initial weight is normal with standard deviation ``in_features**-0.5 * gain``."""

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
        """Do nothing: :func:`initialize` fills the weight."""

    def initial_values(self) -> dict[str, InitialValue]:
        return {"weight": self.gain * self.in_features**-0.5}


class Embedding(nn.Embedding, SeededModule):
    """``nn.Embedding`` whose initial weight is normal with standard deviation ``std``."""

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
        """Do nothing: :func:`initialize` fills the weight."""

    def initial_values(self) -> dict[str, InitialValue]:
        return {"weight": self.std}
