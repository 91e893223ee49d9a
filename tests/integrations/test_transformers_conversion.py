"""Conversion takes over every parameter and operation of an attention module, or is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from race_dist import race_attention
from race_dist.integrations.transformers import (
    RaceSelfAttention,
    ShardedLoader,
    cached_bytes,
    convert,
    freeze_all_but,
    from_pretrained,
    sequence_parallel,
    shard_batch,
    trained_parts,
)
from race_dist.nn.norm import rms
from tests.integrations.hf_models import GROUPED, SIZES, build, tokens

F64 = torch.float64
OLD = hf.__version__.startswith("4.")  # where these modules are written differently, and refused
newer = pytest.mark.skipif(OLD, reason="transformers 4 has another build of this model")
PLAIN = {"decay": "none", "short_conv": 0, "rope_base": None}


def tiny(name: str, **changes: Any) -> Any:
    """A model of transformers' class ``name`` with weights far from their neutral values, float64."""
    config = getattr(hf, f"{name}Config")
    known = SIZES | GROUPED | {"head_dim": 8, "pad_token_id": 1}
    accepted = {key: value for key, value in known.items() if hasattr(config(), key)}
    torch.manual_seed(1)
    model = getattr(hf, f"{name}ForCausalLM")(config(**accepted | changes)).to(F64).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 or "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            parameter.data.mul_(4)
    for part, parameter in model.named_parameters():
        if "norm" in part:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 8))


def over_all_heads(x: Tensor, norm: Any) -> Tensor:
    """OLMo 2: one RMS norm over all heads together."""
    return heads(norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt())


def per_head(x: Tensor, norm: Any) -> Tensor:
    """Qwen 3: an RMS norm per head, whose weight the heads share."""
    x = heads(x)
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def layer_norm_of_heads(x: Tensor, norm: Any) -> Tensor:
    """Cohere: mean and variance per head, with a weight per head and channel."""
    x = heads(x)
    x = x - x.mean(-1, keepdim=True)
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def norm_per_head(x: Tensor, norm: Any) -> Tensor:
    """StableLM: one LayerNorm per head."""
    return torch.stack(
        [F.layer_norm(x[..., 8 * i : 8 * i + 8], (8,), n.weight, n.bias, n.eps) for i, n in enumerate(norm.norms)], 2
    )


def scaled(x: Tensor, norm: Any) -> Tensor:
    """Gemma 3: the norm multiplies by 1 + weight."""
    x = heads(x)
    return (1 + norm.weight) * x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()


NORMS: list[tuple[str, str, dict[str, Any], Callable[[Tensor, Any], Tensor]]] = [
    ("Olmo2", "q_norm", {}, over_all_heads),
    ("Olmo3", "q_norm", {"layer_types": ["full_attention"] * 2}, over_all_heads),
    ("Qwen3", "q_norm", {}, per_head),
    ("Cohere", "q_norm", {"use_qk_norm": True}, layer_norm_of_heads),
    ("StableLm", "q_layernorm", {"qk_layernorm": True}, norm_per_head),
    ("Gemma3Text", "q_norm", {"layer_types": ["full_attention"] * 2}, scaled),
][: 4 if OLD else 6]


@pytest.mark.parametrize(("name", "norm", "changes", "independent"), NORMS, ids=[n[0] for n in NORMS])
def test_norms_of_queries_and_keys_are_applied_as_the_model_does(
    name: str, norm: str, changes: dict[str, Any], independent: Callable[[Tensor, Any], Tensor]
) -> None:
    """A converted layer against the sum over all pairs of tokens, with the norms written out."""
    kind = getattr(hf, f"{name}ForCausalLM", None) or hf.Gemma3ForCausalLM
    model = tiny(name, **changes) if hasattr(hf, f"{name}ForCausalLM") else gemma3(**changes)
    assert isinstance(model, kind)
    convert(model, race=PLAIN)
    layer = model.model.layers[1].self_attn
    assert isinstance(layer, RaceSelfAttention)
    x = torch.randn(2, 9, 32, dtype=F64, generator=torch.Generator().manual_seed(3))
    q = independent(F.linear(x, layer.q_proj.weight, layer.q_proj.bias), getattr(layer, norm))
    k = independent(F.linear(x, layer.k_proj.weight, layer.k_proj.bias), getattr(layer, norm.replace("q", "k", 1)))
    v = heads(F.linear(x, layer.v_proj.weight, layer.v_proj.bias))
    unit = lambda t: rms(t, 1e-6) * 8**-0.5
    expected = race_attention(unit(q), unit(k), v, layer.planes, 2.0, backend="reference").flatten(2)
    expected = F.linear(expected, layer.o_proj.weight, layer.o_proj.bias)
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-6, rtol=1e-6)  # transformers' norms are computed in float32


def gemma3(**changes: Any) -> Any:
    torch.manual_seed(1)
    config = hf.Gemma3TextConfig(**SIZES | GROUPED | {"head_dim": 8, "pad_token_id": 1} | changes)
    model = hf.Gemma3ForCausalLM(config).to(F64).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def bias_of_projections() -> Any:
    return tiny("Llama", attention_bias=True)


