"""A protocol: the task, the budget, and the variants. Read from TOML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from race_dist.config_loader import ConfigLoader
from race_dist.strict_config import COUNT_LIMIT, SEED_LIMIT, SIZE_LIMIT, StrictConfig
from race_dist.training.config import OptimConfig
from race_dist.training.data.corpus import HeldOut

Mixer = Literal["model", "gated_delta", "gated_linear", "bucket_delta"]


class LanguageTask(StrictConfig):
    """Next-byte prediction.

    Attributes:
        path, pattern, held_out: as ``[data]`` of a training configuration.
        context: bytes of a training window.
        eval_context: bytes of a held-out window; None: ``context``.
        eval_tokens: at most so many tokens of the held-out text are evaluated.
        positions: number of equal parts of the context whose bits per byte are reported separately.
    """

    path: str = "python-stdlib"
    pattern: str = "*"
    held_out: HeldOut = "blocks"
    context: int = Field(1024, ge=1, le=SIZE_LIMIT)
    eval_context: int | None = Field(None, ge=1, le=SIZE_LIMIT)
    eval_tokens: int = Field(2**21, ge=1, le=COUNT_LIMIT)
    positions: int = Field(16, ge=1, le=2**16)


class Pairs(StrictConfig):
    """Sequences of ``length`` tokens that begin with ``pairs`` pairs of key and value; ``weight``: their share of the training
    steps."""

    length: int = Field(ge=4, le=SIZE_LIMIT)
    pairs: int = Field(ge=1, le=SIZE_LIMIT)
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 4 * self.pairs > self.length:
            raise ValueError(f"{self.pairs} pairs and as many queries need a length of {4 * self.pairs}; got {self.length}")
        return self


class RecallTask(StrictConfig):
    """Multi-query associative recall (MQAR) as zoology generates it: pairs first, then each key once more between
    random tokens, at distances drawn from a power law; the target at a key is its value.

    Attributes:
        train: kinds of training sequences; each step uses one kind.
        test: kinds of test sequences.
        examples: test sequences per kind.
        power: exponent of the distances (zoology's power_a).
    """

    train: tuple[Pairs, ...] = Field(min_length=1)
    test: tuple[Pairs, ...] = Field(min_length=1)
    examples: int = Field(1000, ge=1, le=SIZE_LIMIT)
    power: float = Field(0.01, gt=0)


class Variant(StrictConfig):
    """One of the compared models.

    Attributes:
        name: unique in the protocol.
        mixer: the layer at each R: "model" (RACE with ``model.race``) or a baseline of :mod:`.mixers`.
        model: keys of ModelConfig that differ from the protocol's, nested tables merged.
        rates: learning rates for the first seed; None: the protocol's.
        seeds: None: the protocol's.
        planes_lr: learning rate of trained planes; None: that of the rest.
        note: for the page.
    """

    name: str = Field(min_length=1)
    mixer: Mixer = "model"
    model: dict[str, Any] = Field(default_factory=dict)
    rates: tuple[Annotated[float, Field(ge=1e-38, le=1e3)], ...] | None = None
    seeds: tuple[Annotated[int, Field(ge=0, le=SEED_LIMIT)], ...] | None = None
    planes_lr: float | None = Field(None, gt=0)
    note: str = ""


class Protocol(StrictConfig):
    """The compared variants and their common settings.

    Attributes:
        name, about: for the page.
        task: exactly one of ``language`` and ``recall`` is given.
        seeds: of weights, planes and data. The first one also chooses the learning rate.
        rates: learning rates for the first seed; the other seeds use the best.
        steps, batch_size: of training.
        precision: "float32" or "bfloat16" (autocast).
        compiled: whether blocks are compiled with torch.compile (where that fails, the run prints it and continues without).
        parameters: trained numbers of every variant, set by the width of its feed-forward; None: the model's.
        feed_forward: False removes the feed-forward from every block.
        model: ModelConfig's keys, for all variants.
        optim: AdamW and the schedule; its lr is the run's.
        variant: the models.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = ""
    seeds: tuple[Annotated[int, Field(ge=0, le=SEED_LIMIT)], ...] = Field((0,), min_length=1)
    rates: tuple[float, ...] = Field((1e-3,), min_length=1)
    steps: int = Field(1200, ge=2, le=COUNT_LIMIT)
    batch_size: int = Field(32, ge=1, le=SIZE_LIMIT)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    compiled: bool = False
    parameters: int | None = Field(None, ge=1, le=COUNT_LIMIT)
    feed_forward: bool = True
    language: LanguageTask | None = None
    recall: RecallTask | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    optim: OptimConfig = OptimConfig()
    variant: tuple[Variant, ...] = Field(min_length=1)

    @field_validator("rates")
    @classmethod
    def _rates(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(1e-38 <= rate <= 1e3 for rate in value):
            raise ValueError("must be rates from 1e-38 to 1000")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.language is None) == (self.recall is None):
            raise ValueError("give one task: a table [language] or a table [recall]")
        names = [v.name for v in self.variant]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"variant names must differ; {', '.join(twice)} is there twice")
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, which leaves none of the {self.steps} steps; "
                "lower it or raise steps"
            )
        return self

    def chosen(self, names: Iterable[str]) -> Protocol:
        """Only the variants of these names. Raises ValueError for an unknown name."""
        selected = list(names)
        known = {v.name: v for v in self.variant}
        unknown = [name for name in selected if name not in known]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such variant; there are: {'; '.join(known)}")
        return self.model_copy(update={"variant": tuple(v for v in self.variant if v.name in selected)})


@dataclass(frozen=True)
class Run:
    """One training: a variant at a learning rate with a seed."""

    variant: Variant
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        return self.variant.name, self.rate, self.seed


def settings_digest(protocol: Protocol, variant: Variant) -> str:
    """Digest of all settings of a variant's runs except rate and seed, so that results of other settings are not reused."""
    common = protocol.model_dump(mode="json", exclude={"name", "about", "seeds", "rates", "variant", "compiled"})
    own = variant.model_dump(mode="json", exclude={"name", "note", "rates", "seeds"})
    return hashlib.sha256(json.dumps([common, own], sort_keys=True).encode()).hexdigest()[:16]


def load_protocol(path: Path, overrides: Iterable[str] = ()) -> Protocol:
    """Read a protocol; overrides are ``"a.b=value"`` with a TOML value.

    Raises:
        ValueError: it is not TOML, or a key is unknown or out of its range; one sentence that names the file and the key.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no protocol file {path}")
    return ConfigLoader(Protocol, "--override", "a.b=value, for example steps=100").load(path, overrides)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, nested tables merged."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
