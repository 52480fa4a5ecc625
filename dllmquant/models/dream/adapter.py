"""Dream 7B, Dream-Coder 7B and DiffuCoder 7B for the quantizer."""

from dllmquant.decoding import DreamSamplerConfig
from dllmquant.models.adapters import ModelAdapter, Verification

ADAPTER = ModelAdapter(
    model_type="Dream",
    blocks="model.layers",
    linear_groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    embedding="model.embed_tokens",
    head="lm_head",
    mask_token_id="mask_token_id",
    eot_token="<|im_end|>",
    logits_shift=1,
    site_names=(
        ("q_proj", "self_attn.q_proj"),
        ("attn_out", "self_attn.o_proj"),
        ("ff_proj", "mlp.gate_proj"),
        ("ff_out", "mlp.down_proj"),
    ),
    scale_pairs=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ),
    residual_outputs=("self_attn.o_proj", "mlp.down_proj"),
    final_norm="model.norm",
    value_output=("self_attn.v_proj", "self_attn.o_proj"),
    heads=("num_attention_heads", "num_key_value_heads"),
    sampler=DreamSamplerConfig(steps=512, gen_length=512),
    checkpoints=(
        "Dream-org/Dream-v0-Base-7B",
        "Dream-org/Dream-v0-Instruct-7B",
        "Dream-org/Dream-Coder-v0-Base-7B",
        "Dream-org/Dream-Coder-v0-Instruct-7B",
        "apple/DiffuCoder-7B-Base",
        "apple/DiffuCoder-7B-Instruct",
        "apple/DiffuCoder-7B-cpGRPO",
    ),
    verified=(
        Verification(
            "oracle",
            "logits equal those of transformers' Qwen2ForCausalLM with the same weights and a bidirectional mask",
            "tests/models/test_dream_modeling.py::test_logits_equal_transformers_qwen2",
        ),
        Verification(
            "end-to-end",
            "a tiny random instance is quantized by five recipes, saved, reloaded bit-identically, and generates",
            "tests/models/test_end_to_end.py::test_quantize_save_reload_and_generate",
        ),
        Verification(
            "published names",
            "the 7B model has the published names and shapes; all 196 linear layers of its blocks are found",
            "tests/models/test_published.py::test_full_size_has_the_published_weights",
        ),
    ),
)
