import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import dllmquant
from dllmquant.capture import capture_block_call
from dllmquant.decoding import SamplerConfig
from dllmquant.generation import generate_tokens
from dllmquant.models import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM, registered_adapters
from dllmquant.models.qwen import QwenMixture
from dllmquant.nn.sdpa import capture_attention
from tests.models.published import LLADA_MOE_7B, llada_moe_shapes
from tests.models.test_dream_modeling import everything
from tests.models.test_llada_modeling import draw_ids, padding, run
from tests.models.toys import MASK, PAD, tiny_config, tiny_llada_moe, tiny_llada_moe_config
from tests.oracles import llada_decoding
from tests.tiny import tiny_llada_moe as tiny_generator
from tests.tiny import tiny_tokenizer

LENGTH = 11
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-kv": {},
    "all-kv-heads": {"num_key_value_heads": None, "num_attention_heads": 2},
    "one-expert": {"num_experts_per_tok": 1},
    "all-experts": {"num_experts_per_tok": 6},
    "eps": {"rms_norm_eps": 1e-3},
    "published-theta": {"rope_theta": 50000.0},
    "one-block": {"num_hidden_layers": 1, "num_key_value_heads": 1},
}


def qwen3_moe_twin(model: LLaDAMoEModelLM, **changes: Any) -> Qwen3MoeForCausalLM:
    """transformers' own Qwen3-MoE with the same weights, strictly loaded; it keeps all experts of a block as one."""
    config = model.config
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.expert_intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "experts_implementation": "eager",  # the others cannot compute in float64
    }
    twin = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings | changes))
    nn.Module.to(twin, model.dtype)
    weights = model.state_dict()
    for index in range(config.num_hidden_layers):
        path = f"model.layers.{index}.mlp.experts"
        gate, up, down = (
            torch.stack([weights.pop(f"{path}.{expert}.{name}_proj.weight") for expert in range(config.num_experts)])
            for name in ("gate", "up", "down")
        )
        weights |= {f"{path}.gate_up_proj": torch.cat((gate, up), dim=1), f"{path}.down_proj": down}
    twin.load_state_dict(weights, strict=True)
    return twin.eval()


def expected(model: LLaDAMoEModelLM, ids: Tensor, visible: Tensor, **changes: Any) -> Tensor:
    """The twin's logits; `visible` is bool [batch, 1, length, length]."""
    with torch.no_grad():
        twin = qwen3_moe_twin(model, **changes)
        logits: Tensor = twin(input_ids=ids, attention_mask=visible, use_cache=False).logits
    return logits


def closest_choice(model: LLaDAMoEModelLM, ids: Tensor, keep: Tensor | None) -> float:
    """By how much, over all tokens, the least likely expert that was chosen beats the likeliest that was not."""
    margins = [float("inf")]
    chosen = model.config.num_experts_per_tok

    def see(_module: nn.Module, _args: tuple[Any, ...], logits: Tensor) -> None:
        ranked = logits.softmax(-1).sort(-1, descending=True).values
        if chosen < ranked.shape[-1]:
            margins.append(float((ranked[:, chosen - 1] - ranked[:, chosen]).min()))

    handles = [m.gate.register_forward_hook(see) for m in model.modules() if isinstance(m, QwenMixture)]
    run(model, ids, keep)
    for handle in handles:
        handle.remove()
    return min(margins)


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_qwen3_moe(variant: str, mask_ratio: float, pad: str) -> None:
    """Against an independent implementation: Qwen3-MoE of transformers with the mask changed."""
    model = tiny_llada_moe(dtype=torch.float64, **VARIANTS[variant])
    ids, keep = draw_ids(mask_ratio=mask_ratio), padding(pad)
    if keep is not None:
        ids[~keep] = PAD
    shown = slice(None) if keep is None else keep
    assert closest_choice(model, ids, keep) > 1e-4, "another seed: a choice of experts is too close to tell"
    reference = expected(model, ids, everything(ids, keep))
    # Qwen3's norms, routers and rotary tables are float32; everything else is float64.
    torch.testing.assert_close(run(model, ids, keep)[shown], reference[shown], rtol=1e-5, atol=5e-5)
    # The same in float32.
    single = run(model.float(), ids, keep)
    torch.testing.assert_close(single[shown], reference[shown].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "num_experts_per_tok", "norm_topk_prob", "causal"])
def test_the_tolerance_tells_architectures_apart(name: str) -> None:
    model, ids = tiny_llada_moe(dtype=torch.float64), draw_ids()
    visible = everything(ids)
    every_change: dict[str, dict[str, Any]] = {
        "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 150.0}},
        "rms_norm_eps": {"rms_norm_eps": 1e-3},
        "num_experts_per_tok": {"num_experts_per_tok": 3},
        "norm_topk_prob": {"norm_topk_prob": True},
        "causal": {},
    }
    if name == "causal":
        visible = visible & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    other = expected(model, ids, visible, **every_change[name])
    assert 0.02 < float(other.std()) < 30
    assert float((other - run(model, ids)).abs().max()) > 1e-3


