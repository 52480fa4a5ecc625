"""What is published of the checkpoints: their config.json, and the names and shapes of their weights."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from dllmquant.core.grid import Grid
from dllmquant.nn.linear import QuantLinear

Shapes = dict[str, tuple[int, ...]]

# config.json of GSAI-ML/LLaDA-8B-Instruct (LLaDA-8B-Base and LLaDA-1.5 have the same architecture).
LLADA_8B: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}

# config.json of Dream-org/Dream-v0-Instruct-7B (Dream-v0-Base-7B, the Dream-Coders and apple/DiffuCoder-7B-* have the
# same architecture).
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

# config.json of inclusionAI/LLaDA-MoE-7B-A1B-Instruct (LLaDA-MoE-7B-A1B-Base has the same architecture). The names are
# those that the published configuration code reads; the sizes are those that reports on the checkpoint give.
LLADA_MOE_7B: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "eos_token_id": 156892,
    "expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "llada",
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "vocab_size": 157184,
}

# config.json of inclusionAI/LLaDA2.0-mini.
LLADA2_MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_qkv_bias": False,
    "vocab_size": 157184,
}

# config.json of JetLM/SDAR-4B-Chat (TraDo-4B-Instruct has the same architecture).
SDAR_4B: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "block_size": 4,
    "bos_token_id": 151643,
    "debug": False,
    "eos_token_id": 151643,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "mask_token_id": 151669,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# config.json of JetLM/SDAR-30B-A3B-Chat: the sizes are those of Qwen3-30B-A3B, which it was made from.
SDAR_30B: dict[str, Any] = {
    "architectures": ["SDARMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 4,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "mask_token_id": 151669,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# config.json of Efficient-Large-Model/Fast_dLLM_v2_7B: that of Qwen2.5-7B-Instruct, with the keys of its own code.
FAST_DLLM_7B: dict[str, Any] = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenForCausalLM",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": 32,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "Fast_dLLM_Qwen",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

# config.json of google/diffusiongemma-26B-A4B-it, as public tests of other programs quote it; its vision tower is that
# of Gemma 4 26B-A4B. The weights below make 51,647,562,456 bytes, the 11 published files have 51,647,701,024: the rest
# is what the headers of files with these names take.
DIFFUSION_GEMMA_26B: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "boi_token_id": 255999,
    "canvas_length": 256,
    "eoi_token_id": 258882,
    "image_token_id": 258880,
    "model_type": "diffusion_gemma",
    "text_config": {
        "attention_bias": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "max_position_embeddings": 262144,
        "model_type": "diffusion_gemma_text",
        "moe_intermediate_size": 704,
        "num_attention_heads": 16,
        "num_experts": 128,
        "num_global_key_value_heads": 2,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
        "top_k_experts": 8,
        "vocab_size": 262144,
    },
    "tie_word_embeddings": True,
    "vision_config": {
        "head_dim": 72,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "gemma4_vision",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "patch_size": 16,
        "position_embedding_size": 10240,
        "standardize": True,
    },
}


def llada_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the weights of a LLaDA checkpoint, from its config.json."""
    width, hidden, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    per_block = {
        "attn_norm": (width,),
        "q_proj": (width, width),
        "k_proj": (width, width),
        "v_proj": (width, width),
        "attn_out": (width, width),
        "ff_norm": (width,),
        "ff_proj": (hidden, width),
        "up_proj": (hidden, width),
        "ff_out": (width, hidden),
    }
    body = "model.transformer"
    blocks = {
        f"{body}.blocks.{index}.{leaf}.weight": shape
        for index in range(config["n_layers"])
        for leaf, shape in per_block.items()
    }
    outside = {"wte": (rows, width), "ln_f": (width,), "ff_out": (rows, width)}
    return {f"{body}.{leaf}.weight": shape for leaf, shape in outside.items()} | blocks


