"""Tiny models of the families for the tests."""

from typing import Any

import torch
from torch import nn

from dllmquant.models import (
    DreamConfig,
    DreamModel,
    Fast_dLLM_QwenForCausalLM,
    FastDLLMConfig,
    LLaDA2MoeConfig,
    LLaDA2MoeModelLM,
    LLaDAConfig,
    LLaDAModelLM,
    LLaDAMoEConfig,
    LLaDAMoEModelLM,
    SDARConfig,
    SDARForCausalLM,
    SDARMoeConfig,
    SDARMoeForCausalLM,
)

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


def tiny_llada_moe_config(**changes: Any) -> LLaDAMoEConfig:
    """Two blocks, 16 wide, four heads that share two key/value heads, two of six experts for a token, 32 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "expert_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "rope_theta": 100.0,
        "mask_token_id": MASK,
        "eos_token_id": PAD,
        "pad_token_id": PAD,
    }
    return LLaDAMoEConfig(**(settings | changes))


def tiny_llada_moe(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> LLaDAMoEModelLM:
    """A model whose weights and norms are all far from their initial values, in evaluation mode."""
    model = LLaDAMoEModelLM(tiny_llada_moe_config(**changes))
    randomize(model, seed, dtype)
    return model.eval()


def tiny_llada2_config(**changes: Any) -> LLaDA2MoeConfig:
    """A dense block and two mixtures, 16 wide, four heads of 8, half of it rotated, blocks of four tokens.

    Three of twelve experts for a token, from two groups of four.
    """
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "block_length": 4,
        "max_position_embeddings": 64,
        "rope_theta": 100.0,
        "mask_token_id": MASK,
        "eos_token_id": PAD,
        "pad_token_id": PAD,
    }
    return LLaDA2MoeConfig(**(settings | changes))


def tiny_llada2(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> LLaDA2MoeModelLM:
    """A model whose weights, norms and expert biases are all far from their initial values, in evaluation mode."""
    model = LLaDA2MoeModelLM(tiny_llada2_config(**changes))
    randomize(model, seed, dtype)
    return model.eval()


def tiny_qwen_keys(**changes: Any) -> dict[str, Any]:
    """Two blocks, 16 wide, four heads of 8 that share two key/value heads, a 32-token vocabulary."""
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 100.0,
        "mask_token_id": MASK,
        "eos_token_id": PAD,
        "pad_token_id": PAD,
    }
    return settings | changes


def tiny_sdar(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> SDARForCausalLM:
    """A model whose weights and norms are all far from their initial values, in blocks of four tokens."""
    model = SDARForCausalLM(SDARConfig(**tiny_qwen_keys(**{"block_size": 4} | changes)))
    randomize(model, seed, dtype)
    return model.eval()


def tiny_sdar_moe(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> SDARMoeForCausalLM:
    """The same with two of six experts for a token."""
    mixture = {"block_size": 4, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = SDARMoeForCausalLM(SDARMoeConfig(**tiny_qwen_keys(**mixture | changes)))
    randomize(model, seed, dtype)
    return model.eval()


def tiny_fast_dllm(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Fast_dLLM_QwenForCausalLM:
    """A model whose weights, norms and biases are all far from their initial values, in blocks of four tokens."""
    model = Fast_dLLM_QwenForCausalLM(FastDLLMConfig(**tiny_qwen_keys(**{"bd_size": 4, "head_dim": None} | changes)))
    randomize(model, seed, dtype)
    return model.eval()


def randomize(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Draws every weight and buffer of a model with query and key norms anew, in place."""
    nn.Module.to(model, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                tensor.copy_((2 if "self_attn" in name or "attention." in name else 1) * (1 + 0.3 * noise))
            elif "embed" in name:  # small enough for the norms' epsilon to matter
                tensor.copy_(0.02 * noise)
            else:
                tensor.copy_(0.3 * noise)
