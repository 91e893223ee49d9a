"""The submodules of a transformers attention module that a RACE layer takes over: projections, and query and key norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")  # Llama, Qwen, Mistral and similar models
FUSED = ("query_key_value", "dense")  # GPT-NeoX
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
INHERITED_MODULES = (*SEPARATE, *FUSED, *(name for pair in NORMS for name in pair))
# buffers of rotary positions, which belong to the model
POSITION_BUFFERS = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")


@dataclass(frozen=True)
class Projections:
    """The submodules of one attention module and their widths.

    Attributes:
        names: names of the projections: :data:`SEPARATE` or :data:`FUSED`.
        norms: names of the query norm and the key norm, or None.
        heads, kv_heads: numbers of query heads and of key/value heads.
        head_dim: width of a head.
    """

    names: tuple[str, ...]
    norms: tuple[str, str] | None
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, attention: nn.Module, config: Any, where: str) -> Projections:
        """The projections of a module in a model with this (text) configuration; ``where`` names it in errors.

        Raises:
            ValueError: the module is of an unknown kind, its projections have other widths than the configuration, or it
                has a parameter or buffer that belongs to none of these submodules.
        """
        names = next((kind for kind in (SEPARATE, FUSED) if all(hasattr(attention, part) for part in kind)), None)
        if names is None:
            raise ValueError(
                f"{where} is of an unknown kind: it needs the projections {', '.join(SEPARATE)} or {', '.join(FUSED)}"
            )
        norms = next((pair for pair in NORMS if all(_is_norm(getattr(attention, name, None)) for name in pair)), None)
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads) if names is SEPARATE else heads
        head_dim = next(
            (int(n) for n in (getattr(attention, name, None) for name in ("head_dim", "head_size")) if isinstance(n, int)),
            config.hidden_size // heads,
        )
        found = cls(names, norms, heads, kv_heads, head_dim)
        found._check_widths(attention, where)
        found._check_parameters(attention, where)
        return found

    def _check_widths(self, attention: nn.Module, where: str) -> None:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        wanted = {"query_key_value": 3 * q} if self.names is FUSED else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        for name, width in wanted.items():
            own = getattr(getattr(attention, name), "out_features", width)
            if own != width:
                raise ValueError(
                    f"{where}: {name} has {own} output features, but {self.heads} query heads and "
                    f"{self.kv_heads} key/value heads of width {self.head_dim} need {width}: the meaning "
                    "of the other features is unknown (a gate, wider values); leave this layer out of layers"
                )

    def _check_parameters(self, attention: nn.Module, where: str) -> None:
        """Raise ValueError unless every parameter and buffer of the module is in a submodule that is taken over."""
        parts = (*self.names, *(self.norms or ()))
        known = {id(t) for name in parts for t in _tensors(getattr(attention, name)).values()}
        left = [
            name
            for name, t in _tensors(attention).items()
            if id(t) not in known and name.rsplit(".", 1)[-1] not in POSITION_BUFFERS
        ]
        if left:
            raise ValueError(
                f"{where} has parameters that a RACE layer would drop: {', '.join(left)}; leave this layer out of "
                "layers (it stays softmax)"
            )

    def project(self, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, Hq * D]``, keys and values ``[B, T, Hkv * D]`` of ``x [B, T, dim]``, after their norms."""
        if self.names is FUSED:
            made = attention.get_submodule("query_key_value")(x).unflatten(-1, (self.heads, 3, self.head_dim)).unbind(3)
            q, k, v = (t.flatten(2) for t in made)
        else:
            q, k, v = (attention.get_submodule(name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        if self.norms is not None:
            q, k = (self._normed(attention.get_submodule(name), t) for name, t in zip(self.norms, (q, k), strict=True))
        return q, k, v

    def output(self, attention: nn.Module, y: Tensor) -> Tensor:
        """The output projection: ``[B, T, Hq * D]`` to ``[B, T, dim]``."""
        projected: Tensor = attention.get_submodule(self.names[-1])(y)
        return projected

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Apply a norm over all heads (OLMo 2), over each head (Qwen, Cohere), or a list with one norm per head (StableLM).
        ``x`` and the result are ``[B, T, H * D]``."""
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() == x.shape[-1] != self.head_dim:
            result: Tensor = norm(x)
            return result
        x = x.unflatten(-1, (-1, self.head_dim))
        if isinstance(getattr(norm, "norms", None), nn.ModuleList):
            return norm(x.transpose(1, 2)).transpose(1, 2).flatten(2)
        return norm(x).flatten(2)


def _is_norm(part: object) -> bool:
    return isinstance(part, nn.Module) and not isinstance(part, nn.Identity)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