def dream_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the weights of a Dream checkpoint, from its config.json."""
    width, hidden, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    per_block = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (kv_width, width),
        "self_attn.k_proj.bias": (kv_width,),
        "self_attn.v_proj.weight": (kv_width, width),
        "self_attn.v_proj.bias": (kv_width,),
        "self_attn.o_proj.weight": (width, width),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
    }
    blocks = {
        f"model.layers.{index}.{leaf}": shape
        for index in range(config["num_hidden_layers"])
        for leaf, shape in per_block.items()
    }
    outside = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    return outside | {"lm_head.weight": (rows, width)} | blocks


def mlp_shapes(path: str, width: int, hidden: int) -> Shapes:
    """Names and shapes of the weights of a gated feed-forward layer."""
    inward: Shapes = {f"{path}.{leaf}_proj.weight": (hidden, width) for leaf in ("gate", "up")}
    return inward | {f"{path}.down_proj.weight": (width, hidden)}


def llada_moe_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the weights of a LLaDA-MoE checkpoint, from its config.json."""
    width, rows = config["hidden_size"], config["vocab_size"]
    size = width // config["num_attention_heads"]
    kv_width = size * config["num_key_value_heads"]
    per_block = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (kv_width, width),
        "self_attn.v_proj.weight": (kv_width, width),
        "self_attn.o_proj.weight": (width, width),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate.weight": (config["num_experts"], width),
    }
    for expert in range(config["num_experts"]):
        per_block |= mlp_shapes(f"mlp.experts.{expert}", width, config["expert_intermediate_size"])
    blocks = {
        f"model.layers.{index}.{leaf}": shape
        for index in range(config["num_hidden_layers"])
        for leaf, shape in per_block.items()
    }
    outside = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    return outside | {"lm_head.weight": (rows, width)} | blocks


