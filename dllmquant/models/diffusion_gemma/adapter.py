"""DiffusionGemma for the quantizer."""

from dllmquant.decoding import UniformNoiseSamplerConfig
from dllmquant.models.adapters import ModelAdapter, Verification
from dllmquant.models.diffusion_gemma.arrange import DECODER_LAYERS, arrange, restore
from dllmquant.models.diffusion_gemma.joint import denoise, refine

# Layers with full attention have no value projection, their values are made of the keys: "self_attn.v_proj" is a group
# of its own, which they do not have. A norm with gains between each of `residual_outputs` and the residual stream rules
# rotations of the stream out: `final_norm` is not named. A norm of the values rules out what scales or rotates them,
# and heads differ from layer to layer: `value_output` and `heads` are not named either.
ADAPTER = ModelAdapter(
    model_type="diffusion_gemma",
    blocks=DECODER_LAYERS,
    linear_groups=(
        ("self_attn.q_proj", "self_attn.k_proj"),
        ("self_attn.v_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
        ("experts.*.gate_up_proj",),
        ("experts.*.down_proj",),
    ),
    embedding="model.decoder.embed_tokens",
    head="lm_head",
    mask_token_id=None,
    attention="causal_context",
    kept=("router.proj",),
    site_names=(
        ("q_proj", "self_attn.q_proj"),
        ("attn_out", "self_attn.o_proj"),
        ("ff_proj", "mlp.gate_proj"),
        ("ff_proj", "experts.*.gate_up_proj"),
        ("ff_out", "mlp.down_proj"),
        ("ff_out", "experts.*.down_proj"),
    ),
    scale_pairs=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("pre_feedforward_layernorm_2", ("experts.*.gate_up_proj",)),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ),
    residual_outputs=("self_attn.o_proj", "mlp.down_proj", "experts.*.down_proj"),
    arrange=arrange,
    restore=restore,
    denoise=denoise,
    refine=refine,
    sampler=UniformNoiseSamplerConfig(),
    eot_token="<turn|>",
    checkpoints=("google/diffusiongemma-26B-A4B-it",),
    verified=(
        Verification(
            "oracle",
            "logits equal those of transformers' encoder and decoder with their cache, for both kinds of layers",
            "tests/models/test_diffusion_gemma.py::test_joint_logits_equal_transformers",
        ),
        Verification(
            "end-to-end",
            "a tiny random instance is quantized by four recipes, saved, reloaded bit-identically, and generates",
            "tests/models/test_diffusion_gemma.py::test_quantize_save_reload_and_generate",
        ),
        Verification(
            "published names",
            "the 26B model has the published names, shapes and bytes; all 7885 linear layers of its blocks are found",
            "tests/models/test_diffusion_gemma.py::test_full_size_has_the_published_weights",
        ),
    ),
)
