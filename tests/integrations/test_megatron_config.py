"""The Megatron adapters on one rank: config checks, masks, packing, arguments, specs, constants."""

from __future__ import annotations

import copy
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.spec_utils import build_module, import_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_ranks import batch, build, model_config, native, weights

from race_dist import RaceConfig, checks, race_attention, sample_planes
from race_dist.integrations.megatron import (
    RaceCoreAttention,
    RaceSelfAttention,
    RaceTransformerConfig,
    add_race_args,
    get_race_block_spec,
    get_race_hybrid_stack_spec,
    get_race_layer_spec,
)
from race_dist.integrations.megatron.config import OWNED_BY_MEGATRON, PREFIX
from race_dist.integrations.megatron.core_attention import state_dict_name
from race_dist.integrations.megatron.cpu import without_cuda
from race_dist.integrations.megatron.sequence_shard import SequenceShard
from race_dist.integrations.megatron.weights import from_megatron, load_full_weights, to_megatron

BARE = {
    "race_qk_norm": False,
    "race_short_conv": 0,
    "race_decay": "none",
    "race_normalization": "global",
    "race_output_gate": False,
}


def config(**options: Any) -> RaceTransformerConfig:
    base: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "transformer_impl": "local",
        "race_num_tables": 2,
        "race_num_planes": 3,
    }
    return RaceTransformerConfig(**(base | options))


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.destroy_model_parallel()  # left by an earlier test in this process
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def core(**options: Any) -> RaceCoreAttention:
    mask_type = options.pop("mask_type", AttnMaskType.causal)
    return RaceCoreAttention(config(**options), layer_number=1, attn_mask_type=mask_type)


def qkv(length: int = 12, rows: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(length, rows, heads, 8, generator=generator) for heads in (4, 2, 2))


# --- config ------------------------------------------------------------------------------------------------------------


def test_every_choice_of_race_config_is_a_field_with_its_default() -> None:
    own = {f.name: getattr(RaceTransformerConfig, f.name) for f in fields(RaceTransformerConfig) if f.name.startswith(PREFIX)}
    for name, field in RaceConfig.model_fields.items():
        assert (name in OWNED_BY_MEGATRON) != (PREFIX + name in own), name
        if PREFIX + name in own:
            assert own[PREFIX + name] == field.default, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"race_num_planes": 11}, r"race_num_planes must be from 1 to 10"),
        ({"race_beta_init": -1.0}, r"race_beta_init must be positive"),
        ({"race_beta_init": (1.0, 2.0, 3.0)}, r"race_beta_init has 3 numbers for 2 key/value heads"),
        ({"race_decay": "fast"}, r"race_decay must be 'none', 'multiscale' or 'token'; got 'fast'"),
        ({"race_layout": "diagonal"}, r"layout must be one of"),
        ({"race_rope": "sometimes"}, r"race_rope must be"),
        ({"linear_attention_freq": [1, 0]}, r"linear_attention_freq is None, N .* or a list of 4"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0.1, but a RACE layer has no attention weights"),
        ({"window_size": (8, 0)}, r"window_size is \(8, 0\), but every layer is RACE"),
        ({"qk_clip": True}, r"qk_clip is not supported with RACE layers: it clips logits"),
        ({"attention_backend": AttnBackend.local}, r"leave --attention-backend out"),
        ({"linear_attention_freq": 2, "context_parallel_size": 2, "race_layout": "contiguous"}, r"take zigzag shards"),
    ],
)
def test_unsupported_config_fields_are_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_patterns_of_hybrids() -> None:
    assert config().race_pattern() == [True] * 4
    assert config(linear_attention_freq=2).race_pattern() == [True, False, True, False]
    assert config(linear_attention_freq=[0, 1, 1, 0]).race_pattern() == [False, True, True, False]
    assert config(linear_attention_freq=1, attention_dropout=0.1).race_pattern() == [False] * 4  # nothing to refuse


def test_a_plain_config_is_refused_and_a_copy_taken() -> None:
    plain = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
    with pytest.raises(TypeError, match=r"core_transformer_config_from_args\(args, RaceTransformerConfig\)"):
        RaceCoreAttention(plain, 1, AttnMaskType.causal)
    fewer = copy.deepcopy(config(race_beta_init=(1.0, 3.0)))
    fewer.num_query_groups = 4  # as Megatron does in its copy if there are fewer groups than ranks
    assert fewer.race().num_kv_heads == 2


