"""Tiny models and a tokenizer shared by the tests."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from dllmquant.models import LLaDAConfig, LLaDAModelLM
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