def llada2_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the weights of a LLaDA2 checkpoint, from its config.json; with the routers' biases."""
    width, rows, size = config["hidden_size"], config["vocab_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, experts = config["moe_intermediate_size"], config["num_experts"]
    attention = {
        "input_layernorm.weight": (width,),
        "attention.query_key_value.weight": ((heads + 2 * kv_heads) * size, width),
        "attention.query_layernorm.weight": (size,),
        "attention.key_layernorm.weight": (size,),
        "attention.dense.weight": (width, heads * size),
        "post_attention_layernorm.weight": (width,),
    }
    mixture: Shapes = {"mlp.gate.weight": (experts, width), "mlp.gate.expert_bias": (experts,)}
    mixture |= mlp_shapes("mlp.shared_experts", width, hidden * config["num_shared_experts"])
    for expert in range(experts):
        mixture |= mlp_shapes(f"mlp.experts.{expert}", width, hidden)
    dense = mlp_shapes("mlp", width, config["intermediate_size"])
    blocks = {
        f"model.layers.{index}.{leaf}": shape
        for index in range(config["num_hidden_layers"])
        for leaf, shape in (attention | (dense if index < config["first_k_dense_replace"] else mixture)).items()
    }
    outside = {"model.word_embeddings.weight": (rows, width), "model.norm.weight": (width,)}
    return outside | {"lm_head.weight": (rows, width)} | blocks


def qwen_shapes(config: dict[str, Any], *, qk_norm: bool = False, qkv_bias: bool = False) -> Shapes:
    """Names and shapes of the weights of a SDAR or Fast-dLLM v2 checkpoint, from its config.json."""
    width, rows = config["hidden_size"], config["vocab_size"]
    size = config.get("head_dim", width // config["num_attention_heads"])
    out = {"q": config["num_attention_heads"] * size} | dict.fromkeys("kv", config["num_key_value_heads"] * size)
    per_block: Shapes = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    for name, height in out.items():
        per_block[f"self_attn.{name}_proj.weight"] = (height, width)
        if qkv_bias:
            per_block[f"self_attn.{name}_proj.bias"] = (height,)
    per_block["self_attn.o_proj.weight"] = (width, out["q"])
    if qk_norm:
        per_block |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
    if "num_experts" in config:
        per_block["mlp.gate.weight"] = (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            per_block |= mlp_shapes(f"mlp.experts.{expert}", width, config["moe_intermediate_size"])
    else:
        per_block |= mlp_shapes("mlp", width, config["intermediate_size"])
    blocks = {
        f"model.layers.{index}.{leaf}": shape
        for index in range(config["num_hidden_layers"])
        for leaf, shape in per_block.items()
    }
    outside = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    return outside | {"lm_head.weight": (rows, width)} | blocks


def diffusion_gemma_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the weights of a DiffusionGemma checkpoint, from its config.json; tied weights once."""
    text, vision = config["text_config"], config["vision_config"]
    width, rows, experts = text["hidden_size"], text["vocab_size"], text["num_experts"]
    inner, heads = text["moe_intermediate_size"], text["num_attention_heads"]
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm",
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
    )
    shapes: Shapes = {
        "model.decoder.embed_tokens.weight": (rows, width),
        "model.decoder.norm.weight": (width,),
        "model.decoder.self_conditioning.pre_norm.weight": (width,),
    } | mlp_shapes("model.decoder.self_conditioning", width, text["intermediate_size"])
    for index, kind in enumerate(text["layer_types"]):
        slides = kind == "sliding_attention"
        size = text["head_dim"] if slides else text["global_head_dim"]
        kv_heads = text["num_key_value_heads"] if slides else text["num_global_key_value_heads"]
        layer = {f"{norm}.weight": (width,) for norm in norms} | {
            "self_attn.q_proj.weight": (heads * size, width),
            "self_attn.k_proj.weight": (kv_heads * size, width),
            "self_attn.o_proj.weight": (width, heads * size),
            "self_attn.q_norm.weight": (size,),
            "self_attn.k_norm.weight": (size,),
            "router.proj.weight": (experts, width),
            "router.scale": (width,),
            "router.per_expert_scale": (experts,),
            "experts.gate_up_proj": (experts, 2 * inner, width),
            "experts.down_proj": (experts, width, inner),
            "layer_scalar": (1,),
        }
        if slides:
            layer["self_attn.v_proj.weight"] = (kv_heads * size, width)
        path = f"model.decoder.layers.{index}"
        shapes |= {f"{path}.{leaf}": shape for leaf, shape in layer.items()}
        shapes |= mlp_shapes(f"{path}.mlp", width, text["intermediate_size"])
        shapes[f"model.encoder.language_model.layers.{index}.layer_scalar"] = (1,)
    return shapes | _gemma_vision_shapes(vision, width)


def _gemma_vision_shapes(vision: dict[str, Any], text_width: int) -> Shapes:
    width, hidden = vision["hidden_size"], vision["intermediate_size"]
    tower = "model.encoder.vision_tower"
    shapes: Shapes = {
        "model.encoder.embed_vision.embedding_projection.weight": (text_width, width),
        f"{tower}.patch_embedder.input_proj.weight": (width, 3 * vision["patch_size"] ** 2),
        f"{tower}.patch_embedder.position_embedding_table": (2, vision["position_embedding_size"], width),
        f"{tower}.std_bias": (width,),
        f"{tower}.std_scale": (width,),
    }
    for index in range(vision["num_hidden_layers"]):
        path = f"{tower}.encoder.layers.{index}"
        for leaf in ("q", "k", "v", "o"):
            shapes[f"{path}.self_attn.{leaf}_proj.linear.weight"] = (width, width)
        for leaf in ("q", "k"):
            shapes[f"{path}.self_attn.{leaf}_norm.weight"] = (vision["head_dim"],)
        for leaf in ("gate", "up"):
            shapes[f"{path}.mlp.{leaf}_proj.linear.weight"] = (hidden, width)
        shapes[f"{path}.mlp.down_proj.linear.weight"] = (width, hidden)
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{path}.{place}_layernorm.weight"] = (width,)
    return shapes


def packed_size(linears: Iterable[nn.Module], grid: Grid) -> tuple[int, int]:
    """Weights of the layers, and the bytes of their codes and scales."""
    weights, packed = 0, 0
    shapes = Counter(tuple(linear.get_parameter("weight").shape) for linear in linears)
    for (rows, columns), count in shapes.items():
        layer = QuantLinear(columns, rows, grid, None, device="meta", bias=False)
        weights += count * rows * columns
        packed += count * layer.nbytes
    return weights, packed