def test_arguments_make_the_config() -> None:
    parser = add_race_args(ArgumentParser())
    assert vars(parser.parse_args([])).items() <= {f.name: f.default for f in fields(RaceTransformerConfig)}.items()
    asked = [
        "--race-num-tables",
        "3",
        "--race-beta-init",
        "1",
        "2.5",
        "--no-race-train-beta",
        "--race-decay",
        "multiscale",
        "--race-layout",
        "contiguous",
    ]
    args = vars(parser.parse_args(asked))
    made = config(**{f.name: args[f.name] for f in fields(RaceTransformerConfig) if f.name in args})  # as Megatron-LM does
    assert (
        made.race()
        == config(
            race_num_tables=3, race_beta_init=(1.0, 2.5), race_train_beta=False, race_num_planes=4, race_decay="multiscale"
        ).race()
    )
    assert made.layout == "contiguous"
    assert parser.parse_args(["--race-beta-init", "2"]).race_beta_init == 2.0
    with pytest.raises(SystemExit):
        parser.parse_args(["--race-normalization", "batch"])
    assert "Hash tables L" in parser.format_help()


# --- the slot -----------------------------------------------------------------------------------------------------------


def test_core_attention_computes_race_attention() -> None:
    layer, (q, k, v) = core(**BARE, race_beta_init=(1.0, 3.0)), qkv()
    out = layer(q, k, v, None, attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=None)
    expected = race_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), sample_planes(2, 3, 8, seed=0, num_heads=2), torch.tensor([1.0, 3.0])
    )
    torch.testing.assert_close(out, expected.transpose(0, 1).flatten(2))


def test_padding_masks_and_no_mask() -> None:
    q, k, v = qkv()
    hidden = torch.zeros(2, 1, 1, 12, dtype=torch.bool)
    hidden[1, ..., 9:] = True
    bare = BARE | {"race_beta_init": 2.0}
    planes = sample_planes(2, 3, 8, seed=0, num_heads=2)
    for mask_type in (AttnMaskType.padding, AttnMaskType.padding_causal, AttnMaskType.no_mask):
        mask = None if mask_type == AttnMaskType.no_mask else hidden
        out = core(mask_type=mask_type, **bare)(q, k, v, mask)
        expected = race_attention(
            *(x.transpose(0, 1) for x in (q, k, v)),
            planes,
            2.0,
            causal=mask_type == AttnMaskType.padding_causal,
            key_mask=None if mask is None else ~hidden.view(2, 12),
        )
        torch.testing.assert_close(out, expected.transpose(0, 1).flatten(2))
    with pytest.raises(ValueError, match=r"takes a bool mask \[B, 1, 1, T\] = \[2, 1, 1, 12\]"):
        core(mask_type=AttnMaskType.padding, **bare)(q, k, v, hidden.expand(-1, -1, 12, -1))


def test_the_values_of_a_causal_mask_are_checked() -> None:
    layer, (q, k, v) = core(**BARE), qkv()
    causal = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    torch.testing.assert_close(layer(q, k, v, causal), layer(q, k, v, None))
    documents = causal.clone()
    documents[..., 6:, :6] = True
    with pytest.raises(ValueError, match=r"hides more or less than the tokens that come later.*packed_seq_params"):
        layer(q, k, v, documents)
    with pytest.raises(ValueError, match=r"has bool \[\.\.\., 12, 12\], or None"):
        layer(q, k, v, causal[..., :5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: core(mask_type=AttnMaskType.arbitrary, **BARE), "attn_mask_type is arbitrary"),
        (lambda q, k, v: core(mask_type=AttnMaskType.no_mask), "needs an order of the tokens"),
        (lambda q, k, v: core(**BARE)(q, k, v, attn_mask_type=AttnMaskType.no_mask), "decodes from a sketch"),
        (lambda q, k, v: core(**BARE)(q[-1:], k, v), "1 queries came with 12 keys"),
        (lambda q, k, v: core(**BARE)(q, k, v, attention_bias=torch.zeros(12, 2, 2)), "no logits to add it to"),
        (lambda *each: core()(*each, None), "get_race_layer_spec"),
        (
            lambda q, k, v: RaceCoreAttention(config(), 1, AttnMaskType.causal, softmax_scale=0.1),
            "the sharpness is race_beta_init",
        ),
        (lambda q, k, v: RaceCoreAttention(config(), 1, AttnMaskType.causal, "cross"), "their own sequence only"),
        (lambda q, k, v: RaceCoreAttention(config(), 1, AttnMaskType.causal, attention_dropout=0.1), "no attention weights"),
    ],
)
def test_core_attention_refuses_unsupported_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*qkv())


