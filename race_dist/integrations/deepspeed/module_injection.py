"""Replace the attention modules of a model by RACE Attention, and set the ranks that share its sequences."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.distributed.communication import check_group
from race_dist.integrations.deepspeed.attention import SketchAttention
from race_dist.integrations.deepspeed.config import RACE_SECTION, RaceSection
from race_dist.models import Backbone
from race_dist.nn import RaceConfig
from race_dist.parallel.sharding import check_layout


class _GroupHook:
    """A forward pre-hook of this package's models: pass the sequence-parallel group, unless the caller passes one."""

    def __init__(self) -> None:
        self.group: ProcessGroup | None = None
        self.layout = "contiguous"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {"group": self.group, "layout": self.layout} | kwargs


def swap_attention(model: nn.Module, race: RaceSection | None, group: ProcessGroup | None, layout: str = "contiguous") -> None:
    """Replace every attention of ``model`` by RACE Attention over the ranks of ``group``, in place.

    - A model of this package (DecoderLM, ...) is not changed: the group is passed to its forward.
    - A transformers model is converted (``race_dist.integrations.transformers.convert``) unless its layers are RACE layers or
      its implementation is "race".
    - In any other model each ``DistributedAttention`` (Ulysses) is replaced by a :class:`SketchAttention`, and the group of
      SketchAttention modules is set.

    Args:
        model: the model.
        race: options; None: nothing is replaced, and only the group of existing RACE attention is set.
        group, layout: the ranks that share sequences, and the order of their shards.

    Raises:
        ValueError: ranks are to share sequences, but no attention in the model supports it.
    """
    checks.instance("model", model, nn.Module)
    if race is not None:
        checks.instance("race", race, RaceSection)
    check_group(group)
    check_layout(layout)
    if isinstance(model, Backbone):
        _pass_group(model, group, layout)
    elif _is_transformers(model):
        _share_transformers(model, race, group, layout)
    elif not _share_modules(model, race, group, layout) and (group is not None or race is not None):
        raise ValueError(
            f"{type(model).__name__} has no attention that supports sequence parallelism: use a transformers model, a model "
            "of race_dist, or a model with DistributedAttention or SketchAttention modules"
        )


def _pass_group(model: nn.Module, group: ProcessGroup | None, layout: str) -> None:
    hook = next((h for h in model._forward_pre_hooks.values() if isinstance(h, _GroupHook)), None)
    if hook is None:
        hook = _GroupHook()
        model.register_forward_pre_hook(hook, with_kwargs=True)
    hook.group, hook.layout = group, layout


def _is_transformers(model: nn.Module) -> bool:
    if find_spec("transformers") is None:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _share_transformers(model: Any, race: RaceSection | None, group: ProcessGroup | None, layout: str) -> None:
    from race_dist.integrations.transformers import convert, sequence_parallel
    from race_dist.integrations.transformers.decoder_hook import softmax_layers
    from race_dist.integrations.transformers.settings import Settings

    softmax = softmax_layers(model)
    if race is not None and softmax and not Settings.of(model.config).layers:
        convert(model, layers=race.layers, race=race.options, inherit_rope=race.inherit_rope)
    if group is not None:
        sequence_parallel(model, group, layout=layout)


def _share_modules(model: nn.Module, race: RaceSection | None, group: ProcessGroup | None, layout: str) -> int:
    """Replace Ulysses' modules and set the group of SketchAttention modules; return their number."""
    from deepspeed.sequence.layer import DistributedAttention

    found = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, SketchAttention):
            module.group, module.layout, found = group, layout, found + 1
        elif isinstance(module, DistributedAttention):
            if race is None:
                raise ValueError(
                    f'{name} is Ulysses\' DistributedAttention, which exchanges activations: give "{RACE_SECTION}" in the '
                    "DeepSpeed configuration to replace it"
                )
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            replaced = _sketch_attention(owner, race, group, layout, found, name)
            like = next(owner.parameters(), None)
            setattr(owner, leaf, replaced if like is None else replaced.to(device=like.device, dtype=like.dtype))
            found += 1
    return found


def _sketch_attention(
    owner: nn.Module, race: RaceSection, group: ProcessGroup | None, layout: str, index: int, name: str
) -> SketchAttention:
    """The SketchAttention for one place in a model; widths come from the section, or from attributes of the parent module."""
    options = dict(race.options)
    for field, names in (
        ("num_heads", ("num_heads", "num_attention_heads")),
        ("head_dim", ("head_dim",)),
        ("num_kv_heads", ("num_kv_heads", "num_key_value_heads")),
    ):
        for attribute in names:
            if field not in options and isinstance(getattr(owner, attribute, None), int):
                options[field] = getattr(owner, attribute)
    missing = [field for field in ("num_heads", "head_dim") if field not in options]
    if missing:
        raise ValueError(
            f'{name}: give {" and ".join(missing)} in "{RACE_SECTION}": {type(owner).__name__} has no such attribute'
        )
    return SketchAttention(RaceConfig.model_validate(options), group, layer=index, layout=layout)
