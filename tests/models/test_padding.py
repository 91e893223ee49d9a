"""A masked token is absent: each row of a padded batch equals the row without its padding, in every mode of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist.models import DecoderLM, MaskedLM, ModelCarry, ModelConfig, SequenceClassifier
from race_dist.nn import RaceConfig, Sequence

F64 = torch.float64
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "R": ("RR", {}),
    "R, multiscale and positions": ("RR", {"decay": "multiscale", "normalization": "global", "rope_base": 100.0}),
    "R, bucket": ("RR", {"decay": "none", "normalization": "bucket", "short_conv": 0}),
    "W": ("WW", {}),
    "S": ("SS", {}),
    "mixed": ("RWS", {"decay": "token", "normalization": "bucket", "rope_base": 50.0, "short_conv": 3}),
}
MASKS = [
    "------###########",
    "###########------",
    "#-##---##-#--####",
    "#################",
    "-----------------",
    "--###-#---##-#---",
    "----------------#",
]


def mask_of(*rows: str) -> Tensor:
    """``[B, T]``, True for each ``#``."""
    return torch.tensor([[c == "#" for c in row] for row in rows])


def decoder(name: str, **options: Any) -> DecoderLM:
    pattern, race = MODELS[name]
    return DecoderLM(config(pattern, **race).model_copy(update=options), dtype=F64)


def config(pattern: str, **race: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=23,
        dim=16,
        num_layers=len(pattern),
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=16,
        layer_pattern=pattern,
        window=4,
        race=RaceConfig(num_tables=2, num_planes=2, **race),
    )


