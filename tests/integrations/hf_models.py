"""Small transformers models with random weights, one for every supported class."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
}
GROUPED = {"num_key_value_heads": 2}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, GROUPED),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, GROUPED),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, GROUPED | {"head_dim": 16}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, GROUPED | {"num_key_value_heads": 1}),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, {}),
}


def build(kind: str, *, implementation: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of ``kind``, in evaluation mode, the same on every call."""
    configuration, model, extra = KINDS[kind]
    config = configuration(**SIZES | extra | changes)
    config._attn_implementation = implementation
    torch.manual_seed(1)
    made = model(config).to(dtype).eval()
    for name, parameter in made.named_parameters():  # move biases and norms off their neutral values, which would hide errors
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return made


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without padding."""
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
