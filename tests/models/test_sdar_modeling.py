import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dllmquant.capture import capture_block_call
from dllmquant.models import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM, registered_adapters
from dllmquant.nn.sdpa import capture_attention
from tests.models.published import SDAR_4B, qwen_shapes
from tests.models.test_llada_modeling import draw_ids, padding, run
from tests.models.toys import MASK, PAD, tiny_qwen_keys, tiny_sdar, tiny_sdar_moe

LENGTH = 11
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-kv": {},
    "all-kv-heads": {"num_key_value_heads": None, "block_size": 3},
    "narrow-heads": {"head_dim": None, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True, "block_size": 5},
    "eps": {"rms_norm_eps": 1e-3, "block_size": 1},
    "published-theta": {"rope_theta": 1000000.0, "block_size": 16},
}
MOE_VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-kv": {},
    "probabilities": {"norm_topk_prob": False, "block_size": 3},
    "one-expert": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all-experts": {"num_experts_per_tok": 6},
}
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def keys(config: Any, *names: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {name: getattr(config, name) for name in (*_SHARED, *names)} | {"rope_parameters": rope}


def qwen3_twin(model: SDARForCausalLM) -> PreTrainedModel:
    """transformers' own Qwen3 with the same weights, strictly loaded."""
    twin = Qwen3ForCausalLM(Qwen3Config(**keys(model.config)))
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    nn.Module.to(twin, model.dtype)
    twin.load_state_dict(weights, strict=True)
    return twin.eval()


def qwen3_moe_twin(model: SDARMoeForCausalLM) -> PreTrainedModel:
    """transformers' own Qwen3-MoE with the same weights, its experts stacked, strictly loaded."""
    config = model.config
    names = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob")
    settings = keys(config, *names) | {"experts_implementation": "eager"}  # the others know no float64
    twin = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    for index, block in enumerate(model.model.layers):
        path, experts = f"model.layers.{index}.mlp.experts", block.mlp.experts
        weights[f"{path}.gate_up_proj"] = torch.stack(
            [torch.cat((expert.gate_proj.weight, expert.up_proj.weight)) for expert in experts]
        )
        weights[f"{path}.down_proj"] = torch.stack([expert.down_proj.weight for expert in experts])
    nn.Module.to(twin, model.dtype)
    twin.load_state_dict(weights, strict=True)
    return twin.eval()


def by_blocks(ids: Tensor, keep: Tensor | None, block_length: int) -> Tensor:
    """Who sees whom, written out: bool [batch, 1, length, length]."""
    visible = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    for row in range(len(ids)):
        real = range(ids.shape[1]) if keep is None else keep[row].nonzero().squeeze(1).tolist()
        for query, i in enumerate(real):
            for key, j in enumerate(real):
                visible[row, 0, i, j] = key // block_length <= query // block_length
        visible[row, 0].fill_diagonal_(True)  # padding sees itself: its rows are not compared
    return visible


def expected(twin: PreTrainedModel, ids: Tensor, visible: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = twin(input_ids=ids, attention_mask=visible, use_cache=False).logits
    return logits


def assert_equal_to_twin(model: Any, twin: PreTrainedModel, mask_ratio: float) -> None:
    """Without padding, and padded on either side."""
    for keep in (padding("none"), padding("left"), padding("right")):
        ids = draw_ids(mask_ratio=mask_ratio)
        if keep is not None:
            ids[~keep] = PAD
        reference = expected(twin, ids, by_blocks(ids, keep, model.config.block_length))
        shown = slice(None) if keep is None else keep
        # The twin's norms and router, and both rotary tables, are float32; everything else is float64.
        torch.testing.assert_close(run(model, ids, keep)[shown], reference[shown], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_qwen3(variant: str, mask_ratio: float) -> None:
    """Against an independent implementation: Qwen3 of transformers with the mask changed."""
    model = tiny_sdar(dtype=torch.float64, **VARIANTS[variant])
    assert_equal_to_twin(model, qwen3_twin(model), mask_ratio)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_logits_equal_transformers_qwen3_moe(variant: str, mask_ratio: float) -> None:
    """Against an independent implementation: Qwen3-MoE of transformers with the mask changed."""
    model = tiny_sdar_moe(dtype=torch.float64, **MOE_VARIANTS[variant])
    assert_equal_to_twin(model, qwen3_moe_twin(model), mask_ratio)


def test_float32_equals_transformers_qwen3() -> None:
    ids, dense, mixture = draw_ids(), tiny_sdar(), tiny_sdar_moe()
    for model, twin in ((dense, qwen3_twin(dense)), (mixture, qwen3_moe_twin(mixture))):
        reference = expected(twin, ids, by_blocks(ids, None, 4))
        torch.testing.assert_close(run(model, ids), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope_theta", 150.0), ("rms_norm_eps", 1e-3), ("block_size", 5), ("norm_topk_prob", False)],
)
def test_the_tolerance_tells_architectures_apart(name: str, value: float) -> None:
    tiny: Any = tiny_sdar_moe if name == "norm_topk_prob" else tiny_sdar
    before = run(tiny(dtype=torch.float64), draw_ids())
    assert float((run(tiny(dtype=torch.float64, **{name: value}), draw_ids()) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_norms_of_queries_and_keys_count(norm: str) -> None:
    model = tiny_sdar(dtype=torch.float64)
    before = run(model, draw_ids())
    nn.init.ones_(model.get_parameter(f"model.layers.0.self_attn.{norm}.weight"))
    assert float((run(model, draw_ids()) - before).abs().max()) > 1e-3


# Who sees whom


@pytest.mark.parametrize("tiny", [tiny_sdar, tiny_sdar_moe])
def test_a_token_sees_its_own_block_and_earlier_ones(tiny: Any) -> None:
    model, ids = tiny(dtype=torch.float64), draw_ids(batch=1)
    before = run(model, ids)
    for changed in range(LENGTH):
        other = ids.clone()
        other[0, changed] = 1 + ids[0, changed] % (MASK - 1)
        differs = (run(model, other) - before).abs().amax(-1)[0] > 1e-9
        assert differs.tolist() == [place >= changed // 4 * 4 for place in range(LENGTH)]


@pytest.mark.parametrize("heads", [1, 4])
def test_a_four_dimensional_mask_is_used_as_given(heads: int) -> None:
    model, ids = tiny_sdar(dtype=torch.float64), draw_ids()
    visible = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.4
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    found = run(model, ids, visible.expand(2, heads, LENGTH, LENGTH))
    torch.testing.assert_close(found, expected(qwen3_twin(model), ids, visible), rtol=1e-5, atol=5e-5)


def test_masks_of_other_shapes_are_errors() -> None:
    for mask in (torch.ones(2, 5), torch.ones(2, LENGTH, LENGTH), torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool)):
        with pytest.raises(ValueError, match="attention_mask: shape"):
            tiny_sdar()(input_ids=draw_ids(), attention_mask=mask)


@pytest.mark.parametrize(("tiny", "family"), [(tiny_sdar, "sdar"), (tiny_sdar_moe, "sdar_moe")])
def test_every_block_calls_attention_once_and_can_be_intercepted(tiny: Any, family: str) -> None:
    model, ids = tiny(), draw_ids()

    def forward() -> None:
        model(input_ids=ids)

    for block in registered_adapters()[family].block_list(model):
        call = capture_block_call(model, [block], forward)
        assert "shown" not in call.kwargs
        seen = capture_attention(block, lambda block=block, call=call: call.run(block))  # type: ignore[misc]
        assert seen.query.shape == seen.key.shape == seen.value.shape == (2, 4, LENGTH, 8)
        assert seen.mask is not None
        assert torch.equal(seen.mask.expand(2, 1, LENGTH, LENGTH), by_blocks(ids, None, 4))


# Configuration


def test_defaults_are_the_published_sizes() -> None:
    config = SDARConfig()
    for name in (*_SHARED, "rope_theta", "max_position_embeddings", "block_size", "mask_token_id"):
        assert getattr(config, name) == SDAR_4B[name], name
    moe = SDARMoeConfig()
    assert (moe.hidden_size, moe.num_hidden_layers, moe.num_attention_heads, moe.num_key_value_heads) == (
        2048,
        48,
        32,
        4,
    )
    assert (moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size) == (128, 8, 768)
    assert (moe.head_dim, moe.vocab_size, moe.norm_topk_prob, moe.block_size) == (128, 151936, True, 4)


@pytest.mark.parametrize("kind", [SDARConfig, SDARMoeConfig])
@pytest.mark.parametrize("key", ["block_size", "block_length"])
def test_the_block_length_has_two_names(kind: Any, key: str, tmp_path: Path) -> None:
    config = kind(**tiny_qwen_keys(**{key: 16}))
    assert (config.block_size, config.block_length) == (16, 16)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["block_size"] == 16
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert loaded.block_length == 16


def test_a_published_config_is_read_whole(tmp_path: Path) -> None:
    """It names an attention implementation of its own code, which is not ours."""
    (tmp_path / "config.json").write_text(json.dumps(SDAR_4B))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SDARConfig
    assert config._attn_implementation != "flex_attention"
    assert (config.block_length, config.mask_token_id, config.rope_theta) == (4, 151669, 1000000.0)
    assert config.fuse_cross_entropy is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ],
)
def test_unsupported_variants_are_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"SDAR config: {key}=.* is not supported; valid: "):
        SDARConfig(**tiny_qwen_keys(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"), [("decoder_sparse_step", 2), ("mlp_only_layers", [0]), ("attention_bias", True)]
)
def test_unsupported_mixtures_are_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"SDAR-MoE config: {key}=.* is not supported; valid: "):
        SDARMoeConfig(**tiny_qwen_keys(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_attention_heads": 0}, "num_key_value_heads=2 must divide num_attention_heads=0"),
        ({"head_dim": 3}, "head_dim=3 is not supported; valid: an even number"),
        ({"block_size": 0}, "block_size=0 is not supported; valid: at least 1"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok=200 is not supported; valid: 1 to num_experts=128"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 is not supported"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDARMoeConfig(**tiny_qwen_keys(**changes))


# Checkpoints

SMALL = SDAR_4B | tiny_qwen_keys()


def write_checkpoint(path: Path, weights: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SMALL))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def published_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = qwen_shapes(SMALL, qk_norm=True)
    return {name: (0.3 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForCausalLM, SDARForCausalLM])
def test_published_layout_loads_without_remote_code(loader: Any, tmp_path: Path) -> None:
    weights = published_weights()
    loaded = loader.from_pretrained(write_checkpoint(tmp_path / "in", weights))
    assert type(loaded) is SDARForCausalLM
    loaded.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    again = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(run(again, draw_ids()), run(loaded, draw_ids()))


@pytest.mark.parametrize("tiny", [tiny_sdar, tiny_sdar_moe])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_identical(tiny: Any, tied: bool, tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(run(loaded, draw_ids()), run(model, draw_ids()))


def test_weights_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    weights = published_weights()
    norm = weights.pop("model.layers.1.self_attn.q_norm.weight")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.self_attn\.q_norm\.weight$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path / "a", weights))
    weights |= {"model.layers.1.self_attn.q_norm.weight": norm, "model.layers.0.mlp.gate.weight": norm.clone()}
    with pytest.raises(ValueError, match=r"; unexpected: model\.layers\.0\.mlp\.gate\.weight$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path / "b", weights))


# The forward call


def test_arguments_that_are_not_known_are_errors() -> None:
    model = tiny_sdar()
    with pytest.raises(ValueError, match=r"SDARForCausalLM forward: unsupported arguments \['position_ids'\]"):
        model(input_ids=draw_ids(), position_ids=torch.zeros(1))
    with pytest.raises(ValueError, match="use_cache=True"):
        model(input_ids=draw_ids(), use_cache=True)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_can_be_found_and_replaced(tied: bool) -> None:
    model, ids = tiny_sdar(tie_word_embeddings=tied), draw_ids()
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is (model.model.embed_tokens if tied else model.lm_head)
    assert torch.equal(run(model, ids), model(inputs_embeds=model.get_input_embeddings()(ids)).logits)
    other = nn.Embedding(32, 16)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other


def test_fresh_models_are_initialised() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "initializer_range": 0.05}
    for model in (SDARForCausalLM(SDARConfig(**tiny_qwen_keys(**sizes))),):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert bool((parameter == 1).all())
            else:
                assert parameter.detach().std().item() == pytest.approx(0.05, rel=0.1), name