def test_planes_stay_float32_and_are_drawn_by_layer_and_head() -> None:
    layer = core(race_seed=5).bfloat16()
    assert layer.core.planes.dtype == torch.float32
    torch.testing.assert_close(layer.core.planes, sample_planes(2, 3, 8, seed=5, layer=0, num_heads=2), rtol=0, atol=0)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    other = RaceCoreAttention(config(race_seed=5), 2, AttnMaskType.causal)
    assert not torch.equal(layer.core.planes, other.core.planes)


def test_a_checkpoint_of_other_planes_is_refused() -> None:
    state = core(race_seed=5).state_dict()
    assert "planes" not in state
    core(race_seed=5).load_state_dict(state)
    other = core(race_seed=6)
    other.planes_of.copy_(state["planes_of"])  # dist_checkpointing loads into the tensors of the model
    with pytest.raises(RuntimeError, match=r"trained with other hyperplanes: race_seed 5 there and 6 here"):
        other.load_state_dict(state)


def test_names_in_checkpoints_are_flat() -> None:
    layer = core(race_conv_values=True, race_seed=5)
    names = {"q_scale", "k_scale", "log_beta", "out_norm", "q_conv", "k_conv", "v_conv", "planes_of"}
    assert set(layer.state_dict()) == names
    assert {tensor.key for tensor in layer.sharded_state_dict("a.").values()} == {f"a.{name}" for name in names}
    assert {state_dict_name(name) for name, _ in layer.named_parameters()} == names - {"planes_of"}
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    layer.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in layer.state_dict().items())
    own = "decoder.layers.0.self_attention.core_attention."
    assert state_dict_name(f"{own}core.q_conv.weight") == f"{own}q_conv"
    assert state_dict_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"


def test_no_value_is_read_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs require this. Meta tensors have no values, so that reading one raises an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it does not support the meta device
    monkeypatch.setattr(checks, "tensor", lambda name, value, **_: value)  # it refuses meta tensors
    layer = core().to("meta")
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_q_padded=bounds)
    for lead, params in (((12, 2), None), ((12,), documents)):
        q, k, v = (torch.empty(*lead, heads, 8, device="meta", requires_grad=True) for heads in (4, 2, 2))
        decay = torch.empty(12, 1 if params else 2, 2, device="meta", requires_grad=True)
        layer(q, k, v, None, attention_bias=decay, packed_seq_params=params).sum().backward()
        assert all(t.grad is not None for t in (q, k, v, decay, *layer.parameters()))


# --- packed documents ---------------------------------------------------------------------------------------------------


def packed(real: list[int], padded: list[int] | None = None, **more: Any) -> PackedSeqParams:
    cu = [None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (real, padded)]
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu[0], cu_seqlens_q_padded=cu[1], **more)


def test_padding_of_packed_documents_adds_nothing() -> None:
    where = SequenceShard.of(12, packed([3, 0, 4], [4, 2, 5]), None, "zigzag", torch.device("cpu"))
    assert where.cu_seqlens is not None
    assert where.key_mask is not None
    assert where.cu_seqlens.tolist() == [0, 4, 6, 11, 12]  # a last document of padding alone
    assert where.key_mask[0].tolist() == [True] * 3 + [False] * 3 + [True] * 4 + [False] * 2
    plain = SequenceShard.of(7, packed([3, 4]), None, "zigzag", torch.device("cpu"))
    assert plain.cu_seqlens is not None
    assert (plain.cu_seqlens.tolist(), plain.key_mask) == ([0, 3, 7], None)


