"""LLaDA (8B Base and Instruct, 1.5) for the quantizer."""

from dllmquant.decoding import SamplerConfig
from dllmquant.models.adapters import ModelAdapter

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
)
