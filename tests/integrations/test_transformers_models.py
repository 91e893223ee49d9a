"""RACE in transformers models of every supported class: padding, packing, grouped queries, decoding, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from race_dist.integrations.transformers import (
    RaceSelfAttention,
    cached_bytes,
    convert,
    freeze_all_but,
    from_pretrained,
    trained_parts,
)
from tests.integrations.hf_models import KINDS, build, tokens

MODES = ("implementation", "converted", "hybrid", "inherited")
PAD = 1
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make(kind: str, mode: str, **changes: Any) -> Any:
    if mode == "implementation":
        return build(kind, implementation="race", **changes)
    if mode == "inherited":
        return convert(build(kind, **changes), inherit_rope=True, race={"decay": "multiscale", "normalization": "none"})
    return convert(build(kind, **changes), layers=[1] if mode == "hybrid" else None)


def cases() -> list[tuple[str, str]]:
    """GPT-NeoX rotates a quarter of each head, which a RACE layer cannot inherit."""
    return [(kind, mode) for kind in KINDS for mode in MODES if (kind, mode) != ("gpt_neox", "inherited")]


@pytest.fixture(params=cases(), ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    return make(*request.param)


def checkpoint(model: Any) -> None:
    """The cache, under the name of this version of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def test_a_later_token_changes_nothing_before_it_and_an_earlier_one_does(model: Any) -> None:
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] - 2) % 90 + 3
    before, after = logits(model, ids), logits(model, other)
    torch.testing.assert_close(before[:, :5], after[:, :5], **CLOSE)
    assert ((before - after).abs().amax(-1)[0, 5:] > 1e-4).all()


def test_padding_on_either_side_adds_nothing(model: Any) -> None:
    ids, lengths = tokens(3, 11), [11, 7, 9]
    for side in ("left", "right"):
        rows = torch.full((3, 11), PAD)
        mask = torch.zeros(3, 11, dtype=torch.long)
        for row, length in enumerate(lengths):
            at = slice(11 - length, 11) if side == "left" else slice(0, length)
            rows[row, at], mask[row, at] = ids[row, :length], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = logits(model, rows, attention_mask=mask, position_ids=positions)
        for row, length in enumerate(lengths):
            at = slice(11 - length, 11) if side == "left" else slice(0, length)
            torch.testing.assert_close(out[row, at], logits(model, ids[row : row + 1, :length])[0], **CLOSE)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_are_independent(model: Any, rows: int) -> None:
    lengths = [[4, 1, 7], [6, 3, 3]][:rows]
    ids = tokens(rows, 12)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    out = logits(model, ids, position_ids=positions)
    for row, parts in enumerate(lengths):
        alone = [logits(model, piece[None])[0] for piece in ids[row].split(parts)]
        torch.testing.assert_close(out[row], torch.cat(alone), **CLOSE)


def test_cu_seq_lens_say_the_same_as_positions() -> None:
    for mode in ("implementation", "converted"):
        model, ids = make("llama", mode), tokens(1, 12)
        positions = torch.cat([torch.arange(4), torch.arange(8)])[None]
        cu = torch.tensor([0, 4, 12], dtype=torch.int32)
        torch.testing.assert_close(
            logits(model, ids, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu),
            logits(model, ids, position_ids=positions),
            atol=0,
            rtol=0,
        )


@pytest.mark.parametrize("padded", [False, True])
def test_generation_has_the_logits_of_a_whole_forward_pass(model: Any, padded: bool) -> None:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    if padded:
        ids[1, :4], mask[1, :4] = PAD, 0
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=7,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=PAD,
        eos_token_id=None,
    )
    whole = torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], 1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)
    expected = logits(model, made.sequences, attention_mask=whole, position_ids=positions)[:, 8:-1]
    torch.testing.assert_close(torch.stack(made.logits, 1), expected, **CLOSE)


