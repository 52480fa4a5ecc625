"""Fast-dLLM v2 for the quantizer."""

from dllmquant.decoding import BlockDiffusionSamplerConfig
from dllmquant.models.adapters import ModelAdapter, Verification

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

ADAPTER = ModelAdapter(
    model_type="Fast_dLLM_Qwen",
    blocks="model.layers",
    linear_groups=(_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    embedding="model.embed_tokens",
    head="lm_head",
    mask_token_id="mask_token_id",
    eot_token="<|im_end|>",
    logits_shift=1,
    attention="block_causal",
    site_names=(
        ("q_proj", "self_attn.q_proj"),
        ("attn_out", "self_attn.o_proj"),
        ("ff_proj", "mlp.gate_proj"),
        ("ff_out", "mlp.down_proj"),
    ),
    scale_pairs=(
        ("input_layernorm", _QKV),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ),
    residual_outputs=("self_attn.o_proj", "mlp.down_proj"),
    final_norm="model.norm",
    value_output=("self_attn.v_proj", "self_attn.o_proj"),
    heads=("num_attention_heads", "num_key_value_heads"),
    sampler=BlockDiffusionSamplerConfig(
        gen_length=512, block_length=32, sub_block_length=8, threshold=0.9, first_token_alone=True
    ),
    checkpoints=("Efficient-Large-Model/Fast_dLLM_v2_7B", "Efficient-Large-Model/Fast_dLLM_v2_1.5B"),
    verified=(
        Verification(
            "oracle",
            "logits equal those of transformers' Qwen2ForCausalLM with the same weights and a block-causal mask",
            "tests/models/test_fast_dllm_modeling.py::test_logits_equal_transformers_qwen2",
        ),
        Verification(
            "end-to-end",
            "a tiny random instance is quantized by five recipes, saved, reloaded bit-identically, and generates",
            "tests/models/test_end_to_end.py::test_quantize_save_reload_and_generate",
        ),
        Verification(
            "published names",
            "the 7B model has Qwen2.5-7B's names and shapes; all 196 linear layers of its blocks are found",
            "tests/models/test_published.py::test_full_size_has_the_published_weights",
        ),
    ),
)
