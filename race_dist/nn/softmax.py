"""Softmax attention beside RACE, through PyTorch's own kernels: what its layers share, and the one that sees all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from race_dist import checks
from race_dist.nn.calls import check_layer_call, check_zero_carry
from race_dist.nn.config import SoftmaxConfig
from race_dist.nn.conv import ShortConv
from race_dist.nn.convolve import ConvolvedCarry, apply_short_convs
from race_dist.nn.gate import apply_output_gate
from race_dist.nn.init import Linear, initialize
from race_dist.nn.norm import compute_dtype
from race_dist.nn.rope import rotate
from race_dist.nn.sequence import Sequence
from race_dist.nn.tail import TailCarry

WIDEST = 2**31 - 1


class SoftmaxOptions(TypedDict, total=False):
    """Keyword options of :class:`SoftmaxAttention`."""

    head_dim: int | None
    rope_base: float | None
    config: SoftmaxConfig
    output_gain: float
    init_weights: bool
    seed: int
    device: torch.device | str | None
    dtype: torch.dtype | None


class SoftmaxAttention(nn.Module):
    """Projections and rotary positions of a softmax layer; :class:`WindowAttention` and :class:`FullAttention` say what
    a token sees.

    Args:
        dim: width of input and output.
        num_heads, num_kv_heads: query heads, and key/value heads that divide them.
        head_dim: width ``D`` of a head; None: ``dim // num_heads``.
        rope_base: base of the rotary positions, or None.
        config: convolution and gate.
        output_gain: of the initial weight of the output projection.
        init_weights: whether to fill the weights now, from ``seed``; False leaves that to the caller.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        config: SoftmaxConfig | None = None,
        output_gain: float = 1.0,
        init_weights: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = (
            checks.integer("dim", dim, minimum=1, maximum=WIDEST),
            checks.integer("num_heads", num_heads, minimum=1),
        )
        num_kv_heads = checks.integer("num_kv_heads", num_kv_heads, minimum=1)
        head_dim = None if head_dim is None else checks.integer("head_dim", head_dim, minimum=1, maximum=WIDEST)
        rope_base = None if rope_base is None else checks.number("rope_base", rope_base, above=1)
        checks.number("output_gain", output_gain, minimum=0)
        checks.flag("init_weights", init_weights)
        checks.integer("seed", seed, minimum=0, maximum=2**64 - 1)
        checks.factory_kwargs(device, dtype)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads = {num_heads} must be a multiple of num_kv_heads = {num_kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim = {dim} is no multiple of num_heads = {num_heads}: change one or set head_dim")
        if rope_base is not None and (head_dim or dim // num_heads) % 2:
            raise ValueError(
                f"rotary positions need an even head_dim; got {head_dim or dim // num_heads}: change it or set rope_base=None"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        self.rope_base = rope_base
        self.config = (
            SoftmaxConfig()
            if config is None
            else checks.instance("config", config, SoftmaxConfig, "make it with SoftmaxConfig(...)")
        )
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, width, device=device, dtype=dtype)
        self.k_proj = Linear(dim, kv_width, device=device, dtype=dtype)
        self.v_proj = Linear(dim, kv_width, device=device, dtype=dtype)
        self.o_proj = Linear(width, dim, gain=output_gain, device=device, dtype=dtype)
        taps = self.config.short_conv
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_proj = Linear(dim, width, **where) if self.config.output_gate else None
        self.q_conv, self.k_conv = (ShortConv(n, taps, **where) if taps else None for n in (width, kv_width))
        self.v_conv = ShortConv(kv_width, taps, **where) if self.config.conv_values else None
        if init_weights:
            initialize(self, seed, type(self).__name__)

    def heads(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, Hq, D]``, keys and values ``[B, T, Hkv, D]``, convolution and positions applied."""
        return self._heads(sequence.real(x), None, sequence)[0]

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        """``[B, T, dim]`` of the heads' outputs ``[B, T, Hq, D]`` and the layer's input."""
        y = out.flatten(2)
        if self.gate_proj is not None:
            y = apply_output_gate(y, self.gate_proj(x), self.config.gate_activation)
        return self.o_proj(y)

    def _parted(self, carry: Any) -> tuple[Any, TailCarry | None]:
        """A carry as the layer's own and the convolutions' tail."""
        return (carry.inner, carry.tail) if isinstance(carry, ConvolvedCarry) else (carry, None)

    def _joined(self, inner: Any, tail: TailCarry | None) -> Any:
        """The inverse."""
        return inner if inner is None or tail is None else ConvolvedCarry(inner, tail)

    def _zero_tail(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> TailCarry | None:
        """The convolutions' tail of no tokens; None without convolutions."""
        if not self.config.short_conv:
            return None
        convolved = (self.num_heads, self.num_kv_heads, *([self.num_kv_heads] if self.config.conv_values else []))
        inputs = tuple(torch.zeros(batch, 0, heads * self.head_dim, device=device, dtype=dtype) for heads in convolved)
        return TailCarry.empty(inputs, self.config.short_conv - 1)

    def _heads(
        self, x: Tensor, tail: TailCarry | None, sequence: Sequence
    ) -> tuple[tuple[Tensor, Tensor, Tensor], TailCarry | None]:
        """:meth:`heads` of a piece that continues ``tail``, and the outgoing tail."""
        flat, tail = apply_short_convs(
            (self.q_proj(x), self.k_proj(x), self.v_proj(x)), (self.q_conv, self.k_conv, self.v_conv), tail, sequence
        )
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in flat)
        if self.rope_base is not None:
            cos, sin = sequence.rotation(self.head_dim, self.rope_base, compute_dtype(x))
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        return (q, k, v), tail


@dataclass(frozen=True)
class HistoryCarry:
    """Every key and value so far: the carry of full softmax. It grows with the sequence, so it serves decoding only.

    Attributes:
        keys, values: ``[B, n, Hkv, D]``.
        visible: ``[B, n]`` bool: False for padding and for documents that have ended.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor

    def zero(self) -> Self:
        """The history of no tokens."""
        return self.with_tensors(tuple(t[:, :0] for t in self.tensors()))

    def combine(self, later: Self) -> Self:
        """This history followed by ``later``."""
        checks.instance("later", later, HistoryCarry)
        pairs = zip(self.tensors(), later.tensors(), strict=True)
        return self.with_tensors(tuple(torch.cat([a.to(b.dtype), b], 1) for a, b in pairs))

    def tensors(self) -> tuple[Tensor, ...]:
        """``(keys, values, visible)``."""
        return self.keys, self.values, self.visible

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A history made of ``tensors``, in the order of :meth:`tensors`."""
        return type(self)(*tensors)


pytree.register_pytree_node(
    HistoryCarry,
    lambda h: ([h.keys, h.values, h.visible], None),
    lambda leaves, _: HistoryCarry(*leaves),
    serialized_type_name="race_dist.HistoryCarry",
)


FullCarry = HistoryCarry | ConvolvedCarry[HistoryCarry]


class FullAttention(SoftmaxAttention):
    """Each token sees all tokens before it (all tokens, if not ``causal``): quadratic time, a carry that grows.

    Under a group every rank gathers the keys and values of all.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, *, causal: bool = True, **options: Unpack[SoftmaxOptions]
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, **options)
        self.causal = checks.flag("causal", causal)

    def zero_carry(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
    ) -> FullCarry:
        """The carry of no tokens, keys and values in ``dtype`` (there is no other state)."""
        batch = check_zero_carry(batch, device, dtype, state_dtype)
        carry: FullCarry = self._joined(self._no_history(batch, device, dtype), self._zero_tail(batch, device, dtype))
        return carry

    def _no_history(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> HistoryCarry:
        k = torch.zeros(batch, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        return HistoryCarry(k, k, torch.zeros(batch, 0, device=device, dtype=torch.bool))

    def forward(
        self, x: Tensor, carry: FullCarry | None = None, sequence: Sequence | None = None
    ) -> tuple[Tensor, FullCarry | None]:
        """``x [B, T, dim]`` to the same, and the outgoing carry."""
        check_layer_call(
            self,
            x,
            carry,
            sequence,
            dim=self.q_proj.in_features,
            like=self.q_proj.weight,
            kind=ConvolvedCarry if self.config.short_conv else HistoryCarry,
        )
        sequence = sequence or Sequence.alone(x, carry, self.rope_base)
        x = sequence.real(x)
        history, tail = self._parted(carry)
        (q, k, v), tail = self._heads(x, tail, sequence)
        plain = history is None and sequence.group is None and sequence.cu_seqlens is None and sequence.key_mask is None
        history = self._no_history(x.shape[0], x.device, v.dtype) if history is None else history
        real = sequence.key_mask if sequence.key_mask is not None else k.new_ones(x.shape[:2], dtype=torch.bool)
        whole = history.combine(HistoryCarry(*(sequence.gather(t) for t in (k, v, real))))
        queries, keys, values = (t.transpose(1, 2) for t in (q, whole.keys, whole.values))
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if plain else self._mask(sequence, history, whole),
            is_causal=plain and self.causal,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        out = out.transpose(1, 2)
        if sequence.key_mask is not None:
            out = torch.where(sequence.key_mask[..., None, None], out, 0)  # padding gets nothing and has no gradient
        y = self.output(out, x)
        return y, self._joined(self._outgoing(sequence, history, whole), tail) if sequence.return_carry else None

    def _mask(self, sequence: Sequence, carry: HistoryCarry, whole: HistoryCarry) -> Tensor:
        """``[B, 1, T, n + total]`` bool. A query always sees its own key, so that no row is empty."""
        before, device = carry.visible.shape[1], whole.visible.device
        row = before + sequence.rows()[:, None]
        column = torch.arange(whole.visible.shape[1], device=device)
        seen = column <= row if self.causal else torch.ones_like(column <= row)
        if sequence.cu_seqlens is not None:
            document = torch.searchsorted(sequence.cu_seqlens[1:-1].clone(), column - before, right=True)
            seen = seen & (document[row] == document)
        return (seen & whole.visible[:, None] | (column == row))[:, None]

    @staticmethod
    def _outgoing(sequence: Sequence, carry: HistoryCarry, whole: HistoryCarry) -> HistoryCarry:
        if sequence.cu_seqlens is None or sequence.cu_seqlens.numel() == 2:
            return whole
        column = torch.arange(whole.visible.shape[1], device=whole.visible.device) - carry.visible.shape[1]
        return HistoryCarry(whole.keys, whole.values, whole.visible & (column >= sequence.cu_seqlens[-2]))
