"""Properties of a GPU that decide which kernels run; cached."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@lru_cache
def capability(device: torch.device) -> int:
    """Major compute capability of a CUDA device: 8 (A100, Ada), 9 (Hopper), 10 (Blackwell)."""
    return torch.cuda.get_device_capability(device)[0]


@lru_cache
def has_pipelines(device: torch.device) -> bool:
    """Whether the device runs Hopper's matrix instructions, and Triton has the Gluon that the pipelines are written in."""
    return device.type == "cuda" and capability(device) == 9 and VERSION >= (3, 6)


@lru_cache
def num_sms(device: torch.device) -> int:
    """SMs of the device; 132 (an H100) where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@lru_cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 232_448
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def supports_tma(*tensors: Tensor) -> bool:
    """Whether TMA (Hopper and later) can load these rows: 16-byte strides, unit stride inside a row."""
    if not tensors[0].is_cuda or capability(tensors[0].device) < 9:
        return False
    for x in tensors:  # part of the host time of every call
        size, (b, t, h, d) = x.element_size(), x.stride()
        if d != 1 or min(b, t, h) <= 0 or ((b | t | h | x.shape[3]) * size | x.data_ptr()) % 16 or x.shape[1] >= 2**31:
            return False
    return True
