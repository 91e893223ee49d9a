"""A plan as JSON, as tables, and as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from race_dist.planning.parameter_counts import parameter_count
from race_dist.planning.plan import Choices, Plan, largest_context

Limits = dict[str, int]
UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def limits(plan: Plan, choices: Choices, budget: float) -> Limits:
    """The largest contexts: by memory alone, and by memory and a step of ``budget`` seconds."""
    return {"memory": largest_context(plan, choices), "time": largest_context(plan, choices, seconds=budget)}


def to_json(plan: Plan, largest: Limits, budget: float) -> dict[str, Any]:
    """Everything, in bytes, seconds and tokens."""
    job, layout, cluster = plan.job, plan.layout, plan.cluster
    return {
        "model": {"parameters": parameter_count(job.model), **job.model.model_dump(mode="json", exclude_defaults=True)},
        "job": {"context": job.context, "batch": job.batch, "precision": job.precision, "compiled": job.compiled},
        "cluster": {
            "gpu": cluster.gpu.name,
            "gpus": cluster.count,
            "gpus_per_node": cluster.per_node,
            "memory": cluster.gpu.memory,
        },
        "layout": {
            "dp": layout.dp,
            "sp": layout.sp,
            "chunk_size": layout.chunk_size,
            "chunks": layout.chunks(job),
            "checkpointing": layout.checkpointing,
            "sharding": layout.sharding,
            "keep": layout.keep,
        },
        "memory": {
            **plan.memory.kinds,
            "peak": plan.memory.peak,
            "available": plan.memory.capacity,
            "host": plan.memory.host,
            "fits": plan.memory.fits,
        },
        "exchange": plan.exchange.bytes,
        "seconds": {**plan.seconds, "step": plan.step},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "largest_context": {**largest, "budget_seconds": budget},
        "rates": plan.rates.source,
        "words": list(words(plan, largest, budget)),
    }


def print_report(plan: Plan, largest: Limits, budget: float, console: Console | None = None) -> None:
    """Tables of memory, time and exchange, then the words."""
    console = console or Console()
    job, cluster, layout = plan.job, plan.cluster, plan.layout
    console.print(
        f"{parameter_count(job.model):,} parameters, {job.batch} x {job.context:,} tokens per step, {job.precision}, on "
        f"{cluster.count} x {cluster.gpu.name}",
        highlight=False,
    )
    console.print("layout: " + _describe_layout(plan).replace("GPU", cluster.unit), highlight=False)
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    if layout.ranks > 1:
        table = _table(f"sent by one {cluster.unit} per step", "bytes")
        for kind, size in plan.exchange.bytes.items():
            if size:
                table.add_row(kind, _bytes(size))
        console.print(table)
    for sentence in words(plan, largest, budget):
        console.print(f"- {sentence}", highlight=False)


def words(plan: Plan, largest: Limits, budget: float) -> Iterator[str]:
    """Sentences about the numbers: does it fit, why this layout, what is the bottleneck, how long can the context be."""
    for sentence in _sentences(plan, largest, budget):
        yield sentence.replace("GPU", plan.cluster.unit)


def _sentences(plan: Plan, largest: Limits, budget: float) -> Iterator[str]:
    yield _fit_sentence(plan)
    yield from _reasons(plan)
    yield _bottleneck_sentence(plan)
    if largest["memory"]:
        yield (
            f"The longest context that fits these GPUs is {_tokens(largest['memory'])}; within a step of "
            f"{_seconds(budget)} it is {_tokens(largest['time']) if largest['time'] else 'none'}."
        )
    yield f"Rates: {plan.rates.source}. Measured ones (--rates FILE) make the times better; memory does not depend on them."


def _fit_sentence(plan: Plan) -> str:
    m = plan.memory
    kinds = {k: v for k, v in m.kinds.items() if k != "optimizer buffers"}
    most = max(kinds, key=lambda k: kinds[k])
    if m.fits:
        return (
            f"It fits: {_bytes(m.peak)} of {_bytes(m.capacity)} per GPU at the peak; most of it is {most} "
            f"({_bytes(kinds[most])})."
        )
    if m.peak <= m.capacity:
        return (
            f"It does not fit: chunk-start states take {_bytes(m.host)} of host memory per GPU, which has "
            f"{_bytes(m.host_capacity)}. Larger chunks leave fewer of them; so do more GPUs or fewer tables."
        )
    return (
        f"It does not fit: {_bytes(m.peak)} per GPU where {_bytes(m.capacity)} are available; most of it is {most} "
        f"({_bytes(kinds[most])}). {_remedy(most, plan)}"
    )


def _remedy(most: str, plan: Plan) -> str:
    standing = sum(plan.memory.kinds[kind] for kind in ("parameters", "gradients", "optimizer states"))
    if standing > 0.7 * plan.memory.capacity:
        return "More memory per GPU, a smaller model or, on several GPUs, --sharding fsdp would help."
    if most == "chunk-start states":
        return "Larger chunks leave fewer of them, and --keep host keeps them out of the GPU."
    if plan.layout.chunk_size is None:
        return "Streaming (--chunk-size) bounds what activations take, whatever the context is."
    if plan.memory.host > plan.memory.host_capacity:
        return "Smaller chunks would leave more states than host memory holds: use more GPUs or fewer tables."
    return "Smaller chunks or --checkpointing would help."


def _reasons(plan: Plan) -> Iterator[str]:
    job, layout = plan.job, plan.layout
    if layout.chunk_size is not None:
        yield (
            f"Streamed in {layout.chunks(job):,} chunks of {layout.chunk(job):,} tokens per rank: activations take the same "
            "memory at any context, gradients are exact, and the blocks' forward pass is computed twice."
        )
    elif layout.checkpointing:
        yield "Not streamed: with each block recomputed in the backward pass, the activations fit at once."
    else:
        yield "Not streamed: all activations fit at once, so nothing is recomputed."
    if layout.chunk_size is not None and layout.checkpointing:
        yield "Checkpointing on top allows larger chunks, for one more forward pass."
    if layout.sp > 1:
        link = plan.cluster.link_name(layout.sp)
        yield (
            f"{layout.sp} ranks share each sequence: what they exchange ({link}) depends on the sketches and not on the "
            "context" + (f"; {layout.dp} such groups share the batch." if layout.dp > 1 else ".")
        )
    if layout.sharding == "fsdp":
        yield "Weights and optimizer states are sharded over the GPUs; each pass over a chunk gathers the weights again."
    if layout.keep == "host" and layout.chunk_size is not None:
        yield f"The states at the chunks' starts wait in host memory ({_bytes(plan.memory.host)} per GPU)."


def _bottleneck_sentence(plan: Plan) -> str:
    part = max(plan.seconds, key=lambda k: plan.seconds[k])
    share = plan.seconds[part] / plan.step
    meaning = {
        "matrix products": "compute-bound: only more or faster GPUs, or a smaller model, make it faster",
        "attention": "the attention is the bottleneck: fewer features (tables, planes) make it faster",
        "element-wise": "bound by memory bandwidth: compiled (fused) element-wise kernels or a wider model use the GPU better",
        "exchange not hidden": "bound by the network: larger chunks exchange less often",
        "optimizer": "bound by the optimizer's memory traffic: more tokens per step hide it",
        "offload not hidden": "bound by the link to the host: larger chunks leave fewer states to move",
        "waiting for the host": "launch-bound: the host launches kernels too slowly for so small a chunk; larger chunks help",
    }[part]
    again = f", {plan.repeats:.2f} times that with recomputation" if plan.repeats > 1 else ""
    return (
        f"{_seconds(plan.step)} per step, {plan.tokens_per_second:,.0f} tokens/s, {plan.mfu:.0%} of the peak in useful "
        f"operations{again}. {share:.0%} of the time is {part}: {meaning}."
    )


def _describe_layout(plan: Plan) -> str:
    job, layout = plan.job, plan.layout
    parts = [f"dp {layout.dp} x sp {layout.sp}"]
    parts.append("not streamed" if layout.chunk_size is None else f"chunk_size {layout.chunk(job):,}")
    parts.append("checkpointing" if layout.checkpointing else "no checkpointing")
    parts.append("fsdp" if layout.sharding == "fsdp" else "weights replicated on each GPU")
    if job.compiled:
        parts.append("blocks compiled")
    if layout.chunk_size is not None:
        parts.append(f"chunk states on the {layout.keep}")
    return ", ".join(parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="none")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _memory_table(plan: Plan) -> Table:
    table = _table(f"memory of one {plan.cluster.unit}", "bytes", "")
    for kind, size in plan.memory.kinds.items():
        if size:
            table.add_row(kind, _bytes(size), "transient" if kind in plan.memory.transient else "")
    table.add_section()
    table.add_row("peak", _bytes(plan.memory.peak), f"of {_bytes(plan.memory.capacity)}")
    if plan.memory.host:
        table.add_row("host memory", _bytes(plan.memory.host), f"of {_bytes(plan.memory.host_capacity)}")
    return table


def _time_table(plan: Plan) -> Table:
    table = _table("time of one step", "seconds", "share")
    for part, seconds in plan.seconds.items():
        if seconds:
            table.add_row(part, _seconds(seconds), f"{seconds / plan.step:.1%}")
    table.add_section()
    table.add_row("step", _seconds(plan.step), f"{plan.tokens_per_second:,.0f} tokens/s")
    return table


def _bytes(size: float) -> str:
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _tokens(count: int) -> str:
    if count >= 2**40:
        return "more than 10^12 tokens"
    for unit, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if count >= unit:
            return f"{count / unit:.1f}{name} tokens"
    return f"{count} tokens"
