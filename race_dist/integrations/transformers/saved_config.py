"""What makes a saved model come back as it was: ``config.json`` says that the attention is RACE, and models are built by it.

transformers leaves the attention implementation out of ``config.json``, and knows nothing of converted layers: a model that was
trained with RACE would come back as softmax. So while this package is imported, some methods of transformers' base classes do
a little more:

- ``PreTrainedConfig.to_dict`` writes ``_attn_implementation`` ("race", or "race_converted" where layers were converted) and
  every option of RACE. transformers reads that key in every version; where this package is not imported it knows neither name
  and raises.
- ``PreTrainedConfig.from_dict`` lets an ``attn_implementation`` that the caller gives come before the stored one.
- ``PreTrainedModel._check_and_adjust_attn_implementation`` (each model asks it when it is made or switched) checks the options,
  and refuses "race" for models with cross attention.
- ``PreTrainedModel.post_init`` (the end of each model's ``__init__``) puts the converted layers in.
- ``PreTrainedModel.from_pretrained`` makes hyperplanes anew, which are in no checkpoint, and checks that the weights were
  trained with the settings that the configuration has. It refuses a configuration of the caller's that names no attention
  where the saved one says "race".
- ``Trainer._load_from_checkpoint`` (it resumes a run, by weights alone) refuses a checkpoint of another attention.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from race_dist.integrations.transformers.attach import install_decoder_hook
from race_dist.integrations.transformers.layer import LOADING, RaceSelfAttention
from race_dist.integrations.transformers.settings import CONFIG_ENTRY, IMPLEMENTATION, Settings, stored_options

CONVERTED = "race_converted"  # the stored name where layers were converted and the others are softmax
KEY = "_attn_implementation"


def install(build: Callable[[PreTrainedModel, Settings], None]) -> None:
    """Change transformers' base classes, once.

    Args:
        build: puts the converted layers of the settings into a model that has none yet.
    """
    if hasattr(PretrainedConfig.to_dict, "race"):
        return
    _wrap(PretrainedConfig, "to_dict", _to_dict)
    _wrap(PretrainedConfig, "from_dict", _from_dict)
    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _check_implementation)
    _wrap(PreTrainedModel, "post_init", lambda original, self: _post_init(original, self, build))
    _wrap(PreTrainedModel, "from_pretrained", _from_pretrained)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method (or class method) by ``around(original, self or class, ...)``."""
    found = owner.__dict__[name]
    original = found.__func__ if isinstance(found, classmethod) else found

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    method.__name__, method.__qualname__, method.__doc__ = name, original.__qualname__, original.__doc__
    method.__wrapped__ = original  # type: ignore[attr-defined]  # inspect.signature shows the original's
    method.race = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(method) if isinstance(found, classmethod) else method)


def _to_dict(original: Any, config: Any) -> dict[str, Any]:
    result: dict[str, Any] = original(config)
    entry = _stored_implementation(config)
    if entry is None:
        return result
    result[KEY] = entry
    if _own(config) == IMPLEMENTATION and not Settings.of(config).layers:
        settings = Settings.of(config)
        result[CONFIG_ENTRY] = settings.model_copy(
            update={"options": stored_options(settings.implementation_config())}
        ).model_dump(mode="json")
    return result


def _own(config: Any) -> str | None:
    """The implementation of one configuration: "race", "race_converted" or None for anything else."""
    if getattr(config, KEY, None) == IMPLEMENTATION:
        return IMPLEMENTATION
    return CONVERTED if getattr(config, CONFIG_ENTRY, None) is not None and Settings.of(config).layers else None


def _stored_implementation(config: Any) -> str | dict[str, Any] | None:
    """What to store: a name, or one per part (``""`` is the whole) where a model is made of several and they differ."""
    own = _own(config)
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: _stored_implementation(part) for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    if all(value == own for value in found.values()):
        return own
    return ({} if own is None else {"": own}) | {name: value for name, value in found.items() if value is not None}


