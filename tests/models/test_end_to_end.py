"""Every family from a tiny random model to a quantized checkpoint that is read back and generates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import dllmquant
from dllmquant import DLLMQuantizer, Recipe, RecipeError
from dllmquant.calibration import builtin_prompts, collect_states
from dllmquant.generation import generate_tokens
from dllmquant.lab.agreement import measure_agreement, record_agreement
from dllmquant.models import adapter_for, registered_adapters
from dllmquant.nn.attention import installed
from dllmquant.nn.linear import QuantLinear
from dllmquant.plan import make_plan
from dllmquant.preparation import prepare
from dllmquant.transforms.fold import assert_same_function, probe_logits
from dllmquant.transforms.quarot import rotate_residual, rotate_values
from tests.tiny import (
    tiny_dream,
    tiny_fast_dllm,
    tiny_llada,
    tiny_llada2,
    tiny_llada_moe,
    tiny_sdar,
    tiny_sdar_moe,
    tiny_tokenizer,
)

TINY: dict[str, Callable[..., PreTrainedModel]] = {
    "Dream": tiny_dream,
    "Fast_dLLM_Qwen": tiny_fast_dllm,
    "llada": tiny_llada,
    "llada2_moe": tiny_llada2,
    "lladamoe": tiny_llada_moe,
    "sdar": tiny_sdar,
    "sdar_moe": tiny_sdar_moe,
}
# Families without a mask token have tests of their own.
FAMILIES = sorted(name for name, adapter in registered_adapters().items() if adapter.mask_token_id is not None)
RECIPES = ["dllmquant-w4a4", "quarot-w4a4", "awq-w4a4", "best-w4a4", "best-w3a16", "rtn-w4a4-av"]
PROMPTS = [f"q: tom has {n} apples. tom loses {n % 3 + 1} of them. how many remain? a:" for n in range(5, 12)]
PROMPTS[1] = " tom is in"


def shrunk(name: str) -> dict[str, Any]:
    """A built-in recipe with groups and counts that fit the tiny models."""
    recipe = Recipe.load(name)
    changes: dict[str, Any] = {"extends": name}
    if recipe.weights.group_size is not None:
        changes["weights"] = {"group_size": 16}
    if recipe.calibration is not None:
        changes["calibration"] = {"num_states": 8, "num_prompts": 3}
    return changes


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.tensor(tiny_tokenizer()(PROMPTS[:1]).input_ids)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def test_every_family_has_a_tiny_instance() -> None:
    assert sorted(TINY) == FAMILIES


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_reload_and_generate(family: str, recipe: str, tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), TINY[family]()
    adapter = adapter_for(model)
    before = logits(model)
    quantizer = DLLMQuantizer(shrunk(recipe))
    quantizer.quantize(model, tokenizer=tokenizer, progress=False)
    assert all(isinstance(module, QuantLinear) for _, module in adapter.linears(model))
    assert [report.name for report in quantizer.reports] == [name for name, _ in adapter.linears(model)]
    assert all((installed(block) is not None) == recipe.endswith("-av") for block in adapter.block_list(model))
    assert not torch.equal(logits(model), before)
    if quantizer.states is not None:
        assert bool(quantizer.states.batch.mask.any()) == recipe.startswith(("dllmquant", "best"))
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert torch.equal(logits(reloaded), logits(model))
    texts = dllmquant.generate(reloaded, tokenizer, PROMPTS, batch_size=3)
    assert len(texts) == len(PROMPTS)
    assert texts == dllmquant.generate(model, tokenizer, PROMPTS, batch_size=3)
    tokens = generate_tokens(reloaded, tokenizer, PROMPTS).tokens
    assert not (tokens == adapter.mask_id(model.config)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_own_sampler_records_the_states(family: str) -> None:
    """TMAS takes states from all over the runs, whatever sampler made them."""
    model, recipe = TINY[family](), shrunk("dllmquant-w4a4")
    recipe["calibration"] |= {"num_states": 10, "num_prompts": 6, "max_growth": 1}
    quantizer = DLLMQuantizer(recipe)
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert quantizer.states is not None
    batch, coverage = quantizer.states.batch, quantizer.states.coverage
    assert coverage is not None
    assert len(batch) == 10
    assert len(set(batch.mask_ratio.tolist())) > 3
    assert torch.equal(batch.ids == adapter_for(model).mask_id(model.config), batch.mask)
    assert bool((batch.committed <= batch.mask).all())
    assert bool(batch.committed.any(1).all())
    assert not bool(batch.confidence[~batch.attention_mask].any())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["quarot-w4a4", "awq-w4a4", "smoothquant-w4a4", "best-w4a4", "best-w3a16"])
def test_transforms_keep_the_function(family: str, recipe: str) -> None:
    """What a recipe folds into the weights, to float64's rounding; with biases and grouped heads."""
    model, tokenizer, settings = TINY[family]().double(), tiny_tokenizer(), Recipe.load(shrunk(recipe))
    adapter = adapter_for(model)
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert settings.calibration is not None
    states = collect_states(
        model,
        tokenizer,
        builtin_prompts(8, 0),
        settings.calibration,
        settings.token_weights,
        seed=0,
        progress=False,
    )
    ids, keep, mask_id = states.batch.ids, states.batch.attention_mask, adapter.mask_id(model.config)
    before = probe_logits(adapter.denoiser(model), ids, keep, mask_id)
    prepare(model, adapter, make_plan(model, adapter, settings), settings, states, progress=False)
    after = probe_logits(adapter.denoiser(model), ids, keep, mask_id)
    assert_same_function(before, after, keep, transform=recipe, tolerance=1e-11)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, original[name])}
    norms = adapter.pairs(adapter.block_list(model)[0])[:2]
    assert {f"{adapter.blocks}.0.{leaf}.weight" for _, leaves in norms for leaf in leaves} <= changed


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_keep_the_function(family: str) -> None:
    """Residual and values, with biases and grouped heads; to float64's rounding."""
    model = TINY[family]().double()
    adapter = adapter_for(model)
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, :4] = False
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)

    def probe() -> Tensor:
        return probe_logits(adapter.denoiser(model), ids, keep, adapter.mask_id(model.config))

    before = probe()
    for rotate in (rotate_values, rotate_residual):
        rotate(model, adapter, seed=3)
        assert_same_function(before, probe(), keep, transform=rotate.__name__, tolerance=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_agreement_follows_the_familys_sampler(family: str) -> None:
    tokenizer, model = tiny_tokenizer(), TINY[family]()
    reference = record_agreement(model, tokenizer, PROMPTS, batch_size=4)
    itself = measure_agreement(reference, model, tokenizer, batch_size=4)
    assert itself.frontier.flips == 0
    assert set(itself.first_divergence) == {-1}
    DLLMQuantizer(shrunk("rtn-w2a16")).quantize(model, tokenizer=tokenizer, progress=False)
    other = measure_agreement(reference, model, tokenizer, batch_size=4)
    assert other.frontier.flips > 0
    assert set(other.first_divergence) != {-1}


def test_inputs_have_the_names_recipes_use_and_one_transform_each() -> None:
    model = tiny_dream()
    adapter = adapter_for(model)

    def sites(*transforms: dict[str, Any]) -> set[str]:
        recipe = Recipe.load({"extends": "rtn-w4a4", "weights": {"group_size": 16}, "transforms": list(transforms)})
        return {name.removeprefix("model.layers.") for name in make_plan(model, adapter, recipe).input_transforms}

    for name in ("ff_out", "mlp.down_proj"):
        assert sites({"kind": "hadamard", "sites": [name]}) == {"0.mlp.down_proj", "1.mlp.down_proj"}
    with pytest.raises(RecipeError, match=r"'ff_in'; valid: self_attn\.q_proj, self_attn\.o_proj, mlp"):
        sites({"kind": "hadamard", "sites": ["ff_in"]})
    with pytest.raises(RecipeError, match=r"'mlp\.down_proj' has a hadamard already; valid: one transform per input"):
        sites({"kind": "hadamard", "sites": ["ff_out"]}, {"kind": "hadamard", "sites": ["mlp.down_proj"]})
