"""Patches of transformers' base classes that save and load RACE models: ``config.json`` records the attention.

transformers does not store the attention implementation in ``config.json`` and does not know converted layers, so a model
trained with RACE would be loaded as softmax. Importing this package therefore extends these methods of transformers' classes:

- ``PreTrainedConfig.to_dict`` writes ``_attn_implementation`` ("race", or "race_converted" if layers were converted) and
  every option of RACE. Every version of transformers reads that key; without this package it knows neither name and raises.
- ``PreTrainedConfig.from_dict`` gives an ``attn_implementation`` of the caller precedence over the stored one.
- ``PreTrainedModel._check_and_adjust_attn_implementation`` (called when a model is created or switched) checks the options,
  and refuses "race" for models with cross attention.
- ``PreTrainedModel.post_init`` (called at the end of each model's ``__init__``) inserts the converted layers.
- ``PreTrainedModel.from_pretrained`` recomputes the hyperplanes, which are not in a checkpoint, and checks that the weights
  were trained with the settings of the configuration. It refuses a configuration of the caller that names no attention if
  the saved one names "race".
- ``Trainer._load_from_checkpoint`` (called to resume a run) refuses a checkpoint with another attention.
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

from race_dist.integrations.transformers.decoder_hook import install_decoder_hook
from race_dist.integrations.transformers.layer import LOADING, RaceSelfAttention
from race_dist.integrations.transformers.settings import CONFIG_ENTRY, IMPLEMENTATION, Settings, stored_options

CONVERTED = "race_converted"  # the stored name of a model with converted layers
IMPLEMENTATION_KEY = "_attn_implementation"


def install(build: Callable[[PreTrainedModel, Settings], None]) -> None:
    """Patch transformers' base classes, once.

    Args:
        build: inserts the converted layers of the settings into a model that has none yet.
    """
    if hasattr(PretrainedConfig.to_dict, "race"):
        return
    _wrap(PretrainedConfig, "to_dict", _to_dict)
    _wrap(PretrainedConfig, "from_dict", _from_dict)
    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _check_implementation)
    _wrap(PreTrainedModel, "post_init", lambda original, self: _post_init(original, self, build))
    _wrap(PreTrainedModel, "from_pretrained", _from_pretrained)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method (or class method) by a call of ``around(original, self or class, ...)``."""
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
    result[IMPLEMENTATION_KEY] = entry
    if _own_implementation(config) == IMPLEMENTATION and not Settings.of(config).layers:
        settings = Settings.of(config)
        result[CONFIG_ENTRY] = settings.model_copy(
            update={"options": stored_options(settings.implementation_config())}
        ).model_dump(mode="json")
    return result


def _own_implementation(config: Any) -> str | None:
    """The implementation of one configuration: "race", "race_converted" or None for anything else."""
    if getattr(config, IMPLEMENTATION_KEY, None) == IMPLEMENTATION:
        return IMPLEMENTATION
    return CONVERTED if getattr(config, CONFIG_ENTRY, None) is not None and Settings.of(config).layers else None


def _stored_implementation(config: Any) -> str | dict[str, Any] | None:
    """The value to store: one name, or one name per sub-configuration (``""`` is the model's own) if they differ."""
    own = _own_implementation(config)
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: _stored_implementation(part) for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    if all(value == own for value in found.values()):
        return own
    return ({} if own is None else {"": own}) | {name: value for name, value in found.items() if value is not None}


