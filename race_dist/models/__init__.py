"""Models: a decoder language model, a bidirectional encoder, and generation."""

import warnings

from race_dist.models.backbone import Backbone, ModelCarry
from race_dist.models.classifier import SequenceClassifier
from race_dist.models.config import ModelConfig
from race_dist.models.generate import PromptState, generate, prefill, sample
from race_dist.models.language import DecoderLM, LanguageModel, MaskedLM
from race_dist.models.loss import linear_cross_entropy

__all__ = [
    "Backbone",
    "DecoderLM",
    "LanguageModel",
    "MaskedLM",
    "ModelCarry",
    "ModelConfig",
    "PromptState",
    "SequenceClassifier",
    "generate",
    "linear_cross_entropy",
    "prefill",
    "sample",
]

_FORMER_NAMES = {"read": "prefill", "Context": "PromptState"}  # they work for one more release


def __getattr__(name: str) -> object:
    if name not in _FORMER_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _FORMER_NAMES[name]
    warnings.warn(f"race_dist.models.{name} is now race_dist.models.{new}", DeprecationWarning, stacklevel=2)
    return globals()[new]