def test_beams_keep_their_own_states() -> None:
    model = make("llama", "converted")
    made = model.generate(
        tokens(2, 6),
        max_new_tokens=5,
        num_beams=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=PAD,
        eos_token_id=None,
        length_penalty=0.0,
    )
    scores = logits(model, made.sequences).log_softmax(-1)[:, 5:-1].gather(-1, made.sequences[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(made.sequences_scores, scores, **CLOSE)


def test_the_state_of_a_converted_model_does_not_grow() -> None:
    sizes = {}
    for mode in ("implementation", "converted"):
        model = make("llama", mode)
        for length in (8, 64):
            out = model(tokens(1, length), use_cache=True)
            sizes[mode, length] = cached_bytes(out["past_key_values"] if "past_key_values" in out else out["cache"])
    assert sizes["converted", 8] == sizes["converted", 64] > 0
    assert sizes["implementation", 64] == 8 * sizes["implementation", 8]


def test_a_converted_model_is_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    if model.config._attn_implementation == "race":
        from transformers import AutoModelForCausalLM

        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="race").eval()
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB")  # several files
        again = from_pretrained(tmp_path).eval()
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    ids = tokens(2, 10)
    assert torch.equal(logits(model, ids), logits(again, ids))
    again.save_pretrained(tmp_path / "again")
    if model.config._attn_implementation != "race":
        assert torch.equal(logits(from_pretrained(tmp_path / "again").eval(), ids), logits(model, ids))


def test_a_bfloat16_model_is_loaded_with_unrounded_planes(tmp_path: Path) -> None:
    model = convert(build("llama", dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert again.dtype == torch.bfloat16
    planes = [m.planes for m in again.modules() if isinstance(m, RaceSelfAttention)]
    assert all(p.dtype == torch.float32 for p in planes)
    ids = tokens(1, 10)
    assert torch.equal(logits(model, ids), logits(again, ids))


@pytest.mark.parametrize("mode", ["implementation", "converted", "hybrid"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, mode: str) -> None:
    ids, positions = tokens(2, 12), torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    gradients = []
    for checkpointing in (False, True):
        model = make(kind, mode).train()
        if checkpointing:
            checkpoint(model)
        model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_the_implementation_can_be_switched_to_and_back() -> None:
    model, ids = build("llama"), tokens(1, 10)
    softmax = logits(model, ids)
    model.set_attn_implementation("race")
    race = logits(model, ids)
    assert (race - softmax).abs().max() > 1e-3
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, ids), softmax)
    model.set_attn_implementation("race")
    assert torch.equal(logits(model, ids), race)
    assert set(model.state_dict()) == set(build("llama").state_dict())


def test_options_of_the_implementation_are_read_from_the_config() -> None:
    ids = tokens(1, 10)
    plain = logits(build("llama", implementation="race"), ids)
    more_planes = logits(
        build("llama", implementation="race", race_attention={"options": {"num_planes": 6, "num_tables": 1}}), ids
    )
    assert (plain - more_planes).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"decay need parameters.*convert"):
        logits(build("llama", implementation="race", race_attention={"options": {"decay": "token"}}), ids)
    with pytest.raises(ValueError, match=r"config.race_attention: unknown key option; did you mean options"):
        logits(build("llama", implementation="race", race_attention={"option": {}}), ids)


def test_the_implementation_is_the_attention_of_its_definition() -> None:
    """The attention of one layer against the sum over all pairs of tokens in float64, with transformers' queries and keys."""
    from race_dist import race_attention
    from race_dist.integrations.transformers import race_attention_forward
    from race_dist.nn.norm import rms

    module = build("llama", implementation="race", dtype=torch.float64).model.layers[1].self_attn
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2))
    out, weights = race_attention_forward(module, q, k, v, None, scaling=0.3)
    unit = lambda x: rms(x.transpose(1, 2), 1e-6) * 8**-0.5
    expected = race_attention(unit(q), unit(k), v.transpose(1, 2), module.race_core.planes, 2.0, backend="reference")
    assert weights is None
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


