"""Tiny models and a tokenizer shared by the tests."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from dllmquant.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from dllmquant.tasks.tokenizer import build_tokenizer


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The bundled model's tokenizer, built from fewer items."""
    return build_tokenizer(2000)


def tiny_llada(seed: int = 0, **config: Any) -> LLaDAModelLM:
    """A random LLaDA with weights large enough for its logits to differ, decoding 8 tokens in two blocks by default."""
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden_size": 64,
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "init_std": 0.15,
        "sampler_defaults": {"steps": 8, "gen_length": 8, "block_length": 4},
    }
    torch.manual_seed(seed)
    return LLaDAModelLM(LLaDAConfig(**settings | config)).eval()


def save_tiny(directory: Path, seed: int = 0, **config: Any) -> Path:
    """Saves a tiny model with its tokenizer."""
    tiny_llada(seed, **config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_recipe(**changes: Any) -> dict[str, Any]:
    """A quick DLLMQuant recipe for tiny models."""
    recipe: dict[str, Any] = {
        "extends": "dllmquant-w4a4",
        "name": "tiny",
        "weights": {"group_size": 16},
        "calibration": {"num_states": 12, "num_prompts": 4, "batch_size": 5},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(recipe.get(key), dict):
            recipe[key] = recipe[key] | value
        else:
            recipe[key] = value
    return recipe


def tiny_dream(seed: int = 0, **config: Any) -> DreamModel:
    """A random Dream as `tiny_llada` is a random LLaDA: grouped heads, biases, decoding 8 tokens in 6 steps."""
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.15,
        "sampler_defaults": {"steps": 6, "gen_length": 8},
    }
    torch.manual_seed(seed)
    model = DreamModel(DreamConfig(**settings | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # as far from their initial values as trained ones
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
