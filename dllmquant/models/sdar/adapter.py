"""SDAR and TraDo, dense and with mixtures of experts, for the quantizer."""

from dllmquant.decoding import BlockDiffusionSamplerConfig
from dllmquant.models.adapters import ModelAdapter, Verification

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_END_TO_END = Verification(
    "end-to-end",
    "a tiny random instance is quantized by five recipes, saved, reloaded bit-identically, and generates",
    "tests/models/test_end_to_end.py::test_quantize_save_reload_and_generate",
)

ADAPTER = ModelAdapter(
    model_type="sdar",
    blocks="model.layers",
    linear_groups=(_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    embedding="model.embed_tokens",
    head="lm_head",
    mask_token_id="mask_token_id",
    eot_token="<|im_end|>",
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
    sampler=BlockDiffusionSamplerConfig(gen_length=512, block_length=4, threshold=0.85),
    checkpoints=(
        "JetLM/SDAR-1.7B-Chat",
        "JetLM/SDAR-4B-Chat",
        "JetLM/SDAR-8B-Chat",
        "Gen-Verse/TraDo-4B-Instruct",
        "Gen-Verse/TraDo-8B-Instruct",
        "Gen-Verse/TraDo-8B-Thinking",
    ),
    verified=(
        Verification(
            "oracle",
            "logits equal those of transformers' Qwen3ForCausalLM with the same weights and a block-causal mask",
            "tests/models/test_sdar_modeling.py::test_logits_equal_transformers_qwen3",
        ),
        _END_TO_END,
        Verification(
            "published names",
            "the 4B model has the published names and shapes; all 252 linear layers of its blocks are found",
            "tests/models/test_published.py::test_full_size_has_the_published_weights",
        ),
    ),
)

MOE_ADAPTER = ModelAdapter(
    model_type="sdar_moe",
    blocks="model.layers",
    linear_groups=(
        _QKV,
        ("self_attn.o_proj",),
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("mlp.experts.*.down_proj",),
    ),
    embedding="model.embed_tokens",
    head="lm_head",
    mask_token_id="mask_token_id",
    kept=("mlp.gate",),
    eot_token="<|im_end|>",
    attention="block_causal",
    site_names=(
        ("q_proj", "self_attn.q_proj"),
        ("attn_out", "self_attn.o_proj"),
        ("ff_proj", "mlp.experts.*.gate_proj"),
        ("ff_out", "mlp.experts.*.down_proj"),
    ),
    scale_pairs=(
        ("input_layernorm", _QKV),
        ("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
        ("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    residual_outputs=("self_attn.o_proj", "mlp.experts.*.down_proj"),
    final_norm="model.norm",
    value_output=("self_attn.v_proj", "self_attn.o_proj"),
    heads=("num_attention_heads", "num_key_value_heads"),
    sampler=BlockDiffusionSamplerConfig(gen_length=512, block_length=4, threshold=0.85),
    checkpoints=("JetLM/SDAR-30B-A3B-Chat",),
    verified=(
        Verification(
            "oracle",
            "logits equal those of transformers' Qwen3MoeForCausalLM with the same weights and a block-causal mask",
            "tests/models/test_sdar_modeling.py::test_logits_equal_transformers_qwen3_moe",
        ),
        _END_TO_END,
        Verification(
            "published names",
            "the 30B-A3B model has Qwen3-30B-A3B's names and shapes; all 18,624 linear layers of its blocks are found",
            "tests/models/test_published.py::test_full_size_has_the_published_weights",
        ),
    ),
)
