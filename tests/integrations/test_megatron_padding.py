"""Padding is absent in Megatron's layers: masks and padded packing against rows without padding, in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

from race_dist.integrations.megatron import RaceCoreAttention, RaceTransformerConfig

F64 = torch.float64
EXACT = {"atol": 1e-9, "rtol": 1e-9}
OPTIONS: dict[str, dict[str, Any]] = {
    "token": {},
    "multiscale": {"race_decay": "multiscale"},
    "convolution": {"race_decay": "none"},
    "bare": {"race_decay": "none", "race_short_conv": 0, "race_normalization": "global"},
    "bucket": {"race_normalization": "bucket", "race_decay": "multiscale"},
}
MASKS = ["000111111111", "111111100000", "111000110111", "010110011010"]


class World:
    """A pg_collection of one rank without process groups."""

    tp = cp = None


def core(mask_type: AttnMaskType = AttnMaskType.padding_causal, **options: Any) -> RaceCoreAttention:
    settings = RaceTransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        params_dtype=F64,
        use_cpu_initialization=True,
        race_num_tables=2,
        race_num_planes=3,
        **{"race_output_gate": False} | options,
    )
    return RaceCoreAttention(settings, 1, mask_type, pg_collection=World()).double()  # type: ignore[arg-type]


def inputs(rows: int, length: int, options: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    qkv = [torch.randn(length, rows, heads, 8, dtype=F64, generator=draw, requires_grad=True) for heads in (4, 2, 2)]
    decay = -torch.rand(length, rows, 2, dtype=F64, generator=draw)
    return qkv, decay if options.get("race_decay", "token") == "token" else None


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_tokens_are_absent(name: str) -> None:
    layer, (qkv, decay) = core(**OPTIONS[name]), inputs(len(MASKS), 12, OPTIONS[name])
    real = torch.tensor([[bit == "1" for bit in row] for row in MASKS])
    out = layer(*qkv, ~real[:, None, None, :], attention_bias=decay)
    weight = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(2)) * real.T[..., None]
    grads = torch.autograd.grad((out * weight).sum(), qkv)
    for row, keep in enumerate(real):
        own = [x[keep, row : row + 1].detach().requires_grad_() for x in qkv]
        alone = layer(*own, None, attention_bias=None if decay is None else decay[keep, row : row + 1])
        torch.testing.assert_close(out[keep, row : row + 1], alone, **EXACT)
        for got, expected in zip(grads, torch.autograd.grad((alone * weight[keep, row : row + 1]).sum(), own), strict=True):
            torch.testing.assert_close(got[keep, row : row + 1], expected, **EXACT)
            assert not got[~keep, row].any()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("mask", [None, "110111010111"])
def test_padding_of_documents_is_absent(name: str, mask: str | None) -> None:
    """cu_seqlens with padding, without and with a mask."""
    layer, (qkv, decay) = core(**OPTIONS[name]), inputs(1, 12, OPTIONS[name])
    hidden = None if mask is None else torch.tensor([bit == "0" for bit in mask])
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor([0, 3, 7], dtype=torch.int32),
        cu_seqlens_q_padded=torch.tensor([0, 5, 11], dtype=torch.int32),
    )
    out = layer(
        *(x[:, 0] for x in qkv),
        None if hidden is None else hidden[None, None, None],
        attention_bias=decay,
        packed_seq_params=packed,
    )
    for rows in ([0, 1, 2], [5, 6, 7, 8]):
        keep = [row for row in rows if hidden is None or not hidden[row]]
        alone = layer(*(x[keep] for x in qkv), None, attention_bias=None if decay is None else decay[keep])
        torch.testing.assert_close(out[keep], alone[:, 0], **EXACT)


def test_masks_that_would_be_ignored_are_refused() -> None:
    bare = OPTIONS["bare"]
    qkv, _ = inputs(1, 12, bare)
    hidden = torch.zeros(1, 1, 1, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask came with attn_mask_type no_mask"):
        core(AttnMaskType.no_mask, **bare)(*qkv, hidden)
    documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 5, 12], dtype=torch.int32))
    rows = [x[:, 0] for x in qkv]
    causal = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    layer = core(AttnMaskType.causal, **bare)
    told, plain = (layer(*rows, mask, packed_seq_params=documents) for mask in (causal, None))
    torch.testing.assert_close(told, plain)
    with pytest.raises(ValueError, match="hides more or less than the tokens that come later"):
        layer(*rows, causal.index_fill(3, torch.tensor([2]), True), packed_seq_params=documents)
    with pytest.raises(ValueError, match=r"takes a bool mask \[B, 1, 1, T\] = \[1, 1, 1, 12\]"):
        core(**bare)(*rows, causal, packed_seq_params=documents)
    with pytest.raises(ValueError, match=r"has bool \[\.\.\., 12, 12\], or None"):
        core(AttnMaskType.causal, **bare)(*qkv, hidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be from 1"),
        ({"num_layers": True}, "num_layers must be a whole number; got True"),
        ({"num_attention_heads": 3}, "hidden_size = 32 is no multiple of num_attention_heads = 3"),
        ({"num_query_groups": 3}, "num_attention_heads = 4 is no multiple of num_query_groups = 3"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number; got '32'"),
        ({"kv_channels": 7.5}, "kv_channels must be"),
        ({"ffn_hidden_size": -1}, "ffn_hidden_size must be from 1"),
        ({"hidden_dropout": 2}, "hidden_dropout must be at least 0"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon must be above 0"),
        ({"num_layers": 10**30}, "num_layers must be from"),
        ({"linear_attention_freq": True}, "linear_attention_freq is None, N"),
        ({"race_seed": True}, "race_seed must be a whole"),
        ({"linear_attention_freq": [True]}, "linear_attention_freq is None, N"),
        ({"race_num_planes": True}, "race_num_planes must"),
        ({"race_num_tables": 10**30}, "race_num_tables must be at most"),
        ({"race_layout": 3}, "race_layout must be one of"),
        ({"context_parallel_size": 0}, "context_parallel_size must be from 1"),
        ({"attention_dropout": None}, "attention_dropout must"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RaceTransformerConfig(
            **{"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "use_cpu_initialization": True} | options
        )
    assert "\n" not in str(error.value)