def test_a_bidirectional_layer_sees_both_ways_but_for_padding() -> None:
    from race_dist import race_attention
    from race_dist.integrations.transformers import race_attention_forward
    from race_dist.nn.norm import rms

    module = build("llama", implementation="race", dtype=torch.float64).model.layers[0].self_attn
    module.is_causal = False
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    out, _ = race_attention_forward(module, q, k, v, mask)
    unit = lambda x: rms(x.transpose(1, 2), 1e-6) * 8**-0.5
    expected = race_attention(
        unit(q), unit(k), v.transpose(1, 2), module.race_core.planes, 2.0, causal=False, key_mask=mask, backend="reference"
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"softcap": 30.0}, "caps its logits"),
        ({"s_aux": torch.zeros(4)}, "has attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "adds a position_bias to its logits"),
        ({"dropout": 0.1}, "drops attention weights"),
        ({"sliding_window": 4}, "sliding window of 4 tokens and 9 keys"),
    ],
)
def test_unsupported_attention_features_of_models_are_refused(asked: dict[str, Any], message: str) -> None:
    from race_dist.integrations.transformers import race_attention_forward

    module = build("llama", implementation="race").model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=message):
        race_attention_forward(module, q, k, v, None, **asked)


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({"attention_dropout": 0.1}, {}, "attention_dropout = 0"),
        ({}, {"attention_mask": torch.ones(1, 1, 10, 10)}, r"4-dimensional.*keep such layers softmax"),
        ({}, {"output_attentions": True}, "output_attentions=True asks for attention weights"),
    ],
)
def test_unsupported_arguments_of_calls_are_refused(changes: dict[str, Any], call: dict[str, Any], message: str) -> None:
    model = build("llama", implementation="race", **changes).train()
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 10), **call)
    if not changes:
        with pytest.raises(ValueError, match=message):
            make("llama", "converted")(tokens(1, 10), **call)


def test_a_sliding_window_is_refused_once_it_would_cut() -> None:
    model = build("mistral", implementation="race", sliding_window=8)
    logits(model, tokens(1, 8))
    with pytest.raises(ValueError, match=r"sliding window of 8 tokens and 9 keys.*sliding_window = None"):
        logits(model, tokens(1, 9))


def test_wrong_conversions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers must be among 0 to 1, at least one; got \[2\]"):
        convert(build("llama"), layers=[0, 2])
    model = convert(build("llama"), layers=[0])
    with pytest.raises(ValueError, match="layer 0 is a RACE layer already"):
        convert(model, layers=[0, 1])
    with pytest.raises(ValueError, match="with other options"):
        convert(model, layers=[1], race={"num_planes": 6})
    convert(model, layers=[1])
    assert model.config.race_attention["layers"] == [0, 1]
    with pytest.raises(ValueError, match="rotates 2 of 8 dimensions of a head"):
        convert(build("gpt_neox"), inherit_rope=True)
    with pytest.raises(TypeError, match="a transformers model is needed; got Linear"):
        convert(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_plain_model_is_not_read_as_a_converted_one(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no converted model"):
        from_pretrained(tmp_path)


def test_unsupported_caches_are_refused() -> None:
    model, ids = make("llama", "converted"), tokens(1, 8)
    with pytest.raises(TypeError, match="decode with a DynamicCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=PAD)
    with pytest.raises(ValueError, match=r"places for \d+ keys.*DynamicCache"):
        make("llama", "implementation").generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=PAD)
    out = model(ids, use_cache=True)
    cache = out["past_key_values"] if "past_key_values" in out else out["cache"]
    with pytest.raises(ValueError, match="cannot forget the last tokens"):
        cache.crop(-2)
    with pytest.raises(TypeError, match="the cache was made for another model"):
        build("llama")(tokens(1, 1), past_key_values=cache)


def test_only_the_new_parts_are_trained() -> None:
    model = convert(build("llama"), layers=[1])
    freeze_all_but(model, trained_parts(model, projections=False))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.1.self_attn.{n}"
        for n in ("q_scale", "k_scale", "log_beta", "decay_bias", "decay_proj.weight", "q_conv.weight", "k_conv.weight")
    }
