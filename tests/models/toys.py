"""Tiny LLaDA and Dream models for the tests."""

from typing import Any

import torch
from torch import nn

from dllmquant.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM

MASK, PAD = 30, 0


def tiny_config(**changes: Any) -> LLaDAConfig:
    """Two blocks, 16 wide, two heads, a 31-token vocabulary padded to 32 rows."""
    settings: dict[str, Any] = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "mlp_hidden_size": 24,
        "vocab_size": 31,
        "embedding_size": 32,
        "max_sequence_length": 64,
        "rope_theta": 100.0,
        "mask_token_id": MASK,
        "eos_token_id": PAD,
        "pad_token_id": PAD,
    }
    return LLaDAConfig(**(settings | changes))


def tiny_model(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> LLaDAModelLM:
    """A model whose weights, norms and biases are all far from their initial values, in evaluation mode."""
    model = LLaDAModelLM(tiny_config(**changes))
    nn.Module.to(model, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name or "ln_f" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif "wte" in name:  # small enough for the norms' epsilon to matter
                parameter.copy_(0.02 * noise)
            elif "q_proj" in name or "k_proj" in name:  # attention that is far from uniform
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def tiny_dream_config(**changes: Any) -> DreamConfig:
    """Two blocks, 16 wide, four heads that share two key/value heads, a 32-token vocabulary."""
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_theta": 100.0,
        "mask_token_id": MASK,
        "eos_token_id": PAD,
        "pad_token_id": PAD,
    }
    return DreamConfig(**(settings | changes))


def tiny_dream(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> DreamModel:
    """A model whose weights, norms and biases are all far from their initial values, in evaluation mode."""
    model = DreamModel(tiny_dream_config(**changes))
    nn.Module.to(model, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name:  # small enough for the norms' epsilon to matter
                parameter.copy_(0.02 * noise)
            elif "q_proj" in name or "k_proj" in name:  # attention that is far from uniform
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()
