"""Finished blocks are computed once: with every block-causal family, what is kept is what would be computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dllmquant
from dllmquant import DLLMQuantizer
from dllmquant.decoding import BlockDiffusionSamplerConfig, CachedDenoiser, CachedStep, Generation, sample
from dllmquant.generation import generate_tokens
from dllmquant.models import adapter_for
from dllmquant.models.key_values import KeyValues
from tests.tiny import tiny_fast_dllm, tiny_llada2, tiny_sdar, tiny_sdar_moe, tiny_tokenizer

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "sdar": tiny_sdar,
    "sdar_moe": tiny_sdar_moe,
    "llada2_moe": tiny_llada2,
    "Fast_dLLM_Qwen": tiny_fast_dllm,
}
# Blocks have four tokens: whole ones, parts of one, none.
PROMPTS = [list(range(9, 9 + length)) for length in (3, 8, 1, 0, 10, 4)]


# The first block of an empty prompt holds nothing but masks, alike in every position: where confidence orders them,
# rounding says which is committed, and decoding twice need not give the same.
ORDERED = [prompt or [9, 10] for prompt in PROMPTS]


def decode(
    model: PreTrainedModel, cached: CachedDenoiser | None, prompts: list[list[int]] = PROMPTS, **options: Any
) -> Generation:
    adapter, ids = adapter_for(model), tiny_tokenizer()
    config = adapter.sampler_config(model.config, **options)
    assert isinstance(config, BlockDiffusionSamplerConfig)
    return sample(
        adapter.denoiser(model),
        prompts,
        config,
        cached=cached,
        mask_token_id=adapter.mask_id(model.config),
        pad_token_id=ids.pad_token_id,
        eos_token_id=ids.eos_token_id,
    )


def compared(model: PreTrainedModel, deviations: list[float]) -> CachedDenoiser:
    """The model's cache, held against the model on whole canvases at every step."""
    adapter = adapter_for(model)
    cached = adapter.cached_denoiser(model)
    assert cached is not None

    def opened(attention_mask: Tensor) -> CachedStep:
        step = cached.open(attention_mask)
        canvas = torch.full(attention_mask.shape, adapter.mask_id(model.config))

        def both(rows: Tensor, columns: Tensor, ids: Tensor, wanted: int) -> Tensor:
            canvas[rows[:, None], columns] = ids
            found = step(rows, columns, ids, wanted)
            everything = model(input_ids=canvas[rows], attention_mask=attention_mask[rows]).logits
            last = columns[:, -wanted:, None].expand(-1, -1, everything.shape[-1])
            expected = everything.gather(1, last)
            deviations.append(float((found - expected).abs().max() / expected.abs().max()))
            return found

        return both

    return CachedDenoiser(opened, cached.shift)


def assert_same(one: Generation, other: Generation) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.steps_used, other.steps_used)
    assert one.forward_passes == other.forward_passes