def test_routing_weights_and_sums_do_not_suffer_from_bfloat16() -> None:
    """The mixture is as exact as its experts' own outputs allow, and more than transformers'."""
    torch.manual_seed(0)
    model = tiny_llada_moe(num_experts=16, num_experts_per_tok=12, hidden_size=64, num_attention_heads=4).bfloat16()
    mixture, x = model.model.layers[0].mlp, torch.randn(1, 300, 64).bfloat16()
    with torch.no_grad():
        logits = mixture.gate(x[0]).double()
        weights, chosen = logits.softmax(-1).topk(12)
        exact = torch.zeros(300, 64, dtype=torch.float64)
        for token in range(300):
            for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
                exact[token] += weight * mixture.experts[expert](x[0, token]).double()
        low, twin = mixture(x)[0], qwen3_moe_twin(model).model.layers[0].mlp(x)[0]

    def error(out: Tensor) -> float:
        return float((out.double() - exact).norm() / exact.norm())

    assert low.dtype == torch.bfloat16
    assert error(low) < 2**-8
    assert error(low) < 0.7 * error(twin)


def test_tokens_attend_in_both_directions() -> None:
    model, ids = tiny_llada_moe(dtype=torch.float64), draw_ids(batch=1)
    before = run(model, ids)
    for changed in (0, LENGTH - 1):
        other = ids.clone()
        other[0, changed] = 1 + ids[0, changed] % (MASK - 1)
        difference = (run(model, other) - before).abs().amax(-1)[0]
        assert bool((difference > 1e-6).all()), changed


def test_a_four_dimensional_mask_is_used_as_given() -> None:
    model, ids = tiny_llada_moe(dtype=torch.float64), draw_ids()
    generator = torch.Generator().manual_seed(5)
    visible = (torch.rand(1, 1, LENGTH, LENGTH, generator=generator) > 0.4) | torch.eye(LENGTH, dtype=torch.bool)
    reference = expected(model, ids, visible.expand(2, 1, LENGTH, LENGTH))
    torch.testing.assert_close(run(model, ids, visible), reference, rtol=1e-5, atol=5e-5)


