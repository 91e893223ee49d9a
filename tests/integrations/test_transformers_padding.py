"""Padding is absent: every real token of a transformers model gets the same as in the row without padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist.integrations.transformers import convert
from tests.integrations.hf_models import build, tokens

F64 = torch.float64
EXACT = {"atol": 1e-9, "rtol": 1e-9}
ROWS = {
    "left": "0001111111",
    "right": "1111111000",
    "inside": "1110001111",
    "all over": "0101100110",
    "one token": "0000010000",
    "none": "1111111111",
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "race": ("llama", {}),
    "race-qwen3": ("qwen3", {}),
    "race-neox": ("gpt_neox", {}),
    "converted": ("llama", {}),
    "converted-bias": ("qwen2", {}),
    "converted-neox": ("gpt_neox", {"race": {"decay": "multiscale", "normalization": "none"}}),
    "converted-rope": ("llama", {"race": {"decay": "none", "short_conv": 0}}),
    "converted-inherit": ("llama", {"race": {"decay": "none"}, "inherit_rope": True}),
    "hybrid": ("llama", {"layers": [0]}),
    "hybrid-last": ("mistral", {"layers": [1]}),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    kind, options = KINDS[request.param]
    made = build(kind, dtype=F64) if request.param.split("-")[0] != "race" else build(kind, implementation="race", dtype=F64)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)  # large weights, because small ones could hide an error
    return made if request.param.split("-")[0] == "race" else convert(made, **options)


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[int(bit) for bit in row] for row in rows])


def padded(mask: Tensor, ids: Tensor, pad: int = 55) -> Tensor:
    """``ids [B, n]`` at the real tokens of each row, and ``pad`` elsewhere."""
    rows = torch.full(mask.shape, pad)
    for row, real, source in zip(rows, mask.bool(), ids, strict=True):
        row[real] = source[: int(real.sum())]
    return rows


def cache_of(out: Any) -> Any:
    return out["past_key_values"] if "past_key_values" in out else out["cache"]


def going_on(model: Any, cache: Any) -> dict[str, Any]:
    """A cache, under the name of this version of transformers."""
    return {"cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values": cache}


@torch.no_grad()
def logits(model: Any, ids: Tensor, **how: Any) -> Tensor:
    return model(ids, use_cache=False, **how).logits


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_real_tokens_get_the_logits_of_the_row_without_padding(model: Any, given: bool) -> None:
    mask, ids = mask_of(*ROWS.values()), tokens(len(ROWS), 10)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if given else {}
    out, other = (logits(model, padded(mask, ids, pad), attention_mask=mask, **positions) for pad in (1, 55))
    assert out.isfinite().all()
    for row, name in enumerate(ROWS):
        real = mask[row].bool()
        alone = logits(model, ids[row : row + 1, : int(real.sum())])[0]
        torch.testing.assert_close(out[row, real], alone, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(other[row, real], alone, **EXACT)


def test_positions_that_the_caller_gives_stand(model: Any) -> None:
    mask, ids = mask_of("1100111", "1111111"), tokens(2, 7)
    positions = torch.tensor([[4, 5, 0, 0, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6]])
    out = logits(model, padded(mask, ids), attention_mask=mask, position_ids=positions)
    real = mask[0].bool()
    alone = logits(model, ids[:1, :5], attention_mask=torch.ones(1, 5, dtype=torch.long), position_ids=positions[:1, real])
    torch.testing.assert_close(out[0, real], alone[0], **EXACT)


def test_gradients_are_those_of_the_row_without_padding(model: Any) -> None:
    mask, ids = mask_of("0110011101"), tokens(1, 6)
    rows = padded(mask, ids)
    found = []
    for batch in ({"input_ids": rows, "attention_mask": mask}, {"input_ids": ids}):
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        model.zero_grad()
        model(**batch, use_cache=False).logits[real].square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        scale = gradient.abs().max().clamp(min=1e-12)
        assert ((found[0][name] - gradient).abs().max() / scale) < 1e-9, name


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_a_turn_on_a_warm_cache_goes_on_from_real_tokens(model: Any, given: bool) -> None:
    """Three turns of a conversation, with padding in each."""
    mask, ids = mask_of("00111110101", "11011011011"), tokens(2, 9)
    rows = padded(mask, ids)
    positions, cache, outs = (mask.cumsum(-1) - 1).clamp(min=0), None, []
    for first, last in ((0, 5), (5, 9), (9, 11)):
        more = {"position_ids": positions[:, first:last]} if given else {}
        with torch.no_grad():
            out = model(rows[:, first:last], attention_mask=mask[:, :last], use_cache=True, **going_on(model, cache), **more)
        cache = cache_of(out)
        outs.append(out.logits)
    whole = torch.cat(outs, 1)
    for row in range(2):
        real = mask[row].bool()
        torch.testing.assert_close(whole[row, real], logits(model, ids[row : row + 1, : int(real.sum())])[0], **EXACT)


def test_generation_goes_on_from_prompts_padded_anywhere(model: Any) -> None:
    mask, ids = mask_of("000011", "110101", "111111"), tokens(3, 6)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    made = model.generate(padded(mask, ids), attention_mask=mask, **how)[:, 6:]
    for row in range(3):
        alone = ids[row : row + 1, : int(mask[row].sum())]
        assert torch.equal(made[row], model.generate(alone, attention_mask=torch.ones_like(alone), **how)[0, -5:])
    beams = model.generate(padded(mask, ids), attention_mask=mask, num_beams=2, **how)[:, 6:]
    for row in range(3):
        alone = ids[row : row + 1, : int(mask[row].sum())]
        assert torch.equal(beams[row], model.generate(alone, attention_mask=torch.ones_like(alone), num_beams=2, **how)[0, -5:])


def test_masks_of_wrong_shapes_are_refused() -> None:
    model, ids = convert(build("llama")), tokens(1, 6)
    cache = going_on(model, cache_of(model(ids, use_cache=True)))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, past \+ new tokens\] = \[1, 8\] \(6 tokens are in"):
        model(ids[:, :2], attention_mask=torch.ones(1, 2, dtype=torch.long), **cache)
    with pytest.raises(ValueError, match=r"says that \[4\] of 6 tokens in the cache are not padding, .* have seen \[6\]"):
        model(ids[:, :2], attention_mask=mask_of("00111111"), **cache)
    with pytest.raises(ValueError, match=r"= \[1, 6\]"):
        model(ids, attention_mask=torch.ones(1, 9, dtype=torch.long))
