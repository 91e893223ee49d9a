"""A short causal depthwise convolution whose carry is the tail of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from race_dist import checks
from race_dist.nn.init import Drawn


class ShortConv(Drawn):
    """``y[t, c] = sum_i weight[i, c] * x[t - width + 1 + i, c]``, within a document.

    Args:
        channels: of ``x``.
        width: taps, the last of which is the token itself; its carry is the ``width - 1`` tokens before.
    """

    def __init__(
        self, channels: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        channels, width = checks.integer("channels", channels, minimum=1), checks.integer("width", width, minimum=1)
        checks.size(2, channels=channels, width=width)
        checks.factory_kwargs(device, dtype)
        self.weight = torch.nn.Parameter(torch.empty(width, channels, device=device, dtype=dtype))

    def initial(self) -> dict[str, float | Tensor]:
        return {"weight": 0.5 * self.weight.shape[0] ** -0.5}

    def forward(self, extended: Tensor, documents: Tensor | None = None) -> Tensor:
        """
        Args:
            extended: ``[B, width - 1 + T, channels]``: the tail, then the piece.
            documents: ``[width - 1 + T]`` document of each of these, or None where all are of one.

        Returns:
            ``[B, T, channels]``.
        """
        return short_conv(extended, self.weight, documents)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, width={self.weight.shape[0]}"


def short_conv(extended: Tensor, weight: Tensor, documents: Tensor | None = None) -> Tensor:
    """:meth:`ShortConv.forward` with taps ``weight [width, channels]``."""
    width = weight.shape[0]
    length = extended.shape[1] - width + 1
    y = weight[-1] * extended[:, width - 1 :]
    for tap in range(width - 1):
        x = extended[:, tap : tap + length]
        if documents is not None:
            same = documents[tap : tap + length] == documents[width - 1 :]
            x = torch.where(same[:, None], x, 0)
        y = y + weight[tap] * x
    return y
