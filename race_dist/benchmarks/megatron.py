"""A GPTModel of megatron-core with RACE layers compared with softmax, and the bytes that context parallelism exchanges.

    python -m race_dist.benchmarks.megatron step --out docs/benchmarks/megatron-h100.json
    torchrun --nproc-per-node 2 -m race_dist.benchmarks.megatron bytes --out docs/benchmarks/megatron-bytes.json

``step`` times a whole training step (forward, backward, megatron-core's mixed-precision Adam) and its peak memory, for three
attentions in the same model: RACE, megatron-core's own softmax (the implementation without extensions, which materializes the
matrix of scores) and PyTorch's fused softmax in the same slot. ``bytes`` counts the bytes that a rank passes to collectives for
one layer, forward and backward, compared with the all-to-all of megatron-core's other linear layers for the same heads.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from race_dist import RaceConfig
from race_dist.benchmarks.timing import Timing, time_in_turn
from race_dist.machine import machine_info
from race_dist.models import ModelConfig
from race_dist.parallel import count_bytes

# 92 million parameters in the blocks; a small vocabulary, so that logits do not dominate
BASE = {"vocab_size": 256, "dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 2048}
LENGTHS = (8192, 16384, 32768, 65536, 131072)
ATTENTIONS = ("race", "softmax (fused)", "softmax (megatron-core)")


def model_config(base: dict[str, Any]) -> ModelConfig:
    """The model, with the default RACE layers."""
    return ModelConfig(**base, race=RaceConfig(num_tables=4, num_planes=4), rope_base=None)


# --- a training step ----------------------------------------------------------------------------------------------------


class FusedSoftmax(nn.Module):
    """PyTorch's scaled_dot_product_attention in the core_attention slot."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3).flatten(2)


def build_step(
    name: str, model: ModelConfig, length: int, dtype: torch.dtype, recompute: bool, device: torch.device
) -> Callable[[], None]:
    """One training step of the model with the attention ``name`` over one sequence, with megatron-core's
    DistributedDataParallel, mixed precision and Adam."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from race_dist.integrations.megatron import get_race_block_spec
    from race_dist.integrations.megatron.model import transformer_config

    more: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = transformer_config(
        model, dtype=dtype, **(more if recompute else {}), **({} if name == "race" else {"linear_attention_freq": 1})
    )
    spec = get_race_block_spec(config)
    if name == "softmax (fused)":
        spec = replace(spec, layer_specs=[_with_core(layer, FusedSoftmax) for layer in spec.layer_specs])
    gpt = GPTModel(
        config,
        spec,
        vocab_size=model.vocab_size,
        max_sequence_length=length,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    ).to(device)
    module = Float16Module(config, gpt) if dtype == torch.bfloat16 else gpt
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-4, bf16=dtype == torch.bfloat16, params_dtype=dtype, clip_grad=1.0),
        [ddp],
        use_gloo_process_groups=False,
    )
    ids = torch.randint(model.vocab_size, (1, length), device=device, generator=torch.Generator(device).manual_seed(0))
    positions, labels = torch.arange(length, device=device)[None], ids.roll(-1, 1)

    def step() -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        ddp(ids, positions, None, labels=labels).mean().backward()
        finalize_model_grads([ddp])
        optimizer.step()

    return step


def _with_core(layer: Any, core: type[nn.Module]) -> Any:
    parts = layer.submodules
    attention = parts.self_attention
    submodules = replace(attention.submodules, core_attention=core)
    return replace(layer, submodules=replace(parts, self_attention=replace(attention, submodules=submodules)))


def time_steps(
    base: dict[str, int],
    lengths: tuple[int, ...],
    *,
    dtype: torch.dtype,
    recompute: bool,
    repeats: int,
    slowest: float,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> Iterator[dict[str, Any]]:
    """A row for every attention at every length; an attention is not timed at longer lengths once it runs out of memory or a
    step takes more than ``slowest`` seconds."""
    model, remaining = model_config(base), list(ATTENTIONS)
    for length in lengths:
        for name in tuple(remaining):
            row: dict[str, Any] = {"attention": name, "length": length}
            try:
                row |= _time_one(name, model, length, dtype, recompute, repeats, device)
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            if "out_of_memory" in row or row["step_ms"]["p50"] > 1e3 * slowest:
                remaining.remove(name)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            say(json.dumps(row))
            yield row


def _time_one(
    name: str, model: ModelConfig, length: int, dtype: torch.dtype, recompute: bool, repeats: int, device: torch.device
) -> dict[str, Any]:
    step = build_step(name, model, length, dtype, recompute, device)
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    timing: Timing = time_in_turn({name: step}, device, repeats=repeats, warmup=1)[name]
    row: dict[str, Any] = {"step_ms": timing.json(), "tokens_per_second": round(1e3 * length / timing.p50)}
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return row


# --- bytes of context parallelism ---------------------------------------------------------------------------------------


def bytes_of_race(model: ModelConfig, length: int, cp: int) -> int:
    """Bytes that this rank passes to collectives for one RACE layer's attention, forward and backward, at ``length`` tokens."""
    from megatron.core.transformer.enums import AttnMaskType

    from race_dist.integrations.megatron import RaceCoreAttention
    from race_dist.integrations.megatron.model import transformer_config

    layer = RaceCoreAttention(transformer_config(model, cp=cp), 1, AttnMaskType.causal)
    local, width = length // cp, model.resolved_head_dim
    q, k, v = (
        torch.randn(local, 1, heads, width, requires_grad=True) for heads in (model.num_heads, model.kv_heads, model.kv_heads)
    )
    decay = -torch.rand(local, 1, model.kv_heads)
    with count_bytes() as count:
        layer(q, k, v, None, attention_bias=decay.requires_grad_(True)).sum().backward()
    return count.bytes


