from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from dllmquant.models import Fast_dLLM_QwenForCausalLM, FastDLLMConfig, registered_adapters
from tests.models.published import FAST_DLLM_7B
from tests.models.test_llada_modeling import draw_ids, run
from tests.models.test_sdar_modeling import assert_equal_to_twin, keys
from tests.models.toys import tiny_fast_dllm, tiny_qwen_keys

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-kv": {},
    "all-kv-heads": {"num_key_value_heads": None, "bd_size": 3},
    "seven-to-one": {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "bd_size": 5},
    "published-theta": {"rope_theta": 1000000.0, "bd_size": 32},
}


def qwen2_twin(model: Fast_dLLM_QwenForCausalLM) -> PreTrainedModel:
    """transformers' own Qwen2 with the same weights, strictly loaded."""
    settings = {name: value for name, value in keys(model.config).items() if name != "head_dim"}
    twin = Qwen2ForCausalLM(Qwen2Config(**settings))
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    nn.Module.to(twin, model.dtype)
    twin.load_state_dict(weights, strict=True)
    return twin.eval()


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_qwen2(variant: str, mask_ratio: float) -> None:
    """Against an independent implementation: Qwen2 of transformers with the mask changed."""
    model = tiny_fast_dllm(dtype=torch.float64, **VARIANTS[variant])
    assert_equal_to_twin(model, qwen2_twin(model), mask_ratio)


@pytest.mark.parametrize("bias", ["q", "k", "v"])
def test_biases_count(bias: str) -> None:
    model = tiny_fast_dllm(dtype=torch.float64)
    before = run(model, draw_ids())
    nn.init.zeros_(model.get_parameter(f"model.layers.0.self_attn.{bias}_proj.bias"))
    assert float((run(model, draw_ids()) - before).abs().max()) > (1e-8 if bias == "k" else 1e-3)


def test_defaults_are_the_published_sizes() -> None:
    config = FastDLLMConfig()
    for name, value in FAST_DLLM_7B.items():
        if hasattr(config, name) and name not in ("architectures", "torch_dtype", "use_cache"):
            assert getattr(config, name) == value or value is None, name
    assert (config.mask_token_id, config.block_length) == (151665, 32)


def test_round_trips(tmp_path: Any) -> None:
    model = tiny_fast_dllm(bd_size=6, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is Fast_dLLM_QwenForCausalLM
    assert "lm_head.weight" not in loaded.state_dict()
    assert torch.equal(run(loaded, draw_ids()), run(model, draw_ids()))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (type(config), config.bd_size, config.block_length) == (FastDLLMConfig, 6, 6)
    assert FastDLLMConfig(**tiny_qwen_keys(block_length=8)).bd_size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported; valid: 'full_att"),
        ({"attention_bias": False}, "attention_bias=False is not supported; valid: True"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported; valid: False"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=16"),
        ({"bd_size": 0}, "bd_size=0 is not supported; valid: at least 1"),
    ],
)
def test_unsupported_configurations_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Fast-dLLM v2 config: {message}"):
        FastDLLMConfig(**tiny_qwen_keys(**changes))


def test_fresh_biases_are_zero() -> None:
    model = Fast_dLLM_QwenForCausalLM(FastDLLMConfig(**tiny_qwen_keys(head_dim=None)))
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 6
    assert not any(bool(bias.any()) for bias in biases)


def test_logits_are_aligned_by_the_adapter() -> None:
    """Those of a row's first token stay, whatever padding precedes."""
    model, ids = tiny_fast_dllm(dtype=torch.float64), draw_ids()
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, :3] = False
    raw = run(model, ids, keep)
    with torch.no_grad():
        aligned = registered_adapters()["Fast_dLLM_Qwen"].denoiser(model)(ids, keep)
    assert torch.equal(aligned[0], torch.cat((raw[0, :1], raw[0, :-1])))
    assert torch.equal(aligned[1, 3:], torch.cat((raw[1, 3:4], raw[1, 3:-1])))