def _from_dict(original: Any, cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    if kwargs.get("attn_implementation") is not None:
        config_dict = {name: value for name, value in config_dict.items() if name != IMPLEMENTATION_KEY}
    result = original(cls, config_dict, **kwargs)
    for config in _with_sub_configs(result[0] if isinstance(result, tuple) else result):
        if getattr(config, IMPLEMENTATION_KEY, None) == CONVERTED:
            config._attn_implementation_internal = None
    return result


def _with_sub_configs(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(nested for part in parts if isinstance(part, PretrainedConfig) for nested in _with_sub_configs(part))]


def _check_implementation(original: Any, model: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    if attn_implementation == CONVERTED and Settings.of(model.config).layers:
        attn_implementation = None
    if attn_implementation == IMPLEMENTATION:
        config = model.config
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
            raise ValueError(
                f"{type(model).__name__} has cross attention, from a decoder to its encoder, which "
                f'attn_implementation="{IMPLEMENTATION}" does not compute: use another implementation'
            )
        Settings.of(config).implementation_config()
        _install_hook(model, named=True)
    return original(model, attn_implementation, *args, **kwargs)


def _install_hook(model: Any, *, named: bool = False) -> None:
    """Install the decoder hook if the attention is "race", or is about to be (``named``). Models of another structure do
    without it: each of their layers then describes the batch itself."""
    if not named and getattr(model.config, IMPLEMENTATION_KEY, None) != IMPLEMENTATION:
        return
    with contextlib.suppress(TypeError, AttributeError):  # no decoder, or not created yet
        install_decoder_hook(model)


def _post_init(original: Any, model: Any, build: Callable[[PreTrainedModel, Settings], None]) -> None:
    original(model)
    _patch_trainer()
    _install_hook(model)
    settings = Settings.of(model.config)
    if not settings.layers:
        return
    build(model, settings)
    if LOADING.get():  # settings that the checkpoint does not fill stay zero, which finish_loading detects
        for module in model.modules():
            if isinstance(module, RaceSelfAttention):
                module.race_settings.zero_()


def _refuse_softmax_config(path: Any, config: Any, attn_implementation: Any) -> None:
    """Raise ValueError if the saved model has attn_implementation="race" and the caller's configuration names none."""
    chosen = getattr(config, IMPLEMENTATION_KEY + "_internal", None) is not None or attn_implementation is not None
    if chosen or not isinstance(config, PretrainedConfig) or not isinstance(path, (str, Path)):
        return
    stored, entries = Path(path) / "config.json", None
    with contextlib.suppress(OSError, ValueError):  # transformers reports the error itself
        entries = json.loads(stored.read_text(encoding="utf-8"))
    if isinstance(entries, dict) and entries.get(IMPLEMENTATION_KEY) == IMPLEMENTATION:
        raise ValueError(
            f'the model in {path} has attn_implementation="{IMPLEMENTATION}", but the given config names none, and '
            "the model would become softmax: leave config out, or pass attn_implementation=..."
        )


def _from_pretrained(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_softmax_config(
        args[0] if args else kwargs.get("pretrained_model_name_or_path"),
        kwargs.get("config"),
        kwargs.get("attn_implementation"),
    )
    token, return_info = LOADING.set(True), kwargs.pop("output_loading_info", False)
    try:
        model, info = original(cls, *args, output_loading_info=True, **kwargs)
    finally:
        LOADING.reset(token)
    leftover = sorted(name for name in info.get("unexpected_keys", ()) if name.endswith(".race_settings"))
    if leftover:
        raise ValueError(
            f"the checkpoint has RACE layers ({leftover[0].removesuffix('.race_settings')}, ...) which the model that "
            f"was created from the given configuration does not have: its config.{CONFIG_ENTRY} must list them, as "
            "the saved one does"
        )
    finish_loading(model)
    return (model, info) if return_info else model


def finish_loading(model: nn.Module) -> None:
    """Check that the weights of RACE layers fit their settings, and recompute the constants that are not in a checkpoint.

    Raises:
        ValueError: the weights of a RACE layer are not in the checkpoint, or were trained with other settings.
    """
    for name, module in model.named_modules():
        if isinstance(module, RaceSelfAttention):
            problem = module.settings_mismatch(module.race_settings)
            if problem is not None:
                raise ValueError(f"{name}: {problem}")
            module.reset_constants_on_weight_device()


# --- HF's Trainer is slow to import: it is patched when a model is created and the Trainer has been imported ---------------


def _patch_trainer() -> None:
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is not None and not hasattr(trainer._load_from_checkpoint, "race"):
        _wrap(trainer, "_load_from_checkpoint", _load_from_checkpoint)


def _load_from_checkpoint(original: Any, trainer: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
    model = next((m for m in (trainer.model, *args) if m is not None), None)
    check_same_attention(folder, getattr(model, "config", None))
    return original(trainer, folder, *args, **kwargs)


def check_same_attention(folder: str | Path, config: Any) -> None:
    """Raise ValueError if the checkpoint in a folder has another attention than a model with this configuration."""
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
            f"{differ}: create the model from the checkpoint's configuration, as from_pretrained does"
        )


def _attention(entries: dict[str, Any]) -> tuple[Any, Any]:
    """The implementation and the settings, without the backend, of a configuration in JSON form."""
    name, settings = entries.get(IMPLEMENTATION_KEY), entries.get(CONFIG_ENTRY) or {}
    options = {key: value for key, value in settings.get("options", {}).items() if key != "backend"}
    return name, (settings | {"options": options} if name else None)