def text(mask: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels; some labels are -100, and padding has both."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, 23, mask.shape, generator=generator) for _ in range(2))
    labels[:, 3:5] = -100
    return ids, labels


def gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    """The gradient of every parameter, 0 where there is none."""
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_the_row_without_its_padding(name: str) -> None:
    model, mask = decoder(name), mask_of(*MASKS)
    ids, labels = text(mask)
    logits = model(ids, key_mask=mask)
    for b, real in enumerate(mask):
        close(logits[b, real], model(ids[b : b + 1, real])[0])
    assert logits.isfinite().all()
    other = torch.where(mask, ids, (ids + 7) % 23)  # the ids of padding change nothing
    assert torch.equal(model(other, key_mask=mask)[mask], logits[mask])

    loss = model(ids, labels, key_mask=mask)
    count = int((labels[mask] != -100).sum())
    alone = [model(ids[b : b + 1, real], labels[b : b + 1, real], num_targets=count) for b, real in enumerate(mask)]
    close(loss, sum(alone))
    close(gradients(model, loss), gradients(model, sum(alone)))


@pytest.mark.parametrize("name", ["R", "mixed"])
def test_padding_has_no_gradient(name: str) -> None:
    """A loss that reads the hidden states of padding, and more than labels, equals that of the real tokens."""
    model, mask = decoder(name), mask_of(*MASKS)
    ids, _ = text(mask)
    weight = torch.randn(*mask.shape, 16, generator=torch.Generator().manual_seed(1), dtype=F64)
    embedded: list[Tensor] = []
    model.embed.register_forward_hook(lambda module, args, out: embedded.append(out))
    h, _ = model.hidden(ids, key_mask=mask)
    found = gradients(model, (h * weight).sum())
    (dx,) = torch.autograd.grad((model.hidden(ids, key_mask=mask)[0] * weight).sum(), embedded[-1:])
    assert not dx[~mask].any()
    close(
        found,
        gradients(
            model, sum((model.hidden(ids[b : b + 1, real])[0] * weight[b : b + 1, real]).sum() for b, real in enumerate(mask))
        ),
    )


def assert_same_carry(carry: ModelCarry, b: int, alone: ModelCarry) -> None:
    """Row ``b`` of a carry; the keys of full softmax are compared where they are seen."""
    assert int(carry.position[b]) == int(alone.position)
    for mine, theirs in zip(carry.layers, alone.layers, strict=True):
        if hasattr(mine, "visible"):
            close([x[b][mine.visible[b]] for x in mine.tensors()], [x[0][theirs.visible[0]] for x in theirs.tensors()])
        else:
            close([x[b] for x in mine.tensors()], [x[0] for x in theirs.tensors()])


@pytest.mark.parametrize("name", MODELS)
def test_turns_go_on_from_real_tokens(name: str) -> None:
    """A padded prompt, a padded second turn on its carry, a token that some rows lack, and tokens without a mask: carries,
    hidden states and gradients through all of it."""
    model, masks = decoder(name), [mask_of(*MASKS), mask_of(*reversed(MASKS)), mask_of(*"#-##-#-"), None, None]
    turns = [
        text(mask if mask is not None else torch.ones(len(MASKS), n, dtype=torch.bool), seed=i)[0]
        for i, (mask, n) in enumerate(zip(masks, (17, 17, 1, 1, 3), strict=True))
    ]
    carry, hidden = None, []
    for ids, mask in zip(turns, masks, strict=True):
        h, carry = model.hidden(ids, carry, key_mask=mask)
        hidden.append(h)
    assert carry is not None
    every = torch.cat([torch.ones_like(t, dtype=torch.bool) if m is None else m for t, m in zip(turns, masks, strict=True)], 1)
    ids, h = torch.cat(turns, 1), torch.cat(hidden, 1)
    total = torch.zeros((), dtype=F64)
    for b, real in enumerate(every):
        alone, last = model.hidden(ids[b : b + 1, real])
        close(h[b, real], alone[0])
        assert last is not None
        assert_same_carry(carry, b, last)
        total = total + alone.square().sum()
    close(gradients(model, h.square().sum()), gradients(model, total))


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_with_padding(name: str) -> None:
    """Padding inside documents, documents of padding only, and a carry into the first document."""
    model, mask = decoder(name), mask_of("#-##---##-#--####-----##-#--##")
    cu, real = torch.tensor([0, 5, 5, 11, 17, 22, 30]), mask[0]
    ids, labels = text(mask)
    compacted = torch.cat([torch.zeros(1, dtype=torch.int64), mask[0].cumsum(0)])[cu]
    prompt, prompt_mask = text(mask_of("##-#-"))[0], mask_of("##-#-")
    _, before = model.hidden(prompt, key_mask=prompt_mask)
    _, alone = model.hidden(prompt[:, prompt_mask[0]])
    h, carry = model.hidden(ids, before, cu_seqlens=cu, key_mask=mask)
    expected, last = model.hidden(ids[:, real], alone, cu_seqlens=compacted)
    assert carry is not None
    assert last is not None
    close(h[0, real], expected[0])
    assert_same_carry(carry, 0, last)
    close(gradients(model, h.square().sum()), gradients(model, expected.square().sum()))
    loss = model(ids, labels, cu_seqlens=cu, key_mask=mask)
    close(loss, model(ids[:, real], labels[:, real], cu_seqlens=compacted))


def test_ids_and_labels_of_padding_are_not_looked_at() -> None:
    model, mask = decoder("R"), mask_of("##--#")
    ids, labels = text(mask)
    strange, unset = torch.where(mask, ids, -1), torch.where(mask, labels, 99)
    assert torch.equal(model(strange, unset, key_mask=mask), model(ids, labels, key_mask=mask))
    with pytest.raises(ValueError, match="input_ids must be from 0 to"):
        model(torch.where(mask, -1, ids), key_mask=mask)


@pytest.mark.parametrize("name", MODELS)
def test_layers_whose_input_is_not_finite_at_padding(name: str) -> None:
    """As after a layer that divides 0 by 0 at padding."""
    model, mask = decoder(name), mask_of(*MASKS)
    x = torch.randn(*mask.shape, 16, generator=torch.Generator().manual_seed(4), dtype=F64)
    strange = torch.where(mask[..., None], x, float("nan"))
    for block in model.blocks:
        found = []
        for given in (x, strange):
            leaf = given.clone().requires_grad_()
            y, _ = block.mixer(leaf, None, Sequence.of(mask.shape[1], key_mask=mask))
            found.append([y, *torch.autograd.grad(y[mask].square().sum(), [leaf, *block.mixer.parameters()])])
        for plain, other in zip(*found, strict=True):
            assert torch.equal(plain, other)
        assert not found[1][1][~mask].any()


def test_recomputed_and_compiled_blocks() -> None:
    mask = mask_of(*MASKS)
    ids, labels = text(mask)
    plain, recomputed = decoder("mixed"), decoder("mixed", activation_checkpointing=True)
    loss = plain(ids, labels, key_mask=mask)
    close(gradients(recomputed, recomputed(ids, labels, key_mask=mask)), gradients(plain, loss))
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    close(compiled(ids, labels, key_mask=mask), loss)


@pytest.mark.parametrize("pattern", ["RR", "RS"])
def test_encoders(pattern: str) -> None:
    mask = mask_of(*MASKS)
    ids, labels = text(mask)
    model = MaskedLM(config(pattern, causal=False), dtype=F64)
    classifier = SequenceClassifier(config(pattern, causal=False), 3, dtype=F64)
    loss, count = model(ids, labels, key_mask=mask), int((labels[mask] != -100).sum())
    alone = [model(ids[b : b + 1, real], labels[b : b + 1, real], num_targets=count) for b, real in enumerate(mask)]
    close(loss, sum(alone))
    close(gradients(model, loss), gradients(model, sum(alone)))
    logits, classes = classifier(ids, key_mask=mask), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    single = torch.cat([classifier(ids[b : b + 1, real]) for b, real in enumerate(mask)])
    close(logits, single)
    close(
        gradients(classifier, classifier(ids, classes, key_mask=mask)),
        gradients(classifier, torch.nn.functional.cross_entropy(single, classes)),
    )
