"""Models: a decoder language model, a bidirectional encoder, and generation."""

from race_dist.models.backbone import Backbone, ModelCarry
from race_dist.models.classifier import SequenceClassifier
from race_dist.models.config import ModelConfig
from race_dist.models.generate import PromptState, generate, prefill, sample
from race_dist.models.language import DecoderLM, LanguageModel, MaskedLM
from race_dist.models.loss import linear_cross_entropy
from race_dist.renamed_modules import renamed_attribute

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

RENAMED = {"Context": "PromptState", "read": "prefill"}


def __getattr__(name: str) -> object:
    return renamed_attribute(__name__, RENAMED, name)
