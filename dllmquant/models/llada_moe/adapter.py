"""LLaDA-MoE (7B-A1B Base and Instruct) for the quantizer."""

from dllmquant.decoding import SamplerConfig
from dllmquant.models.adapters import ModelAdapter, Verification

ADAPTER = ModelAdapter(
    model_type="lladamoe",
    blocks="model.layers",
    linear_groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("mlp.experts.*.down_proj",),
    ),
    embedding="model.embed_tokens",
    head="lm_head",
    mask_token_id="mask_token_id",
    kept=("mlp.gate",),
    eot_token="<|role_end|>",
    site_names=(
        ("q_proj", "self_attn.q_proj"),
        ("attn_out", "self_attn.o_proj"),
        ("ff_proj", "mlp.experts.*.gate_proj"),
        ("ff_out", "mlp.experts.*.down_proj"),
    ),
    scale_pairs=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
        ("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    residual_outputs=("self_attn.o_proj", "mlp.experts.*.down_proj"),
    final_norm="model.norm",
    value_output=("self_attn.v_proj", "self_attn.o_proj"),
    heads=("num_attention_heads", "num_key_value_heads"),
    sampler=SamplerConfig(steps=128, gen_length=128, block_length=128),
    checkpoints=(
        "inclusionAI/LLaDA-MoE-7B-A1B-Base",
        "inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
        "inclusionAI/LLaDA-MoE-7B-A1B-Instruct-TD",
    ),
    verified=(
        Verification(
            "oracle",
            "logits equal those of transformers' Qwen3MoeForCausalLM with the same weights and a bidirectional mask",
            "tests/models/test_llada_moe.py::test_logits_equal_transformers_qwen3_moe",
        ),
        Verification(
            "end-to-end",
            "a tiny random instance is quantized by five recipes, saved, reloaded bit-identically, and generates",
            "tests/models/test_end_to_end.py::test_quantize_save_reload_and_generate",
        ),
        Verification(
            "published names",
            "the 7B model has the published names and shapes; all 3136 linear layers of its blocks are found",
            "tests/models/test_published.py::test_full_size_has_the_published_weights",
        ),
    ),
)