def test_a_non_causal_layer_does_not_read_padding() -> None:
    layer, (q, k, v) = core(mask_type=AttnMaskType.padding, **BARE), (x[:, 0] for x in qkv())
    out = layer(q, k, v, None, packed_seq_params=packed([4, 5], [6, 6]))
    again = layer(q, k.index_fill(0, torch.tensor([4, 5, 11]), 9.0), v, None, packed_seq_params=packed([4, 5], [6, 6]))
    real = [*range(4), *range(6, 11)]
    torch.testing.assert_close(out[real], again[real], rtol=0, atol=0)
    assert not torch.equal(layer(q, k, v, None, packed_seq_params=packed([6, 6]))[real], out[real])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (packed([3, 40]), "cu_seqlens end at 43, but there are 12 rows"),
        (PackedSeqParams(qkv_format="thd"), "no cu_seqlens_q"),
        (PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=torch.tensor([0, 12])), 'packed documents come as "thd"'),
        (packed([12], local_cp_size=2), "there is no cp_group"),
    ],
)
def test_packing_that_makes_no_sense_is_refused(params: PackedSeqParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceShard.of(12, params, None, "zigzag", torch.device("cpu"))


# --- specs --------------------------------------------------------------------------------------------------------------


def attentions(model: GPTModel) -> list[bool]:
    return [isinstance(layer.self_attention, RaceSelfAttention) for layer in model.decoder.layers]


def gpt(settings: RaceTransformerConfig, spec: Any) -> GPTModel:
    return GPTModel(settings, spec, vocab_size=32, max_sequence_length=16, position_embedding_type="none")


def test_specs_put_race_where_the_config_says() -> None:
    hybrid = config(linear_attention_freq=[1, 0, 0, 1])
    assert attentions(gpt(config(), get_race_layer_spec(config()))) == [True] * 4
    assert attentions(gpt(hybrid, get_race_block_spec(hybrid))) == [True, False, False, True]
    named = import_module(("race_dist.integrations.megatron", "race_layer_local_spec"))  # as --spec does
    assert attentions(gpt(hybrid, named)) == [True, False, False, True]
    experts = config(num_moe_experts=2, moe_layer_freq=[0, 1, 0, 1], linear_attention_freq=2, add_bias_linear=False)
    mlps = [str(layer.submodules.mlp) for layer in get_race_block_spec(experts).layer_specs]
    assert ["MoELayer" in text for text in mlps] == [False, True, False, True]


def test_a_pipeline_stage_gets_its_layers() -> None:
    settings = config(linear_attention_freq=[1, 0, 1, 1], pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    stages = [get_race_block_spec(settings, pp_rank=rank).layer_specs for rank in (0, 1)]
    assert [[layer.submodules.self_attention.module is RaceSelfAttention for layer in stage] for stage in stages] == [
        [True, False],
        [True, True],
    ]


def test_specs_are_called_with_a_models_config_too() -> None:
    block = get_race_block_spec(SimpleNamespace(transformer=config(linear_attention_freq=2)))  # as newer builders do
    kinds = [layer.submodules.self_attention.module for layer in block.layer_specs]
    assert [kind is RaceSelfAttention for kind in kinds] == [True, False, True, False]


def test_a_core_attention_that_was_replaced_is_noticed() -> None:
    settings, spec = config(), get_race_layer_spec(config()).submodules.self_attention
    spec.submodules.core_attention = DotProductAttention  # as Megatron does to any spec under --attention-backend local
    with pytest.raises(ValueError, match=r"is DotProductAttention: something has replaced it"):
        build_module(spec, config=settings, layer_number=1)


def test_missing_packages_are_named() -> None:
    with pytest.raises(ImportError, match="Transformer Engine"):
        get_race_layer_spec(config(), use_transformer_engine=True)
    with pytest.raises(ImportError, match=r"use get_race_block_spec|Transformer Engine spec was requested"):
        get_race_hybrid_stack_spec()


def test_self_attention_refuses_unsupported_arguments() -> None:
    settings = config()
    layer = build_module(get_race_layer_spec(settings).submodules.self_attention, config=settings, layer_number=1)
    x = torch.randn(12, 2, 32)
    dynamic = SimpleNamespace(is_dynamic_batching=lambda: True, is_static_batching=lambda: False)
    for kwargs, message in (
        ({"inference_context": dynamic}, "do not decode inside Megatron's inference contexts"),
        ({"inference_params": dynamic}, "do not decode inside Megatron's inference contexts"),
        ({"key_value_states": x}, "their own sequence only"),
        ({"attention_bias": torch.zeros(1)}, "no logits to add it to"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, None, **kwargs)


def test_groups_given_by_hand_do() -> None:
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    q, k, v = qkv()
    torch.testing.assert_close(
        RaceCoreAttention(config(**BARE), 1, AttnMaskType.causal, pg_collection=groups)(q, k, v),
        core(**BARE)(q, k, v),
        rtol=0,
        atol=0,
    )


# --- the same model ------------------------------------------------------------------------------------------------------


def test_weights_go_there_and_back() -> None:
    settings = model_config(_layer_pattern="RS", _rope_base=None, _num_layers=2)
    state = weights(settings)
    back = from_megatron(to_megatron(state, settings), settings, state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match=r"missing are .*output_layer.weight"):
        load_full_weights(build(settings), {}, None)


def test_softmax_layers_with_positions_are_those_of_decoder_lm() -> None:
    settings = model_config(_layer_pattern="RS")
    ids, labels = batch()
    with without_cuda():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        model = build(settings)
        losses = model(ids, torch.arange(ids.shape[1]).expand(*ids.shape), None, labels=labels.clamp(min=0))
    keep = labels != -100
    assert float((losses * keep).detach().sum() / keep.sum()) == pytest.approx(native(settings).loss, abs=1e-6)