@pytest.mark.parametrize(
    "make",
    [
        bias_of_projections,
        lambda: tiny("Qwen2"),
        pytest.param(lambda: tiny("NanoChat"), marks=newer),
        lambda: tiny("Granite", attention_multiplier=0.1),
        lambda: tiny("Glm"),
        pytest.param(lambda: tiny("Nemotron"), marks=newer),
        lambda: tiny("SmolLM3"),
        pytest.param(lambda: tiny("Persimmon", qk_layernorm=True), marks=newer),
    ],
    ids=["bias", "Qwen2", "NanoChat", "Granite", "Glm", "Nemotron", "SmolLM3", "Persimmon"],
)
def test_converted_models_keep_every_parameter_and_run(make: Callable[[], Any]) -> None:
    model = make()
    before = {name: p for name, p in model.named_parameters() if "self_attn" in name}
    softmax = model(tokens(1, 8), use_cache=False).logits
    convert(model)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    ids = tokens(2, 12)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(whole[:1, :7], model(ids[:1, :7], use_cache=False).logits, atol=1e-6, rtol=1e-6)
    assert (softmax - model(tokens(1, 8), use_cache=False).logits).abs().max() > 1e-3
    made = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)
    for _ in range(3):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def with_(change: Callable[[Any], None], name: str = "Llama", **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = tiny(name, **changes)
        change(model.model.layers[1].self_attn)
        return model

    return make


def sink(attention: Any) -> None:
    attention.sinks = nn.Parameter(torch.zeros(4, dtype=F64))


def buffer(attention: Any) -> None:
    attention.register_buffer("slopes", torch.ones(4))


def doing(what: str) -> Callable[[Any], None]:
    """A module whose forward does more than its parameters say."""

    def change(attention: Any) -> None:
        forward = attention.forward

        def more(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if what == "input":
                return forward(hidden_states * 1.5, *args, **kwargs)
            y, weights = forward(hidden_states, *args, **kwargs)
            return y * 0.5, weights

        attention.forward = more

    return change


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sinks": (with_(sink), r"layer 1: LlamaAttention has parameters that a RACE layer would drop: sinks"),
    "buffer": (with_(buffer), r"would drop: slopes"),
    "gpt-oss": (lambda: tiny("GptOss", num_local_experts=4).float(), r"GptOssAttention has parameters .*: sinks"),
    "sub norm": (lambda: tiny("BitNet"), r"BitNetAttention .*attn_sub_norm\.weight"),
    "differential": (lambda: tiny("DiffLlama"), "lambda_q1, lambda_k1"),
    "clip": (lambda: tiny("Olmo", clip_qkv=0.01), r"OlmoAttention computes its queries by more than q_proj"),
    "scale of the input": (with_(doing("input")), "computes its queries by more than"),
    "scale of the output": (with_(doing("output")), "computes its output by more than o_proj"),
    "softcap": (lambda: tiny("Gemma2", layer_types=["full_attention"] * 2), r"caps its logits \(softcap = 50\.0\)"),
    "window": (lambda: tiny("Mistral", sliding_window=16), "attends to a sliding window or chunk of 16 tokens"),
    "window of some layers": (lambda: tiny("Gemma2", sliding_window=16, attn_logit_softcapping=None), "chunk of 16 tokens"),
    "dropout": (lambda: tiny("Llama", attention_dropout=0.1), r"drops attention weights \(dropout = 0\.1\)"),
    "other projections": (lambda: tiny("Phi3"), "is of an unknown kind"),
    "not causal": (with_(lambda a: setattr(a, "is_causal", False)), "is not causal, but converted layers are"),
    "no decoder": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)).eval(),
        "has no list of decoder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_with_unsupported_operations_are_refused_and_the_model_is_unchanged(case: str) -> None:
    make, message = REFUSED[case]
    model, ids = make(), tokens(1, 8) % 9
    before, text = model(ids, use_cache=False).logits, repr(model)
    with pytest.raises((ValueError, TypeError), match=message):
        convert(model)
    assert repr(model) == text
    assert "race" not in model.config.to_json_string()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_layers_that_can_be_converted_are_where_others_cannot() -> None:
    model = tiny("Gemma2", sliding_window=16, attn_logit_softcapping=None)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    convert(model, layers=[1])
    ids = tokens(1, 20)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(whole[:, :9], model(ids[:, :9], use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_a_projection_of_more_than_queries_is_refused_unseen() -> None:
    """Also on the meta device, where the model cannot be run."""
    for device in ("cpu", "meta"):
        model = tiny("Llama").to(device)
        model.model.layers[1].self_attn.q_proj = nn.Linear(32, 64, dtype=F64, device=device)
        with pytest.raises(ValueError, match="q_proj has 64 output features, but 4 query heads"):
            convert(model)


def test_positions_are_inherited_only_where_they_are_turned_alike() -> None:
    """Cohere rotates neighbouring pairs; Llama and RACE layers rotate halves."""
    rope = {"decay": "none", "short_conv": 0}
    with pytest.raises(ValueError, match="other rotary positions"):
        convert(tiny("Cohere"), inherit_rope=True, race=rope)
    with pytest.raises(ValueError, match="rotates 2 of 8 dimensions of a head"):
        convert(tiny("StableLm"), inherit_rope=True, race=rope)
    with pytest.raises(ValueError, match=r"does not run with RACE layers|computes its queries by more than"):
        convert(tiny("SmolLM3", no_rope_layers=[1, 0]), inherit_rope=True, race=rope)
    model = tiny(
        "Llama",
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    )
    convert(model, inherit_rope=True, race=rope)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"race": [1]}, r"race must be a RaceConfig or a dictionary of its fields; got \[1\]"),
        ({"race": 3}, "race must be"),
        ({"race": {1: 2}}, "race must be a dictionary whose keys are fields"),
        ({"race": {"": 1}}, "unknown key ''"),
        ({"race": {"num_plane": 1}}, "did you mean num_planes"),
        ({"race": {"num_planes": True}}, "race: num_planes must be .*got True"),
        ({"race": {"seed": True}}, "race: seed must be .*got True"),
        ({"race": {"short_conv": 10**30}}, "race: short_conv must be"),
        ({"race": {"num_tables": 10**30}}, "race: num_tables must be"),
        ({"race": {"beta_init": float("nan")}}, "beta_init must be"),
        ({"race": {"beta_init": (1.0, 2.0, 3.0)}}, "beta_init has 3 numbers for 2 key/value heads"),
        ({"race": {"num_heads": 3}}, "num_heads = 3 but the model's num_heads = 4"),
        ({"race": {"causal": False}}, "race has causal"),
        ({"layers": 3}, "layers must be indices of layers.*got 3"),
        ({"layers": ["a"]}, "layers must be .*got 'a'"),
        ({"layers": [True]}, "layers must be .*got True"),
        ({"layers": "01"}, "layers must be .*got '01'"),
        ({"layers": []}, "at least one"),
        ({"layers": [1.0]}, "layers must be .*got 1.0"),
        ({"layers": [-1]}, r"layers must be among 0 to 1, at least one; got \[-1\]"),
        ({"inherit_rope": 1}, "inherit_rope must be True or False; got 1"),
        ({"inherit_rope": "no"}, "inherit_rope must be"),
    ],
)
def test_wrong_arguments_of_convert_are_refused_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    model = build("llama")
    text = repr(model)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        convert(model, **arguments)
    assert "\n" not in str(error.value)
    assert repr(model) == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_parallel(build("llama", implementation="race"), "x"), "group must be .*got str 'x'"),  # type: ignore[arg-type]
        (lambda: sequence_parallel(3, None), "model: a transformers model is needed; got int"),  # type: ignore[arg-type]
        (lambda: sequence_parallel(build("llama", implementation="race"), None, layout="q"), "layout must be one of"),
        (lambda: shard_batch(None, None), "batch must be a dictionary with input_ids"),  # type: ignore[arg-type]
        (lambda: shard_batch({"input_ids": tokens(1, 4)}, 3), "group must be .*got int 3"),  # type: ignore[arg-type]
        (lambda: ShardedLoader([], "x"), "group must be"),  # type: ignore[arg-type]
        (lambda: freeze_all_but(build("llama"), 3), "parameters must be a list"),  # type: ignore[arg-type]
        (lambda: trained_parts(3), "model must be a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: cached_bytes(3), "cache must be a cache of transformers"),  # type: ignore[arg-type]
        (lambda: from_pretrained("x", config=3), "config must be a configuration of transformers"),
    ],
)
def test_wrong_arguments_of_the_other_functions_are_refused_in_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