def _from_dict(original: Any, cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    if kwargs.get("attn_implementation") is not None:
        config_dict = {name: value for name, value in config_dict.items() if name != KEY}
    made = original(cls, config_dict, **kwargs)
    for config in _with_parts(made[0] if isinstance(made, tuple) else made):
        if getattr(config, KEY, None) == CONVERTED:
            config._attn_implementation_internal = None
    return made


def _with_parts(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(each for part in parts if isinstance(part, PretrainedConfig) for each in _with_parts(part))]


def _check_implementation(original: Any, model: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    if attn_implementation == CONVERTED and Settings.of(model.config).layers:
        attn_implementation = None
    if attn_implementation == IMPLEMENTATION:
        config = model.config
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
            raise ValueError(
                f"{type(model).__name__} has cross attention, from a decoder to its encoder, which "
                f'attn_implementation="{IMPLEMENTATION}" does not compute: take another implementation'
            )
        Settings.of(config).implementation_config()
        _attach(model, named=True)
    return original(model, attn_implementation, *args, **kwargs)


def _attach(model: Any, *, named: bool = False) -> None:
    """Let a decoder whose attention is "race" (or is about to be: ``named``) look at its batches once for all layers. Models of
    another build do without: each layer looks then."""
    if not named and getattr(model.config, KEY, None) != IMPLEMENTATION:
        return
    with contextlib.suppress(TypeError, AttributeError):  # no decoder, or not yet made
        install_decoder_hook(model)


def _post_init(original: Any, model: Any, build: Callable[[PreTrainedModel, Settings], None]) -> None:
    original(model)
    _guard_trainer()
    _attach(model)
    settings = Settings.of(model.config)
    if not settings.layers:
        return
    build(model, settings)
    if LOADING.get():  # what the checkpoint does not fill is seen by it
        for module in model.modules():
            if isinstance(module, RaceSelfAttention):
                module.race_settings.zero_()


def _refuse_softmax_config(path: Any, config: Any, attn_implementation: Any) -> None:
    """Raise ValueError where a folder's model has attn_implementation="race" and the caller's own configuration names none."""
    chosen = getattr(config, KEY + "_internal", None) is not None or attn_implementation is not None
    if chosen or not isinstance(config, PretrainedConfig) or not isinstance(path, (str, Path)):
        return
    stored, entries = Path(path) / "config.json", None
    with contextlib.suppress(OSError, ValueError):  # transformers says what is wrong with it
        entries = json.loads(stored.read_text(encoding="utf-8"))
    if isinstance(entries, dict) and entries.get(KEY) == IMPLEMENTATION:
        raise ValueError(
            f'the model in {path} has attn_implementation="{IMPLEMENTATION}", but the given config names none, so '
            "that it would become softmax: leave config out, or say which by attn_implementation=..."
        )


def _from_pretrained(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_softmax_config(
        args[0] if args else kwargs.get("pretrained_model_name_or_path"),
        kwargs.get("config"),
        kwargs.get("attn_implementation"),
    )
    token, wanted = LOADING.set(True), kwargs.pop("output_loading_info", False)
    try:
        model, info = original(cls, *args, output_loading_info=True, **kwargs)
    finally:
        LOADING.reset(token)
    left = sorted(name for name in info.get("unexpected_keys", ()) if name.endswith(".race_settings"))
    if left:
        raise ValueError(
            f"the checkpoint has RACE layers ({left[0].removesuffix('.race_settings')}, ...) which the model that "
            f"was made of the given configuration has not: its config.{CONFIG_ENTRY} must name them, as the saved one's"
        )
    finish_loading(model)
    return (model, info) if wanted else model


def finish_loading(model: nn.Module) -> None:
    """Make what no checkpoint holds, and check that the weights belong to the settings.

    Raises:
        ValueError: a RACE layer's weights are not in the checkpoint, or were trained with other settings.
    """
    for name, module in model.named_modules():
        if isinstance(module, RaceSelfAttention):
            problem = module.settings_mismatch(module.race_settings)
            if problem is not None:
                raise ValueError(f"{name}: {problem}")
            module.reset_constants_on_weight_device()


# --- HF's Trainer, which is costly to import: it is changed once it is there and a model is made --------------------------


def _guard_trainer() -> None:
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is not None and not hasattr(trainer._load_from_checkpoint, "race"):
        _wrap(trainer, "_load_from_checkpoint", _resume)


def _resume(original: Any, trainer: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
    model = next((m for m in (trainer.model, *args) if m is not None), None)
    check_same_attention(folder, getattr(model, "config", None))
    return original(trainer, folder, *args, **kwargs)


def check_same_attention(folder: str | Path, config: Any) -> None:
    """Raise ValueError where the checkpoint in a folder has another attention than a model of this configuration."""
    stored = Path(folder) / "config.json"
    if not isinstance(config, PretrainedConfig) or not stored.is_file():
        return
    texts = stored.read_text(encoding="utf-8"), json.dumps(config.to_dict(), default=str)
    found = [_attention(json.loads(text)) for text in texts]
    if found[0] != found[1]:
        names = [entry[0] or "softmax" for entry in found]
        differ = "" if names[0] != names[1] else f", with other settings: {found[0][1]} there and {found[1][1]} here"
        raise ValueError(
            f"the checkpoint {folder} was trained with the attention {names[0]}, but the model has {names[1]}"
            f"{differ}: make the model of the checkpoint's configuration, from_pretrained does"
        )


def _attention(entries: dict[str, Any]) -> tuple[Any, Any]:
    """Implementation and settings, but for the backend, of a configuration as JSON has it."""
    name, settings = entries.get(KEY), entries.get(CONFIG_ENTRY) or {}
    options = {key: value for key, value in settings.get("options", {}).items() if key != "backend"}
    return name, (settings | {"options": options} if name else None)
