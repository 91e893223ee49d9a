"""Run megatron-core on machines without a GPU, although it asks CUDA for devices and random states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from megatron.core.fusions import fused_softmax
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _CpuForCuda(TorchFunctionMode):
    """Create on the CPU what is requested on CUDA. This mode does not apply in backward passes; the patches below do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)  # megatron-core's optimizer asserts this name
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


@contextmanager
def without_cuda() -> Iterator[None]:
    """Let megatron-core run on the CPU inside the block. Where CUDA is available this does nothing.

    For tests and training runs without a GPU. Models need ``use_cpu_initialization=True`` and no dropout.
    """
    if torch.cuda.is_available():
        yield
        return
    standing_in: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda.random, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "current_stream", lambda *_: None),
        (megatron_random, "_lazy_call", lambda *_, **__: None),
        (fused_softmax, "get_default_causal_mask", lambda size: torch.ones(size, size, dtype=torch.bool).triu(1)),
    ]
    before = [(target, name, getattr(target, name)) for target, name, _ in standing_in]
    try:
        for target, name, value in standing_in:
            setattr(target, name, value)
        with _CpuForCuda():
            yield
    finally:
        for target, name, value in before:
            setattr(target, name, value)
