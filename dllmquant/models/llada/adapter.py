"""LLaDA (8B Base and Instruct, 1.5) for the quantizer."""

from dllmquant.decoding import SamplerConfig
from dllmquant.models.adapters import ModelAdapter, Verification

ADAPTER = ModelAdapter(
    model_type="llada",
    blocks="model.transformer.blocks",
    linear_groups=(("q_proj", "k_proj", "v_proj"), ("attn_out",), ("ff_proj", "up_proj"), ("ff_out",)),
    embedding="model.transformer.wte",
    head="model.transformer.ff_out",
    mask_token_id="mask_token_id",
    eot_token="<|eot_id|>",
    scale_pairs=(
        ("attn_norm", ("q_proj", "k_proj", "v_proj")),
        ("ff_norm", ("ff_proj", "up_proj")),
        ("up_proj", ("ff_out",)),
    ),
    residual_outputs=("attn_out", "ff_out"),
    final_norm="model.transformer.ln_f",
    value_output=("v_proj", "attn_out"),
    heads=("n_heads", "n_kv_heads"),
    sampler=SamplerConfig(steps=128, gen_length=128, block_length=128),
    checkpoints=("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5"),
    verified=(
        Verification(
            "oracle",
            "logits equal those of an implementation by hand in NumPy, in float64",
            "tests/models/test_llada_modeling.py::test_logits_equal_the_reference",
        ),
        Verification(
            "end-to-end",
            "a tiny random instance is quantized by five recipes, saved, reloaded bit-identically, and generates",
            "tests/models/test_end_to_end.py::test_quantize_save_reload_and_generate",
        ),
        Verification(
            "published names",
            "the 8B model has the published names and shapes; all 224 linear layers of its blocks are found",
            "tests/models/test_published.py::test_full_size_has_the_published_weights",
        ),
    ),
)