@pytest.mark.parametrize("options", [{"threshold": 0.3}, {"remasking": "sequential", "steps": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_whole_canvases(family: str, options: dict[str, Any]) -> None:
    model = FAMILIES[family](initializer_range=0.4).double()
    deviations: list[float] = []
    options = {"gen_length": 19} | options
    found = decode(model, compared(model, deviations), **options)
    assert len(deviations) == found.forward_passes
    assert max(deviations) < 1e-12
    assert len(set(found.steps_used.tolist())) > 1 or "steps" in options, "rows should go at their own pace"
    assert len({tuple(row) for row in found.tokens.tolist()}) > 2
    prompts = PROMPTS if "steps" in options else ORDERED
    cached = adapter_for(model).cached_denoiser(model)
    assert_same(decode(model, cached, prompts, **options), decode(model, None, prompts, **options))


@pytest.mark.parametrize("recipe", ["rtn-w4a4", "rtn-w4a4-av", "quarot-w4a4"])
@pytest.mark.parametrize("family", ["sdar", "Fast_dLLM_Qwen"])
def test_quantized_models_keep_what_they_would_compute(family: str, recipe: str) -> None:
    """Activations and attention quantized per token: what was not shown yet must not shift a grid."""
    model = FAMILIES[family](initializer_range=0.4)
    changes: dict[str, Any] = {"extends": recipe, "weights": {"group_size": 16}}
    if recipe == "quarot-w4a4":
        changes["calibration"] = {"num_states": 4, "num_prompts": 2}
    DLLMQuantizer(changes).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    model = model.double()
    deviations: list[float] = []
    decode(model, compared(model, deviations), gen_length=11, threshold=0.3)
    assert max(deviations) < 1e-12
    options: dict[str, Any] = {"gen_length": 11, "threshold": 0.3}
    cached = adapter_for(model).cached_denoiser(model)
    assert_same(decode(model, cached, ORDERED, **options), decode(model, None, ORDERED, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_shows_a_model_its_blocks_and_records_whole_canvases(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = FAMILIES[family](initializer_range=0.4).double(), tiny_tokenizer()
    prompts = [" tom is in", "q: anna has 3 apples. anna buys 4 more. how many remain? a:", " so"]
    shown: list[int] = []
    forward = model.model.forward

    def watch(x: Tensor, attention_mask: Tensor, *columns: Any) -> Tensor:
        shown.append(x.shape[1] if columns else 0)
        return forward(x, attention_mask, *columns)

    monkeypatch.setattr(model.model, "forward", watch)
    found = generate_tokens(model, tokenizer, prompts, gen_length=13)
    assert len(shown) == found.forward_passes
    assert max(shown[1:]) <= 9  # a block, the one before it, and a token more where the next one is predicted
    assert min(shown) >= 4
    shown.clear()
    recorded = generate_tokens(model, tokenizer, prompts, gen_length=13, record=True)
    assert set(shown) == {0}
    assert torch.equal(recorded.tokens, found.tokens)
    assert recorded.trajectory is not None
    texts = dllmquant.generate(model, tokenizer, prompts, gen_length=13, batch_size=1)
    assert texts == dllmquant.generate(model, tokenizer, prompts, gen_length=13)


def test_blocks_are_the_models_own() -> None:
    model = tiny_sdar(block_size=5)
    adapter = adapter_for(model)
    assert adapter.sampler_config(model.config).block_length == 5
    assert adapter.sampler_config(model.config, block_length=5, steps=5).steps == 5
    with pytest.raises(ValueError, match="block_length is 4; valid: 5, by which the model attends"):
        adapter.sampler_config(model.config, block_length=4)
    with pytest.raises(ValueError, match=r"sub_block_length is 2; valid: None or a divisor of block_length 5"):
        adapter.sampler_config(model.config, sub_block_length=2)


def test_models_without_a_cache_have_none() -> None:
    adapter = adapter_for(tiny_sdar())
    assert adapter.cached_denoiser(torch.nn.Linear(2, 2)) is None  # type: ignore[arg-type]
    shifted = adapter_for(tiny_fast_dllm()).cached_denoiser(tiny_fast_dllm())
    assert shifted is not None
    assert shifted.shift == 1


def test_columns_see_real_ones_of_their_own_and_earlier_blocks() -> None:
    attention = torch.ones(3, 8, dtype=torch.int64)
    attention[1, :3] = 0
    kept = KeyValues(attention, 2)
    shown = kept.at(torch.tensor([0, 1]), torch.tensor([[2, 3], [4, 5]]))
    assert shown.mask.shape == (2, 1, 2, 6)
    assert shown.mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert shown.mask[1, 0].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    layer = torch.nn.Identity()
    new = torch.arange(1.0, 9.0).reshape(2, 1, 2, 2)
    keys, values = shown.exchange(layer, new, -new)
    assert keys.shape == values.shape == (2, 1, 6, 2)
    assert torch.equal(keys[0, 0, 2:4], new[0, 0])
    assert torch.equal(values[1, 0, 4:6], -new[1, 0])
    assert not keys[:, :, :2].any()
    again = kept.at(torch.tensor([0, 1, 2]), torch.tensor([[6, 7]] * 3))
    keys, _ = again.exchange(layer, torch.full((3, 1, 2, 2), 9.0), torch.zeros(3, 1, 2, 2))
    assert torch.equal(keys[0, 0, 2:4], new[0, 0])
    assert torch.equal(keys[2, 0, 6:8], torch.full((2, 2), 9.0))
    assert not keys[2, 0, :6].any()