MANY = (
    "Apertus",
    "Arcee",
    "Cohere2",
    "Cwm",
    "Ernie4_5",
    "Exaone4",
    "FlexOlmo",
    "Gemma",
    "Glm4",
    "GptOss",
    "Helium",
    "HunYuanDenseV1",
    "Jais2",
    "MiniMaxM2",
    "Ministral",
    "Mixtral",
    "Olmoe",
    "Phimoe",
    "Qwen2Moe",
    "Qwen3Moe",
    "SeedOss",
    "StableLm",
    "Starcoder2",
    "BitNet",
    "DiffLlama",
    "Doge",
    "Lfm2",
    "Phi",
    "Phi3",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_every_architecture_runs_converted_or_is_refused_in_words(name: str) -> None:
    try:
        windowed = hasattr(getattr(hf, f"{name}Config")(), "sliding_window")
        model = tiny(name, **{"sliding_window": 600} if windowed else {}).float()
        model(tokens(1, 6))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        pytest.skip(f"no tiny {name} in transformers {hf.__version__}: {error}")
    try:
        convert(model)
    except (ValueError, TypeError):
        assert not any(isinstance(m, RaceSelfAttention) for m in model.modules())
        return
    ids = tokens(2, 12)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(whole[:1, :7], model(ids[:1, :7], use_cache=False).logits, atol=1e-4, rtol=1e-4)
