from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from dllmquant.capture import capture_block_call
from dllmquant.models import DreamConfig, DreamModel, registered_adapters
from dllmquant.models.dream import modeling
from dllmquant.nn.sdpa import capture_attention
from tests.models.test_llada_modeling import coarse_rotary_cos_sin, draw_ids, padding, run
from tests.models.toys import MASK, PAD, tiny_dream, tiny_dream_config

LENGTH = 11
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-kv": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": None, "num_attention_heads": 2},
    "seven-to-one": {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 1e-3},
    "published-theta": {"rope_theta": 1000000.0},
    "one-block": {"num_hidden_layers": 1},
}


def qwen2_twin(model: DreamModel) -> Qwen2ForCausalLM:
    """transformers' own Qwen2 with the same weights, strictly loaded."""
    config = model.config
    settings = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
    }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    twin = Qwen2ForCausalLM(Qwen2Config(rope_parameters=rope, **settings))
    nn.Module.to(twin, model.dtype)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    twin.load_state_dict(weights, strict=True)
    return twin.eval()


def expected(model: DreamModel, ids: Tensor, visible: Tensor) -> Tensor:
    """The twin's logits; `visible` is bool [batch, 1, length, length]."""
    with torch.no_grad():
        logits: Tensor = qwen2_twin(model)(input_ids=ids, attention_mask=visible, use_cache=False).logits
    return logits


