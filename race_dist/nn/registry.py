"""The registry of layer kinds: the meaning of each letter of ``layer_pattern``, and the facts that other modules need.

A new kind of mixing layer joins with one file: a carry (:class:`race_dist.nn.mixing_layer.LayerCarry`), a layer
(:class:`race_dist.nn.mixing_layer.MixingLayer`), and a :class:`LayerKind` that is registered under a letter.
``tests/nn/gated_delta.py`` is a complete example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, Protocol, TypedDict, Unpack

import torch

from race_dist.nn.config import RaceConfig, SoftmaxConfig
from race_dist.nn.mixing_layer import MixingLayer
from race_dist.strict_config import StrictConfig


class ModelShape(Protocol):
    """What a layer kind reads of a model's config (:class:`race_dist.models.ModelConfig`)."""

    @property
    def dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int | None: ...
    @property
    def window(self) -> int: ...
    @property
    def rope_base(self) -> float | None: ...
    @property
    def race(self) -> RaceConfig: ...
    @property
    def softmax(self) -> SoftmaxConfig: ...


class BuildOptions(TypedDict, total=False):
    """Keyword arguments that every mixing layer takes.

    Attributes:
        output_gain: of the initial weight of the output projection.
        init_weights: whether to fill the weights now; otherwise :func:`race_dist.nn.initialize` fills them later.
        device, dtype: of the parameters.
    """

    output_gain: float
    init_weights: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class LayerKind(ABC):
    """One kind of mixing layer.

    Attributes:
        letter: in ``layer_pattern``, one capital letter.
        name: in messages, for example "sliding-window softmax".
        options_name: the field of ModelConfig that holds the layer's options; None: the kind holds its own.
        direction: "causal": a token reads only itself and the tokens before it; "either": the model decides; "config": the
            field ``causal`` of the options decides.
        fixed_size_carry: whether the carry's size is independent of the tokens seen. Otherwise a model cannot be streamed.
        carry_text: the contents of a carry that grows, for messages.
        cost: the planner's cost of such a layer, which :mod:`race_dist.planning` defines; nothing else reads it.
    """

    letter: str
    name: str
    options_name: str | None = None
    direction: Literal["causal", "either", "config"] = "causal"
    fixed_size_carry: bool = True
    carry_text: str = "a state of fixed size"
    cost: Any = None

    @abstractmethod
    def build(self, model: ModelShape, layer: int, *, causal: bool, **options: Unpack[BuildOptions]) -> MixingLayer:
        """The mixing layer of block ``layer`` in a model of this config."""

    @property
    def adjective(self) -> str:
        """The name before a noun: "a full-softmax layer"."""
        return self.name.replace(" ", "-")

    def options(self, model: ModelShape) -> StrictConfig | None:
        """The options of such layers in a model."""
        options: StrictConfig | None = None if self.options_name is None else getattr(model, self.options_name)
        return options

    def is_causal(self, model: ModelShape) -> bool | None:
        """Whether such layers are causal in a model; None where they follow the model."""
        if self.direction == "config":
            return bool(self.options(model).causal)  # type: ignore[union-attr]
        return True if self.direction == "causal" else None

    def why_not_subtracted(self, model: ModelShape, prefix: str = "") -> str | None:
        """The reason why the carry before a piece cannot be recovered by subtracting what the piece added, as the predicate of
        a sentence; None if it can, or if no tensor of the carry is a sum.

        Args:
            model: the config of the model.
            prefix: of the names of config fields in the message.
        """
        return None


_KINDS: dict[str, LayerKind] = {}


def register_layer_kind(kind: LayerKind) -> LayerKind:
    """Make ``kind`` available to every ``layer_pattern``.

    Raises:
        ValueError: the letter is no capital letter, or another kind has it.
    """
    if len(kind.letter) != 1 or not "A" <= kind.letter <= "Z":
        raise ValueError(f"a layer kind's letter must be one of A to Z; got {kind.letter!r}")
    if type(_KINDS.get(kind.letter, kind)) is not type(kind):
        raise ValueError(
            f"the letter {kind.letter} stands for {_KINDS[kind.letter].name} layers already: choose another letter"
        )
    _KINDS[kind.letter] = kind
    return kind


def unregister_layer_kind(letter: str) -> None:
    """Remove a kind again."""
    _KINDS.pop(layer_kind(letter).letter)


def layer_kind(letter: str) -> LayerKind:
    """The kind that a letter of ``layer_pattern`` stands for.

    Raises:
        ValueError: none is registered under it.
    """
    if letter not in _KINDS:
        raise ValueError(f"no layer kind is registered as {letter!r}; there are {described_kinds()}")
    return _KINDS[letter]


def registered_kinds() -> tuple[LayerKind, ...]:
    """All kinds, in the order of registration."""
    return tuple(_KINDS.values())


def kinds_in(letters: Iterable[str]) -> tuple[LayerKind, ...]:
    """The distinct kinds of a model's ``layer_kinds``, in the order of their first layers."""
    return tuple(layer_kind(letter) for letter in dict.fromkeys(letters))


def described_kinds() -> str:
    """``R = RACE, W = sliding-window softmax, ...``."""
    return ", ".join(f"{kind.letter} = {kind.name}" for kind in registered_kinds())


def streamable_letters() -> str:
    """``R and W``: the letters of layers whose carry has a fixed size."""
    *others, last = (kind.letter for kind in registered_kinds() if kind.fixed_size_carry)
    return f"{', '.join(others)} and {last}" if others else last
