"""The planner: its counts compared with what PyTorch saves and allocates, its formulas, its sentences."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from race_dist import RaceConfig
from race_dist.cli import app
from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import SoftmaxConfig
from race_dist.parallel.scan import _pick
from race_dist.planning import (
    GPUS,
    Choices,
    Cluster,
    Job,
    Layout,
    Rates,
    find_gpu,
    largest_context,
    layer_cost,
    load_rates,
    make_plan,
    memory,
    parse_count,
    recommend,
)
from race_dist.planning.activation_memory import autocast_weight_bytes
from race_dist.planning.carry_sizes import chunk_start_states, uses_all_gather
from race_dist.planning.clusters import Link
from race_dist.planning.communication_cost import scan_seconds
from race_dist.planning.cost_model import count_passes
from race_dist.planning.memory import activations
from race_dist.planning.parameter_counts import parameter_count
from race_dist.planning.race_costs import attention_cost
from race_dist.streaming import streamed_backward
from race_dist.training.config import load_config

CPU = Cluster(GPUS["cpu"], 1)
BARE = RaceConfig(qk_norm=False, short_conv=0, decay="none", normalization="global", output_gate=False)
SHAPES: dict[str, dict[str, Any]] = {
    "R": {},
    "R grouped": {"num_heads": 8, "num_kv_heads": 2},
    "R bare": {"race": BARE},
    "R bucket": {"race": RaceConfig(normalization="bucket")},
    "R multiscale": {"race": RaceConfig(decay="multiscale", output_gate=False, num_tables=1, num_planes=6)},
    "R without positions": {"rope_base": None},
    "R planes trained": {"race": RaceConfig(train_planes=True, share_planes=True, train_beta=False)},
    "W": {"layer_pattern": "W"},
    "RW tied": {"layer_pattern": "RW", "tie_embeddings": True},
    "R conv of values, sigmoid gate": {"race": RaceConfig(conv_values=True, gate_activation="sigmoid")},
    "W conv": {"layer_pattern": "W", "softmax": SoftmaxConfig(short_conv=4)},
    "W conv, gate": {"layer_pattern": "W", "softmax": SoftmaxConfig(short_conv=4, conv_values=True, output_gate=True)},
    "W sigmoid gate": {"layer_pattern": "W", "softmax": SoftmaxConfig(output_gate=True, gate_activation="sigmoid")},
}


def model_of(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {"vocab_size": 64, "dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "window": 32}
    return ModelConfig(**(base | changes))


def precision_of(narrow: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext()


def saved_bytes(config: ModelConfig, batch: int, length: int, narrow: bool, *, compiled: bool = False) -> int:
    """Bytes of the distinct storages that autograd saves of a chunk, without weights and buffers."""
    model = DecoderLM(config)
    if compiled:  # with inductor's partition of a block's graph, without its kernels
        torch.compiler.reset()
        for block in model.blocks:
            block.compile(dynamic=False, backend="aot_eager_decomp_partition")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage, storage.nbytes()
        return t

    carry = model.zero_carry(batch, state_dtype=torch.float64)
    carry = carry.with_tensors(tuple(t.requires_grad_() if t.is_floating_point() else t for t in carry.tensors()))
    ids = torch.zeros(batch, length, dtype=torch.int64)
    with precision_of(narrow), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        h, _ = model.hidden(ids, carry)
        loss = model.loss(h, ids)
    assert loss.requires_grad
    return sum(size for _, size in seen.values())


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_saves(shape: str, batch: int, narrow: bool) -> None:
    config, length = model_of(**SHAPES[shape]), 512
    job = Job(config, length, batch, "bfloat16" if narrow else "float32")
    predicted = activations(job, Layout(1, 1, length), CPU) + autocast_weight_bytes(job)
    assert predicted == pytest.approx(saved_bytes(config, batch, length, narrow), rel=0.06)


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_activations_are_what_autograd_saves(shape: str, narrow: bool) -> None:
    config, length = model_of(**SHAPES[shape]), 512
    job = Job(config, length, 1, "bfloat16" if narrow else "float32", compiled=True)
    predicted = activations(job, Layout(1, 1, length), CPU) + autocast_weight_bytes(job)
    assert predicted == pytest.approx(saved_bytes(config, 1, length, narrow, compiled=True), rel=0.1)


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["R", "W"])
def test_checkpointing_keeps_the_blocks_inputs(pattern: str, narrow: bool) -> None:
    """The tensors saved by the forward pass, plus those of the one block that is recomputed."""
    length = 512
    config = model_of(layer_pattern=pattern, num_layers=3)
    job = Job(config, length, 1, "bfloat16" if narrow else "float32")
    layout = Layout(1, 1, length)
    plain = activations(job, layout, CPU)
    two = activations(Job(model_of(layer_pattern=pattern), length, 1, job.precision), layout, CPU)
    ends = (3 * 64 + 1) * 4 * length  # of the last norm and the loss: freed by then
    measured = saved_bytes(config.model_copy(update={"activation_checkpointing": True}), 1, length, narrow)
    predicted = activations(job, replace(layout, checkpointing=True), CPU)
    assert predicted == pytest.approx(measured - ends + (plain - two), rel=0.1)


def peak_bytes(config: ModelConfig, length: int, chunk: int, narrow: bool) -> int:
    """Peak bytes of all tensors that one streamed step allocates."""
    model = DecoderLM(config)
    ids = torch.zeros(1, length, dtype=torch.int64)
    with precision_of(narrow), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        streamed_backward(model, ids, ids.roll(-1, 1), chunk_size=chunk)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


@pytest.mark.parametrize(
    ("pattern", "narrow", "checkpointing", "chunk"),
    [("R", False, False, 512), ("R", True, True, 256), ("W", True, False, 512), ("W", False, True, 256)],
)
def test_peak_of_a_streamed_step(pattern: str, narrow: bool, checkpointing: bool, chunk: int) -> None:
    config = model_of(layer_pattern=pattern, activation_checkpointing=checkpointing)
    job = Job(config, 4 * chunk, 1, "bfloat16" if narrow else "float32")
    planned = memory(job, Layout(1, 1, chunk, checkpointing), CPU)
    before = sum(planned.kinds[k] for k in ("parameters", "process", "text"))  # not allocated by the step
    assert planned.first_peak - before == pytest.approx(peak_bytes(config, 4 * chunk, chunk, narrow), rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_exactly(shape: str) -> None:
    config = model_of(**SHAPES[shape])
    assert parameter_count(config) == sum(p.numel() for p in DecoderLM(config).parameters())


@pytest.mark.parametrize("shape", ["R", "R bare", "W", "RW tied"])
def test_carries_are_counted(shape: str) -> None:
    """Up to counts and flags of the tails, a few bytes per layer."""
    config = model_of(**SHAPES[shape])
    carry = DecoderLM(config).zero_carry(3, state_dtype=torch.float64)
    held = sum(t.nbytes for t in carry.tensors())
    counted = 3 * sum(layer_cost(kind).carry_bytes(Job(config, 1, 3, "float32")) for kind in config.layer_kinds)
    assert counted == pytest.approx(held, rel=0.01)


def test_streaming_keeps_activations_and_adds_small_states() -> None:
    layout = Layout(1, 1, 4096)
    jobs = [Job(model_of(), context, 1) for context in (2**20, 2**22)]
    kinds = [memory(job, layout, CPU).kinds for job in jobs]
    assert kinds[0]["activations"] == kinds[1]["activations"]
    assert chunk_start_states(jobs[1], layout) == 4 * chunk_start_states(jobs[0], layout) == kinds[1]["chunk-start states"]
    on_host = memory(jobs[1], replace(layout, keep="host"), CPU)
    assert on_host.host == kinds[1]["chunk-start states"] > on_host.kinds["chunk-start states"]


def test_passes() -> None:
    job = Job(model_of(), 2**20, 1)
    assert count_passes(job, Layout(1, 1)).forward_units == 3
    assert count_passes(job, Layout(1, 1, 1024)).forward_units == pytest.approx(4, rel=1e-3)  # 8, not 6 x parameters x tokens
    assert count_passes(job, Layout(1, 1, 1024, True)).forward_units == pytest.approx(5, rel=1e-3)
    assert count_passes(job, Layout(1, 1, 2**20)).forward_units == 3  # one chunk: nothing runs twice


@pytest.mark.parametrize(("tables", "planes", "flops"), [(2, 2, 49_152), (4, 4, 110_592), (1, 8, 356_352)])
def test_arithmetic_of_the_attention(tables: int, planes: int, flops: int) -> None:
    config = model_of(dim=512, num_heads=4, num_kv_heads=4, race=RaceConfig(num_tables=tables, num_planes=planes))
    forward, backward = attention_cost(config, 2, 4096)
    assert forward.flops == flops
    assert 1.8 * flops < backward.flops < 2.4 * flops
    assert forward.bytes > 12 * 128


def test_seconds_of_a_scan() -> None:
    """528 KB per rank; 15 us and 300 GB/s inside a node, 25 us and 45 GB/s between nodes; computed by hand."""
    state, inside, between = 16 * 64 * 129 * 4, Link(15e-6, 300e9), Link(25e-6, 45e9)
    assert 1e6 * scan_seconds(8, state, inside, ranks_per_node=8) == pytest.approx(57, abs=1)
    assert 1e6 * scan_seconds(64, state, between, ranks_per_node=8) == pytest.approx(220, abs=1)
    assert 1e6 * scan_seconds(1024, state, between, ranks_per_node=8) == pytest.approx(367, abs=1)
    assert scan_seconds(1, state, inside, ranks_per_node=8) == 0


@pytest.mark.parametrize("ranks", [2, 8, 9, 64])
@pytest.mark.parametrize("size", [2**10, 2**14, 2**20])
@pytest.mark.parametrize("per_node", [4, 8])
def test_the_scan_is_planned_as_it_is_done(ranks: int, size: int, per_node: int) -> None:
    carry = [torch.empty(size, dtype=torch.uint8)]
    assert uses_all_gather(ranks, size, per_node) == (_pick("auto", carry, ranks, per_node) == "all_gather")


def test_exchange_does_not_grow_with_the_context() -> None:
    cluster = Cluster(find_gpu("h100"), 8)
    sent = [make_plan(Job(model_of(), context, 1), Layout(1, 8), cluster).exchange.bytes for context in (2**20, 2**26)]
    assert sent[0] == sent[1]
    assert sent[0]["sketches (scan)"] > 0
    assert make_plan(Job(model_of(), 2**20, 1), Layout(1, 1), Cluster(find_gpu("h100"), 1)).exchange.exposed == 0


def test_seconds_add_up_and_follow_the_rates() -> None:
    job, cluster = Job(model_of(dim=512, num_heads=4, num_kv_heads=4), 2**22, 1), Cluster(find_gpu("h100"), 1)
    factor = 9 / Rates().attention[64][0]
    slow = Rates(matmul=0.1, attention={64: (9, factor * Rates().attention[64][1])})
    plans = [make_plan(job, Layout(1, 1, 65536), cluster, rates) for rates in (Rates(), slow)]
    for plan in plans:
        assert plan.step == pytest.approx(sum(plan.seconds.values()))
        assert plan.tokens_per_second == pytest.approx(2**22 / plan.step)
        assert 0 < plan.mfu < 1
    assert plans[1].seconds["attention"] == pytest.approx(plans[0].seconds["attention"] * factor)
    assert plans[1].seconds["matrix products"] > plans[0].seconds["matrix products"]


def test_small_chunks_wait_for_the_host() -> None:
    job, cluster = Job(model_of(), 2**20, 1), Cluster(find_gpu("h100"), 1)
    small, large = (make_plan(job, Layout(1, 1, chunk), cluster) for chunk in (1024, 2**19))
    assert small.seconds["waiting for the host"] > large.seconds["waiting for the host"]
    assert small.step > large.step


def test_the_recommended_layout_fits_and_is_the_fastest() -> None:
    job, cluster = Job(model_of(dim=1024, num_layers=8), 75_000_000, 2), Cluster(find_gpu("gh200"), 8)
    best = recommend(job, cluster)
    assert best.memory.fits
    assert best.layout.chunk_size is not None
    for layout in Choices(sharding="none", keep="device").layouts(job, cluster):
        plan = make_plan(job, layout, cluster)
        assert not plan.memory.fits or plan.step * 1.02 >= best.step
    fixed = recommend(job, cluster, choices=Choices(dp=2, chunk_size=8192, checkpointing=True))
    assert (fixed.layout.dp, fixed.layout.sp, fixed.layout.chunk_size, fixed.layout.checkpointing) == (2, 4, 8192, True)


def test_short_sequences_are_not_streamed() -> None:
    assert recommend(Job(model_of(), 4096, 1), Cluster(find_gpu("h100"), 1)).layout.chunk_size is None


def test_what_does_not_fit_is_said_to() -> None:
    large = model_of(dim=8192, num_layers=64, num_heads=64, num_kv_heads=8)
    plan = recommend(Job(large, 2**20, 1), Cluster(find_gpu("h100"), 1))
    assert not plan.memory.fits
    assert largest_context(plan) == 0


def test_largest_contexts() -> None:
    cluster = Cluster(find_gpu("h100"), 1)
    plan = recommend(Job(model_of(), 2**20, 1), cluster)
    by_memory, by_time = largest_context(plan), largest_context(plan, seconds=60)
    assert 2**20 < by_time < by_memory
    job = replace(plan.job, context=by_time)
    assert recommend(job, cluster).step == pytest.approx(60, rel=0.03)
    resident = largest_context(plan, Choices(chunk_size=0, checkpointing=False))
    assert memory(replace(plan.job, context=resident), Layout(1, 1), cluster).fits
    assert resident < by_memory


def test_dividing_weights_saves_memory_and_sends_more() -> None:
    job, cluster = Job(model_of(dim=1024, num_layers=8), 2**24, 1), Cluster(find_gpu("h100"), 8)
    whole, divided = (make_plan(job, Layout(1, 8, 65536, sharding=kind), cluster) for kind in ("none", "fsdp"))  # type: ignore
    assert divided.memory.kinds["optimizer states"] == pytest.approx(whole.memory.kinds["optimizer states"] / 8, rel=1e-3)
    assert divided.memory.kinds["gradients"] == whole.memory.kinds["gradients"]  # accumulated unsharded over the chunks
    machine_bytes = [sum(plan.exchange.bytes.values()) for plan in (whole, divided)]
    assert machine_bytes[1] > machine_bytes[0]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100", "h100-80gb"),
        ("gh200", "gh200-96gb"),
        ("GH200-144", "gh200-144gb"),
        ("b200", "b200"),
        ("A100-80GB", "a100-80gb"),
        ("cpu", "cpu"),
    ],
)
def test_gpus_are_found_by_name(name: str, found: str) -> None:
    assert find_gpu(name).name == found


@pytest.mark.parametrize(("text", "count"), [("75M", 75_000_000), ("1B", 10**9), ("1.5k", 1500), ("131_072", 131072), ("0", 0)])
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: find_gpu("h101"), r"unknown GPU type 'h101': did you mean h100-80gb\? known are a100-80gb, "),
        (lambda: Cluster(GPUS["b200"], 0), "the number of GPUs must be at least 1; got 0"),
        (lambda: Job(model_of(), 0), "context must be at least 1; got 0"),
        (lambda: Job(model_of(), 8, precision="fp8"), 'precision must be "bfloat16", "float32" or "float64"; got \'fp8\''),  # type: ignore
        (lambda: Layout(1, 1, 0), "chunk_size must be at least 1; got 0"),
        (lambda: Layout(1, 1, sharding="zero"), 'sharding must be "none" or "fsdp"; got \'zero\''),  # type: ignore
        (lambda: Layout(1, 1, keep="disk"), 'keep must be "device" or "host"; got \'disk\''),  # type: ignore
        (lambda: parse_count("many"), "'many' is not a number of tokens: write for example 131072, 128K, 75M or 1B"),
        (lambda: parse_count("1.5"), "'1.5' is not a number of tokens"),
        (lambda: make_plan(Job(model_of(), 64), Layout(1, 2), CPU), "makes 2 ranks, but the cluster has 1 GPUs"),
        (
            lambda: make_plan(Job(model_of(), 64), Layout(2, 1), Cluster(GPUS["cpu"], 2)),
            "batch = 1 does not divide over dp = 2",
        ),
        (
            lambda: make_plan(Job(model_of(layer_pattern="RS"), 64), Layout(1, 1, 8), CPU),
            "a full-softmax layer cannot be streamed",
        ),
        (
            lambda: recommend(Job(model_of(), 64), Cluster(GPUS["cpu"], 4), None, Choices(dp=3)),
            "dp = 3 times sp = 1 makes 3 ranks",
        ),
        (lambda: Choices.checked(None, None, "-1", None, None, None), "'-1' is not a number of tokens"),
        (lambda: Rates(matmul=1.5), "rate matmul must be above 0 and at most 1; got 1.5"),
        (lambda: Rates(host_forward=-1), "rate host_forward must be a finite number of at least 0; got -1"),
        (lambda: Rates(attention={}), "rate attention maps a number of features to two positive numbers"),
    ],
)
def test_mistakes_are_named(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_rates_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"machine": "x", "rates": {"matmul": 0.5, "attention": {"256": [3, 4]}}}))
    rates = load_rates(path)
    assert (rates.matmul, rates.attention, rates.bandwidth) == (0.5, {256: (3.0, 4.0)}, Rates().bandwidth)
    assert rates.source == str(path)
    assert rates.attention_slowdown(64) == (3.0, 4.0)
    for text, sentence in (
        ("{", "is not valid JSON"),
        ('{"matmull": 1}', "rates are an object with the fields source, matmul"),
        ('{"matmul": 2}', r"rates.json: rate matmul must be above 0"),
        ("[1]", "got list"),
        ('{"attention": {"64": 1}}', "rates.json: "),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_rates(path)
    with pytest.raises(FileNotFoundError, match="there is no rates file"):
        load_rates(tmp_path / "none.json")


# --- the command ---------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "configs").glob("plan-*.toml"))


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "80", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_have_the_size_in_their_name(path: Path) -> None:
    count = parameter_count(load_config(path).model)
    assert count == pytest.approx(parse_count(path.stem.removeprefix("plan-")), rel=0.15)


def test_help_and_tables_fit_80_columns() -> None:
    for arguments in (["--help"], [PRESETS[0], "--gpus", "2", "--gpu", "h100"]):
        code, text = invoke(*arguments)
        assert code == 0
        assert max(len(line) for line in text.splitlines()) <= 80


def test_json_holds_everything() -> None:
    code, text = invoke(ROOT / "configs/plan-1b.toml", "--gpus", "8", "--context", "75M", "--json", "--sharding", "none")
    assert code == 0
    report = json.loads(text)
    assert report["job"]["context"] == 75_000_000
    assert report["layout"]["dp"] * report["layout"]["sp"] == 8
    assert report["memory"]["fits"]
    assert report["memory"]["peak"] <= report["memory"]["available"]
    assert report["seconds"]["step"] == pytest.approx(75e6 / report["tokens_per_second"])
    assert report["largest_context"]["memory"] > report["largest_context"]["time"] > 0
    assert any(sentence.startswith("It fits: ") for sentence in report["words"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "h1000"], "unknown GPU type 'h1000'"),
        (["--context", "x"], "'x' is not a number of tokens"),
        (["--gpus", "0"], "'--gpus': it must be from 1 to 1,000,000; got '0'"),
        (["--keep", "disk"], "'--keep': 'disk' is not one of"),
        (["--rates", "none.json"], "'--rates': there is no file 'none.json'"),
        (["--precision", "fp8"], "'--precision': 'fp8' is not one of"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(arguments: list[str], sentence: str) -> None:
    code, text = invoke(PRESETS[0], *arguments)
    assert code == 2
    assert sentence in text
    assert "Traceback" not in text