def everything(ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Every token sees every real one: bool [batch, 1, length, length]."""
    batch, length = ids.shape
    seen = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
    return seen[:, None, None, :].expand(batch, 1, length, length)


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_qwen2(variant: str, mask_ratio: float, pad: str) -> None:
    """Against an independent implementation: Qwen2 of transformers with the mask changed."""
    model = tiny_dream(dtype=torch.float64, **VARIANTS[variant])
    ids, keep = draw_ids(mask_ratio=mask_ratio), padding(pad)
    if keep is not None:
        ids[~keep] = PAD
    shown = slice(None) if keep is None else keep
    reference = expected(model, ids, everything(ids, keep))
    # Qwen2's norms and both rotary tables are float32; everything else is float64.
    torch.testing.assert_close(run(model, ids, keep)[shown], reference[shown], rtol=1e-5, atol=5e-5)
    # The same in float32.
    single = run(model.float(), ids, keep)
    torch.testing.assert_close(single[shown], reference[shown].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
def test_the_tolerance_tells_architectures_apart(name: str) -> None:
    model = tiny_dream(dtype=torch.float64)
    ids = draw_ids()
    changed = tiny_dream(dtype=torch.float64, **{name: 1.5 * getattr(model.config, name) + (name == "rms_norm_eps")})
    assert float((run(changed, ids) - run(model, ids)).abs().max()) > 1e-3
    causal = everything(ids) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert float((expected(model, ids, causal) - run(model, ids)).abs().max()) > 1e-3
    for bias in ("q", "k", "v"):
        other = tiny_dream(dtype=torch.float64)
        nn.init.zeros_(other.get_parameter(f"model.layers.0.self_attn.{bias}_proj.bias"))
        difference = float((run(other, ids) - run(model, ids)).abs().max())
        assert difference > (1e-8 if bias == "k" else 1e-3), bias


def test_long_positions_equal_transformers_qwen2() -> None:
    """One block over 600 positions, theta as published."""
    model = tiny_dream(dtype=torch.float64, num_hidden_layers=1, rope_theta=1000000.0)
    ids = draw_ids(batch=1, length=600)
    torch.testing.assert_close(run(model, ids), expected(model, ids, everything(ids)), rtol=0, atol=2e-4)


def test_bfloat16_is_as_near_as_transformers_qwen2_or_nearer() -> None:
    model = tiny_dream(num_hidden_layers=1, rope_theta=1000000.0).bfloat16()
    ids = draw_ids(batch=1, length=600)
    low, twin = run(model, ids), expected(model, ids, everything(ids))
    reference = run(model.double(), ids)  # the same, already rounded weights

    def error(logits: Tensor) -> float:
        return float((logits.double() - reference).norm() / reference.norm())

    assert low.dtype == torch.bfloat16
    assert error(low) < min(8 * 2**-8, 1.1 * error(twin))


def test_rotary_positions_do_not_suffer_from_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dream(num_hidden_layers=1, rope_theta=1000000.0).bfloat16()
    ids = draw_ids(batch=1, length=1200)
    low = run(model, ids)
    monkeypatch.setattr(modeling, "rotary_cos_sin", coarse_rotary_cos_sin)
    coarse = run(model, ids)
    assert float((low - coarse).float().norm()) > 0.1 * float(low.float().norm())


def test_tokens_attend_in_both_directions() -> None:
    model = tiny_dream(dtype=torch.float64)
    ids = draw_ids(batch=1)
    before = run(model, ids)
    for changed in (0, LENGTH - 1):
        other = ids.clone()
        other[0, changed] = 1 + ids[0, changed] % (MASK - 1)
        difference = (run(model, other) - before).abs().amax(-1)[0]
        assert bool((difference > 1e-6).all()), changed


def test_an_all_padding_row_is_finite_and_leaves_the_others_alone() -> None:
    model = tiny_dream()
    ids = draw_ids(batch=2)
    keep = torch.tensor([[True], [False]]).expand(2, LENGTH)
    logits = run(model, ids, keep)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[0], run(model, ids[:1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_every_block_calls_attention_once_and_can_be_intercepted(padded: bool) -> None:
    """Queries, keys and values as the block computes them, whether or not there is a mask."""
    model = tiny_dream(num_attention_heads=4, num_key_value_heads=2)
    adapter = registered_adapters()["Dream"]
    ids, keep = draw_ids(), padding("left") if padded else None

    def forward() -> None:
        model(input_ids=ids, attention_mask=keep)

    for block in adapter.block_list(model):
        call = capture_block_call(model, [block], forward)
        seen = capture_attention(block, lambda block=block, call=call: call.run(block))  # type: ignore[misc]
        assert seen.query.shape == seen.key.shape == seen.value.shape == (2, 4, LENGTH, 4)
        assert torch.equal(seen.value[:, 0::2], seen.value[:, 1::2])  # two query heads share each value head
        assert seen.scale == 0.5
        if keep is None:
            assert seen.mask is None
        else:
            assert seen.mask is not None
            assert torch.equal(seen.mask.expand(2, 1, 1, LENGTH), keep[:, None, None])


# Configuration


def test_defaults_are_the_published_sizes() -> None:
    config = DreamConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (152064, 3584, 18944)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (28, 28, 4)
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (1e-6, 1e6, 131072)
    assert (config.mask_token_id, config.pad_token_id, config.tie_word_embeddings) == (151666, 151643, False)
    assert (config.hidden_act, config.attention_dropout, config.model_type) == ("silu", 0.0, "Dream")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500}},
        {"rope_scaling": {"type": "default", "rope_theta": 500.0}},
    ],
    ids=str,
)
def test_the_base_of_the_positions_is_read_however_it_is_written(rope: dict[str, Any]) -> None:
    config = tiny_dream_config(**{"rope_theta": 1.0} | rope)
    assert config.rope_theta == 500.0
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "value",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_scaled_positions_are_errors(name: str, value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Dream config: {name}=\{{.*\}} is not supported; valid: None or"):
        tiny_dream_config(**{name: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("attention_bias", False),
        ("use_sliding_window", True),
        ("use_mrope", True),
    ],
)
def test_unsupported_variants_are_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Dream config: {key}={value!r} is not supported; valid: "):
        tiny_dream_config(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=16"),
        ({"num_attention_heads": 16}, "num_attention_heads=16 must divide hidden_size=16 into even head sizes"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must divide"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must divide"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dream_config(**changes)


# The forward call


@pytest.mark.parametrize("argument", ["position_ids", "past_key_values", "labels", "atention_mask"])
def test_unknown_arguments_are_errors(argument: str) -> None:
    model = tiny_dream()
    with pytest.raises(ValueError, match=rf"Dream forward: unsupported arguments \['{argument}'\]"):
        model(input_ids=draw_ids(), **{argument: torch.zeros(1)})
    assert model(input_ids=draw_ids(), **{argument: None}).logits.shape == (2, LENGTH, 32)


def test_caches_are_errors() -> None:
    with pytest.raises(ValueError, match="use_cache=True"):
        tiny_dream()(input_ids=draw_ids(), use_cache=True)


def test_exactly_one_kind_of_input() -> None:
    model, ids = tiny_dream(), draw_ids()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(run(model, ids), model(inputs_embeds=embeds).logits)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_hidden_states_and_tuples() -> None:
    model, ids = tiny_dream(), draw_ids()
    output = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(model.lm_head(output.hidden_states[0]), output.logits)
    as_tuple = model(input_ids=ids, return_dict=False)
    assert len(as_tuple) == 1
    assert torch.equal(as_tuple[0], output.logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_can_be_found_and_replaced(tied: bool) -> None:
    model = tiny_dream(tie_word_embeddings=tied)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is (model.model.embed_tokens if tied else model.lm_head)
    assert ("lm_head.weight" in model.state_dict()) is not tied
    other = nn.Embedding(32, 16)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other


def test_fresh_models_are_initialised() -> None:
    torch.manual_seed(0)
    model = DreamModel(tiny_dream_config(hidden_size=64, intermediate_size=256, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert bool((parameter == 1).all())
        else:
            assert parameter.detach().std().item() == pytest.approx(0.05, rel=0.1), name
