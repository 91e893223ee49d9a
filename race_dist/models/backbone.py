"""The stack of blocks shared by all models: embedding, blocks, last norm, and the carry of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from race_dist import checks
from race_dist.models.config import ModelConfig
from race_dist.nn import Embedding, LayerCarry, Linear, RMSNorm, Sequence, initialize, kinds_in, layer_kind, registered_kinds
from race_dist.nn.norm import compute_dtype


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, dim: int, width: int, *, output_gain: float = 1.0, **where: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(dim, width, **where), Linear(dim, width, **where)
        self.down_proj = Linear(width, dim, gain=output_gain, **where)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A mixing layer and a SwiGLU, each after an RMS norm and added to its input."""

    def __init__(self, config: ModelConfig, layer: int, *, causal: bool, **where: Any) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps, **where)
        gain = (2 * config.num_layers) ** -0.5
        kind = layer_kind(config.layer_kinds[layer])
        self.mixer = kind.build(config, layer, causal=causal, output_gain=gain, init_weights=False, **where)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps, **where)
        self.ffn = SwiGLU(config.dim, config.resolved_ffn_dim, output_gain=gain, **where)

    def forward(self, x: Tensor, carry: Any, sequence: Sequence) -> tuple[Tensor, Any]:
        """``x [B, T, dim]`` to the same, and the mixing layer's carry."""
        y, carry = self.mixer(self.mixer_norm(x), carry, sequence)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), carry


