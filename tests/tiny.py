"""Tiny models and a tokenizer shared by the tests."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, PreTrainedModel, PreTrainedTokenizerFast

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
    as_if_trained(model)
    return model


def tiny_llada_moe(seed: int = 0, **config: Any) -> LLaDAMoEModelLM:
    """A random LLaDA-MoE as `tiny_llada` is a random LLaDA: grouped heads, two of four experts for a token."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.15,
        "sampler_defaults": {"steps": 8, "gen_length": 8, "block_length": 4},
    }
    torch.manual_seed(seed)
    model = LLaDAMoEModelLM(LLaDAMoEConfig(**token_ids() | settings | config)).eval()
    as_if_trained(model)
    return model


def tiny_llada2(seed: int = 0, **config: Any) -> LLaDA2MoeModelLM:
    """A random LLaDA2 of a dense block and a mixture, decoding 8 tokens in blocks of four; two of six experts."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
        "block_length": 4,
        "initializer_range": 0.15,
        "sampler_defaults": {"steps": 4, "gen_length": 8, "block_length": 4},
    }
    torch.manual_seed(seed)
    model = LLaDA2MoeModelLM(LLaDA2MoeConfig(**token_ids() | settings | config)).eval()
    as_if_trained(model)
    return model


def tiny_sdar(seed: int = 0, **config: Any) -> SDARForCausalLM:
    """A random SDAR: grouped heads twice as wide as the residual stream, decoding 8 tokens in blocks of four."""
    torch.manual_seed(seed)
    settings = {"head_dim": 16, "block_size": 4, "sampler_defaults": {"gen_length": 8}}
    model = SDARForCausalLM(SDARConfig(**qwen_keys() | settings | config)).eval()
    as_if_trained(model)
    return model


def tiny_sdar_moe(seed: int = 0, **config: Any) -> SDARMoeForCausalLM:
    """A random SDAR with two of four experts for a token, decoding 8 tokens in blocks of four."""
    torch.manual_seed(seed)
    settings = {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "block_size": 4,
        "sampler_defaults": {"gen_length": 8},
    }
    model = SDARMoeForCausalLM(SDARMoeConfig(**qwen_keys() | settings | config)).eval()
    as_if_trained(model)
    return model


def tiny_fast_dllm(seed: int = 0, **config: Any) -> Fast_dLLM_QwenForCausalLM:
    """A random Fast-dLLM v2, decoding 8 tokens in blocks of four and sub-blocks of two."""
    torch.manual_seed(seed)
    settings = {"bd_size": 4, "sampler_defaults": {"gen_length": 8, "sub_block_length": 2}}
    model = Fast_dLLM_QwenForCausalLM(FastDLLMConfig(**qwen_keys() | settings | config)).eval()
    as_if_trained(model)
    return model


def qwen_keys() -> dict[str, Any]:
    """The keys that tiny models with Qwen's blocks have in common."""
    return token_ids() | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.15,
    }


def tiny_diffusion_gemma(seed: int = 0, text: dict[str, Any] | None = None, **config: Any) -> PreTrainedModel:
    """A random DiffusionGemma: a sliding and a full layer, two of four experts, canvases of 8 tokens in 6 steps."""
    text_config: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "bos_token_id": None,
        "initializer_range": 0.15,
    }
    own = {key: value for key, value in token_ids().items() if key != "mask_token_id"}
    vision_config = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 8,
    }
    settings: dict[str, Any] = {
        "text_config": own | text_config | (text or {}),
        "vision_config": vision_config,
        "canvas_length": 8,
        "initializer_range": 0.15,
        "sampler_defaults": {"steps": 6, "gen_length": 8, "canvas_length": 8},
    }
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**settings | config)).eval()
    as_if_trained(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):  # of the routers
                parameter.uniform_(0.5, 1.5)
        model.model.decoder.norm.weight.mul_(6)  # some tokens are sure, others are not
    return model


def token_ids() -> dict[str, Any]:
    """The keys of a configuration that the tiny tokenizer decides."""
    tokenizer = tiny_tokenizer()
    return {"vocab_size": len(tokenizer)} | {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "eos", "pad")
    }


def as_if_trained(model: torch.nn.Module) -> None:
    """Moves biases and norms as far from their initial values as those of trained models are, in place."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("bias") or "norm" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