def test_an_all_padding_row_is_finite_and_leaves_the_others_alone() -> None:
    model, ids = tiny_llada_moe(), draw_ids(batch=2)
    keep = torch.tensor([[True], [False]]).expand(2, LENGTH)
    logits = run(model, ids, keep)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[0], run(model, ids[:1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_every_block_calls_attention_once_and_can_be_intercepted(padded: bool) -> None:
    model, ids, keep = tiny_llada_moe(), draw_ids(), padding("left") if padded else None

    def forward() -> None:
        model(input_ids=ids, attention_mask=keep)

    for block in registered_adapters()["lladamoe"].block_list(model):
        call = capture_block_call(model, [block], forward)
        seen = capture_attention(block, lambda block=block, call=call: call.run(block))  # type: ignore[misc]
        assert seen.query.shape == seen.key.shape == seen.value.shape == (2, 4, LENGTH, 4)
        assert torch.equal(seen.value[:, 0::2], seen.value[:, 1::2])  # two query heads share each value head
        assert seen.scale == 0.5
        assert (seen.mask is None) == (keep is None)


# Configuration


def test_defaults_are_the_published_sizes() -> None:
    config = LLaDAMoEConfig()
    skipped = ("architectures", "dtype", "model_type")
    keys = [key for key in LLADA_MOE_7B if key in config.to_dict() and key not in skipped]
    assert len(keys) > 14
    for key in keys:
        assert getattr(config, key) == LLADA_MOE_7B[key], key
    assert (config.mask_token_id, config.model_type) == (156895, "lladamoe")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("clip_qkv", 8.0),
        ("qk_layernorm", False),
        ("qk_layernorm", None),
        ("partial_rotary_factor", 0.5),
        ("shared_expert_intermediate_size", 1024),
        ("moe_router_enable_expert_bias", True),
        ("moe_router_score_function", "sigmoid"),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("moe_layer_freq", [0, 1]),
        ("moe_layer_freq", [1, 1, 1]),
    ],
)
def test_unsupported_variants_are_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"LLaDA-MoE config: {key}=.* is not supported; valid: "):
        tiny_llada_moe_config(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=16"),
        ({"num_attention_heads": 16}, "num_attention_heads=16 must divide hidden_size=16 into even head sizes"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must divide"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must divide"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is not supported; valid: 1 to num_experts=6"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 is not supported"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_llada_moe_config(**changes)


# Loading

SMALL = LLADA_MOE_7B | {
    "hidden_size": 16,
    "expert_intermediate_size": 8,
    "vocab_size": 32,
    "pad_token_id": PAD,
    "eos_token_id": PAD,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "moe_layer_freq": [1, 1],
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LOADERS = [AutoModel, AutoModelForCausalLM, LLaDAMoEModelLM]
GATE = "model.layers.1.mlp.gate.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


def published_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.3 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in llada_moe_shapes(SMALL).items()
    }


def write_checkpoint(path: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SMALL | changes))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("model_type", ["llada", "lladamoe"])
@pytest.mark.parametrize("loader", LOADERS)
def test_published_layout_loads_without_remote_code(loader: Any, model_type: str, tmp_path: Path) -> None:
    """Whatever name the config.json gives the architecture; the published one is that of the dense LLaDA."""
    weights = published_weights()
    loaded = loader.from_pretrained(write_checkpoint(tmp_path / "in", weights, model_type=model_type))
    assert type(loaded) is LLaDAMoEModelLM
    assert type(loaded.config) is LLaDAMoEConfig
    assert (loaded.config.rope_theta, loaded.config.mask_token_id) == (50000.0, 156895)
    assert not loaded.training
    assert not list(loaded.buffers())
    state = loaded.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == dict.fromkeys(weights, torch.bfloat16)
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    loaded.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "lladamoe"
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is LLaDAMoEModelLM


@pytest.mark.parametrize("loader", [AutoConfig, LLaDAConfig, LLaDAMoEConfig])
def test_configurations_called_llada_are_told_apart(loader: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    config, unused = loader.from_pretrained(tmp_path, return_unused_kwargs=True, rope_theta=7.0, other=1)
    assert type(config) is LLaDAMoEConfig
    assert (config.num_experts, config.rope_theta, config.model_type) == (4, 7.0, "lladamoe")
    assert "other" in unused


def test_dense_llada_is_still_dense(tmp_path: Path) -> None:
    for extra in ({}, {"num_experts": None}):
        LLaDAModelLM(tiny_config(**extra)).save_pretrained(tmp_path)
        assert type(AutoModel.from_pretrained(tmp_path)) is LLaDAModelLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llada_moe(dtype=dtype, rms_norm_eps=1e-3, rope_theta=77.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAMoEModelLM
    assert run(loaded, draw_ids()).dtype == dtype
    assert torch.equal(run(loaded, draw_ids()), run(model, draw_ids()))


@pytest.mark.parametrize("name", [GATE, DOWN, "model.layers.0.self_attn.q_norm.weight", "lm_head.weight"])
def test_missing_weights_are_an_error(name: str, tmp_path: Path) -> None:
    weights = published_weights()
    del weights[name]
    with pytest.raises(ValueError, match=f"do not fit LLaDAMoEModelLM .*; missing: {name}$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, weights))


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.0.mlp.gate.bias", "model.embed_tokens.bias"]
)
def test_unexpected_weights_are_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"; unexpected: {name}$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, published_weights() | {name: torch.zeros(4)}))


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"; of another shape: {DOWN} \(16, 9\) \(valid: \(16, 8\)\)$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, published_weights() | {DOWN: torch.zeros(16, 9)}))


# Generation

PROMPTS = [" tom is in", "q: anna has 3 apples. anna buys 4 more. how many remain? a:", " so"]


@pytest.fixture(scope="module")
def generator() -> LLaDAMoEModelLM:
    """A random float64 model whose attention is sharp, so that prompts matter."""
    return tiny_generator(initializer_range=0.5, rope_theta=1000.0).double()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("settings", [{"steps": 6}, {"steps": 2, "threshold": 0.3}], ids=str)
def test_tokens_equal_the_published_algorithm(
    generator: LLaDAMoEModelLM, prompt: str, settings: dict[str, Any]
) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.mask_token_id is not None
    settings = {"gen_length": 12, "block_length": 6} | settings
    reference = llada_decoding.decode(
        lambda ids: run(generator, torch.tensor([ids]))[0].tolist(),
        tokenizer(prompt).input_ids,
        mask_id=tokenizer.mask_token_id,
        **settings,
    )
    assert generate_tokens(generator, tokenizer, [prompt], **settings).tokens.tolist() == [reference.tokens]


def test_batching_does_not_change_the_result(generator: LLaDAMoEModelLM) -> None:
    tokenizer = tiny_tokenizer()
    together = dllmquant.generate(generator, tokenizer, PROMPTS)
    assert len(set(together)) == len(PROMPTS)
    assert [dllmquant.generate(generator, tokenizer, [prompt])[0] for prompt in PROMPTS] == together


def test_the_familys_sampler_is_lladas() -> None:
    adapters = registered_adapters()
    assert isinstance(adapters["lladamoe"].sampler, SamplerConfig)
    assert adapters["lladamoe"].sampler == adapters["llada"].sampler