def bytes_of_all_to_all(model: ModelConfig, length: int, cp: int) -> int:
    """The same for a linear layer that exchanges tokens for heads by megatron-core's own all-to-all, as its GatedDeltaNet does:
    queries, keys, values, gate and two numbers per head are sent, and the output is sent back."""
    from megatron.core import parallel_state
    from megatron.core.ssm.mamba_context_parallel import _all_to_all_cp2hp, _all_to_all_hp2cp

    group, local = parallel_state.get_context_parallel_group(), length // cp
    width = model.num_heads * model.resolved_head_dim
    sent = torch.randn(local, 1, 4 * width + 2 * model.num_heads, requires_grad=True)
    returned = torch.randn(length, 1, width // cp, requires_grad=True)
    with _counting_all_to_all() as counted:
        _all_to_all_cp2hp(sent, group).sum().backward()
        _all_to_all_hp2cp(returned, group).sum().backward()
    return sum(counted)


@contextmanager
def _counting_all_to_all() -> Iterator[list[int]]:
    counted: list[int] = []
    original = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(input.numel() * input.element_size())
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = counting
    try:
        yield counted
    finally:
        dist.all_to_all_single = original


def count_exchanges(base: dict[str, int], lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per length: bytes that this rank sends for one layer, float32."""
    model, cp = model_config(base), dist.get_world_size()
    return [
        {
            "length": length,
            "ranks": cp,
            "race_bytes": bytes_of_race(model, length, cp),
            "all_to_all_bytes": bytes_of_all_to_all(model, length, cp),
        }
        for length in lengths
    ]


# --- the command --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from race_dist.integrations.megatron.cpu import without_cuda
    from race_dist.parallel import init_distributed, shutdown

    options = _parser().parse_args(arguments)
    base = BASE | {"dim": options.dim, "num_layers": options.layers, "num_heads": options.heads, "ffn_dim": options.ffn}
    device = init_distributed(device=None if options.what == "step" else "cpu")
    with without_cuda():
        parallel_state.initialize_model_parallel(
            context_parallel_size=dist.get_world_size() if options.what == "bytes" else 1, create_gloo_process_groups=False
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        report: dict[str, Any] = {"machine": machine_info(device), "model": base}
        if options.what == "bytes":
            report["rows"] = count_exchanges(base, tuple(options.lengths))
        else:
            report |= {"dtype": options.dtype, "recompute": options.recompute, "rows": []}
            for row in time_steps(
                base,
                tuple(options.lengths),
                dtype=getattr(torch, options.dtype),
                device=device,
                recompute=options.recompute,
                repeats=options.repeats,
                slowest=options.slowest,
            ):
                report["rows"].append(row)
                _write(report, options.out)  # an interrupted run keeps its results
        _write(report, options.out)
        parallel_state.destroy_model_parallel()
    shutdown()


def _write(report: dict[str, Any], out: Path | None) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        text = json.dumps(report, indent=1) + "\n"
        if out is None:
            print(text, end="")
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m race_dist.benchmarks.megatron",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["step", "bytes"])
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=list(LENGTHS))
    for name, default in (("dim", 768), ("layers", 12), ("heads", 12), ("ffn", 2048), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--recompute", action="store_true", help="recompute each layer in the backward pass")
    parser.add_argument(
        "--slowest", type=float, default=5.0, help="seconds per step; slower attentions are not timed at longer lengths"
    )
    parser.add_argument("--out", type=Path, default=None, help="a JSON file; left out: printed")
    return parser


if __name__ == "__main__":
    main()