@dataclass(frozen=True)
class ModelCarry:
    """The carry of a model from one piece of a sequence to the next.

    Attributes:
        layers: one carry per block.
        position: int64: the number of tokens of the open document that have been seen: 0-dimensional, or ``[B]`` after a piece
            with a key_mask, counting the real tokens of each row.
    """

    layers: tuple[LayerCarry, ...]
    position: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Every layer's tensors, then the position."""
        return (*(t for layer in self.layers for t in layer.tensors()), self.position)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A carry made of ``tensors``, in the order of :meth:`tensors`."""
        layers, start = [], 0
        for layer in self.layers:
            stop = start + len(layer.tensors())
            layers.append(layer.with_tensors(tuple(tensors[start:stop])))
            start = stop
        return type(self)(tuple(layers), tensors[start])


def _from_leaves(leaves: tuple[Any, ...]) -> ModelCarry:
    return ModelCarry(leaves[:-1], leaves[-1])


pytree.register_pytree_node(
    ModelCarry,
    lambda c: ([*c.layers, c.position], None),
    lambda leaves, _: _from_leaves(tuple(leaves)),
    serialized_type_name="race_dist.ModelCarry",
)


class Backbone(nn.Module):
    """Embedding, blocks and a last norm.

    Args:
        config: of the model.
        causal: whether a token reads only itself and the tokens before it.
        device, dtype: of the parameters.

    Raises:
        ValueError: a layer reads in another direction than the model.
    """

    def __init__(
        self, config: ModelConfig, *, causal: bool, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        checks.instance("config", config, ModelConfig, f"{name}(ModelConfig(...))")
        _check_direction(name, config, causal)
        where = checks.factory_kwargs(device, dtype)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim, std=0.02, **where)
        self.blocks = nn.ModuleList(Block(config, i, causal=causal, **where) for i in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps, **where)

    def initialize(self, seed: int | None = None) -> None:
        """Fill the weights from ``seed`` (None: ``config.seed``) and their names, so that they are the same on every rank."""
        initialize(self, self.config.seed if seed is None else seed)

    def zero_carry(self, batch: int, *, dtype: torch.dtype | None = None, state_dtype: torch.dtype | None = None) -> ModelCarry:
        """The carry of no tokens.

        Args:
            batch: rows.
            dtype: of convolution tails, keys and values; None: the weights'.
            state_dtype: of sketches; None: float32, or float64 for float64 weights. Token-by-token decoding needs float64.
        """
        weight, batch = self.embed.weight, checks.integer("batch", batch, minimum=0)
        for name, given in (("dtype", dtype), ("state_dtype", state_dtype)):
            if given is not None:
                checks.dtype(name, given)
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype, "state_dtype": state_dtype}
        layers = tuple(block.mixer.zero_carry(batch, **options) for block in self._blocks())
        return ModelCarry(layers, torch.zeros((), dtype=torch.int64, device=weight.device))

    def hidden(
        self,
        input_ids: Tensor,
        carry: ModelCarry | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        key_mask: Tensor | None = None,
        group: ProcessGroup | None = None,
        layout: str = "contiguous",
        return_carry: bool = True,
    ) -> tuple[Tensor, ModelCarry | None]:
        """The hidden states after the last norm, and the carry.

        Args:
            input_ids: ``[B, T]`` int: this rank's tokens.
            carry: the carry before the sequence (under a group the same on every rank), or None.
            cu_seqlens: ``[N + 1]`` int: the boundaries of packed documents in the whole sequence (B = 1). The first document
                continues the carry; it is empty where that document had ended.
            key_mask: ``[B, T]`` bool, False for padding, which may stand anywhere. A False token is absent: real tokens and the
                carry are those of the sequence without it. Its hidden state is 0 and has no gradient. Under a group either
                every rank gives a mask or none does.
            group: the ranks that each hold a shard of the sequence.
            layout: the order of the shards, "contiguous" or "zigzag".
            return_carry: whether to compute the outgoing carry; otherwise None is returned in its place.

        Returns:
            ``h [B, T, dim]`` and the carry after the whole sequence.
        """
        if carry is not None:
            checks.instance("carry", carry, ModelCarry, "make it with zero_carry")
            if len(carry.layers) != len(self.blocks):
                raise ValueError(f"carry is of a model of {len(carry.layers)} layers; this one has {len(self.blocks)}")
        x, sequence = self.embed_inputs(
            input_ids,
            0 if carry is None else carry.position,
            cu_seqlens=cu_seqlens,
            key_mask=key_mask,
            group=group,
            layout=layout,
            return_carry=return_carry,
        )
        layers = []
        for i, block in enumerate(self._blocks()):
            before = None if carry is None else carry.layers[i]
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x, after = checkpoint(block, x, before, sequence, use_reentrant=False, preserve_rng_state=False)
            else:
                x, after = block(x, before, sequence)
            layers.append(after)
        h = self.norm(x)
        if key_mask is not None:
            h = torch.where(key_mask[..., None], h, 0)
        if not return_carry:
            return h, None
        return h, ModelCarry(tuple(layers), sequence.end_position(None if carry is None else carry.position))

    def embed_inputs(
        self,
        input_ids: Tensor,
        position: Tensor | int = 0,
        *,
        cu_seqlens: Tensor | None = None,
        key_mask: Tensor | None = None,
        group: ProcessGroup | None = None,
        layout: str = "contiguous",
        return_carry: bool = True,
    ) -> tuple[Tensor, Sequence]:
        """The input of the first block: embedded tokens ``[B, T, dim]``, and their sequence.

        Args:
            position: of the first token.
            input_ids, cu_seqlens, key_mask, group, layout, return_carry: as for :meth:`hidden`.
        """
        self._check_shapes(input_ids, key_mask, cu_seqlens)
        if key_mask is not None:
            input_ids = torch.where(key_mask, input_ids, 0)  # padding may hold any value
        check_ids("input_ids", input_ids, self.config.vocab_size)
        sequence = Sequence.of(
            input_ids.shape[1],
            cu_seqlens=cu_seqlens,
            key_mask=key_mask,
            group=group,
            layout=layout,
            position=position,
            return_carry=return_carry,
            device=input_ids.device,
        )
        x = self.embed(input_ids)
        return x, sequence.with_rotations(self._rotation_kinds(), compute_dtype(x))

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    def _rotation_kinds(self) -> set[tuple[int, float]]:
        """(head_dim, base) of every mixing layer with rotary positions."""
        kinds = set()
        for block in self._blocks():
            if block.mixer.rope_base is not None:
                kinds.add((block.mixer.head_dim, block.mixer.rope_base))
        return kinds

    def _check_shapes(self, input_ids: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        checks.tensor("input_ids", input_ids)
        if self.embed.weight.is_meta:
            raise ValueError(
                "the model is on the meta device, where its weights have no values: give them some with "
                "model.to_empty(device=...) and model.initialize()"
            )
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int [B, T]; got {input_ids.dtype} {list(input_ids.shape)}")
        checks.cu_seqlens(cu_seqlens, batch=input_ids.shape[0])
        if key_mask is not None:
            checks.tensor("key_mask", key_mask)
        if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != input_ids.shape):
            raise ValueError(
                f"key_mask must be bool {list(input_ids.shape)} like input_ids; got {key_mask.dtype} {list(key_mask.shape)}"
            )
        if key_mask is not None and key_mask.device != input_ids.device:
            raise ValueError(f"key_mask is on {key_mask.device} but input_ids is on {input_ids.device}: move one of them")


def _check_direction(name: str, config: ModelConfig, causal: bool) -> None:
    """Raise ValueError where a layer reads in another direction than the model."""
    for kind in kinds_in(config.layer_kinds):
        if kind.is_causal(config) in (None, causal):
            continue
        if kind.direction == "config":
            options = f"{kind.options_name}={type(kind.options(config)).__name__}(causal={causal}, ...)"
            raise ValueError(f"{name} needs {kind.options_name}.causal = {causal}: make it with {options}")
        others = " and ".join(other.letter for other in registered_kinds() if other.direction != "causal")
        raise ValueError(
            f"{name} reads in both directions, but a {kind.letter} layer is causal: "
            f"layer_pattern = {config.layer_pattern!r} may hold {others}"
        )


def check_ids(name: str, ids: Tensor, vocab_size: int, bound: str = "vocab_size") -> None:
    """Raise ValueError for ids outside the vocabulary (or ``bound``), where reading them does not wait for a device."""
    if not checks.readable(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} must be from 0 to {bound} - 1 = {vocab_size - 1}; got {low if low < 0 else high}")
