"""LLaDA2.0 and LLaDA2.1 (mini and flash) for the quantizer."""

from dllmquant.decoding import BlockDiffusionSamplerConfig
from dllmquant.models.adapters import ModelAdapter, Verification

ADAPTER = ModelAdapter(
    model_type="llada2_moe",
    blocks="model.layers",
    linear_groups=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.gate_proj", "mlp.up_proj"),  # the first blocks; what follows, all others
        ("mlp.down_proj",),
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("mlp.experts.*.down_proj",),
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.shared_experts.down_proj",),
    ),
    embedding="model.word_embeddings",
    head="lm_head",
    mask_token_id="mask_token_id",
    kept=("mlp.gate",),
    eot_token="<|role_end|>",
    attention="block_causal",
    site_names=(
        ("q_proj", "attention.query_key_value"),
        ("attn_out", "attention.dense"),
        ("ff_proj", "mlp.gate_proj"),
        ("ff_proj", "mlp.experts.*.gate_proj"),
        ("ff_proj", "mlp.shared_experts.gate_proj"),
        ("ff_out", "mlp.down_proj"),
        ("ff_out", "mlp.experts.*.down_proj"),
        ("ff_out", "mlp.shared_experts.down_proj"),
    ),
    scale_pairs=(
        ("input_layernorm", ("attention.query_key_value",)),
        (
            "post_attention_layernorm",
            (
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.gate",
                "mlp.experts.*.gate_proj",
                "mlp.experts.*.up_proj",
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
            ),
        ),
        ("mlp.up_proj", ("mlp.down_proj",)),
        ("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        ("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
    ),
    residual_outputs=(
        "attention.dense",
        "mlp.down_proj",
        "mlp.experts.*.down_proj",
        "mlp.shared_experts.down_proj",
    ),
    final_norm="model.norm",
    value_output=("attention.query_key_value", "attention.dense"),
    heads=("num_attention_heads", "num_key_value_heads"),
    sampler=BlockDiffusionSamplerConfig(gen_length=512, block_length=32, threshold=0.95),
    checkpoints=(
        "inclusionAI/LLaDA2.0-mini-preview",
        "inclusionAI/LLaDA2.0-flash-preview",
        "inclusionAI/LLaDA2.0-mini",
        "inclusionAI/LLaDA2.0-flash",
        "inclusionAI/LLaDA2.0-mini-CAP",
        "inclusionAI/LLaDA2.0-flash-CAP",
        "inclusionAI/LLaDA2.1-mini",
        "inclusionAI/LLaDA2.1-flash",
    ),
    verified=(
        Verification(
            "oracle",
            "logits equal those of an implementation by hand in NumPy, in float64",
            "tests/models/test_llada2.py::test_logits_equal_the_reference",
        ),
        Verification(
            "end-to-end",
            "a tiny random instance is quantized by five recipes, saved, reloaded bit-identically, and generates",
            "tests/models/test_end_to_end.py::test_quantize_save_reload_and_generate",
        ),
        Verification(
            "published names",
            "LLaDA2.0-mini has the published names and shapes; all 14692 linear layers of its blocks are found",
            "tests/models/test_published.py::test_full_size_has_the_published_weights",
        ),
    ),
)
