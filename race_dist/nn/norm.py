"""Root-mean-square norms in float32 (float64 for float64), also under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from race_dist import checks
from race_dist.nn.initialization import InitialValue, SeededModule


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2) + eps)`` over the last dimension, in the compute dtype."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class RMSNorm(SeededModule):
    """``rms(x) * weight`` in the dtype of ``x``.

    Args:
        *shape: of the weight. The mean is taken over the last dimension only, so ``RMSNorm(H, D)`` is one norm per head.
        eps: added to the mean square.
    """

    def __init__(
        self, *shape: int, eps: float = 1e-6, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not shape:
            raise ValueError("RMSNorm needs the shape of its weight, at least one number; got none")
        shape = tuple(checks.integer("shape", n, minimum=1, maximum=2**40) for n in shape)
        checks.factory_kwargs(device, dtype)
        self.eps = checks.number("eps", eps, minimum=0)
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def initial_values(self) -> dict[str, InitialValue]:
        return {"weight": torch.ones(())}

    def forward(self, x: Tensor) -> Tensor:
        """``[..., *shape]`` to the same."""
        return (rms(x, self.eps) * self.weight.to(compute_dtype(x))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, eps={self.eps:g}"
