"""The block loop against a reference that sees the whole model, and what it does when something is wrong."""

import copy
import logging

import pytest
import torch
from torch import nn

from dllmquant import pipeline
from dllmquant.calibration import builtin_prompts, collect_states
from dllmquant.core.gptaq import gptaq
from dllmquant.core.gptq import gptq
from dllmquant.core.grid import Grid
from dllmquant.core.qronos import qronos
from dllmquant.models import adapter_for
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.linear import QuantLinear
from dllmquant.pipeline import quantize_blocks
from dllmquant.plan import make_plan
from dllmquant.preparation import prepare
from dllmquant.quantizer import DLLMQuantizer
from dllmquant.recipe import Recipe, RecipeError
from tests.tiny import tiny_llada, tiny_recipe, tiny_tokenizer


def calibrated(model, recipe):
    return collect_states(
        model,
        tiny_tokenizer(),
        builtin_prompts(16, 0),
        recipe.calibration,
        recipe.token_weights,
        seed=recipe.seed,
        progress=False,
    )


GROUPS = (("q_proj", "k_proj", "v_proj"), ("attn_out",), ("ff_proj", "up_proj"), ("ff_out",))


def inputs_of_layer(model, index, leaf, states):
    """The input of one layer in a full forward pass."""
    seen = []
    module = model.model.transformer["blocks"][index].get_submodule(leaf)
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    model(states.batch.ids, attention_mask=states.batch.attention_mask)
    handle.remove()
    return seen[0]


def whole_model_reference(model, recipe, states, found):
    """Weights solved group by group with full forward passes of two whole models and moments summed token by token.

    What each group reads comes from the layers of `found` before it, so that one flipped tie there is not in the input
    of all that follows.
    """
    solutions = {}
    grid = Grid(recipe.weights.bits, recipe.weights.group_size, recipe.weights.symmetric)
    scheme = ActivationScheme(recipe.activations.bits, recipe.activations.group_size, recipe.activations.symmetric)
    full_model = copy.deepcopy(model)
    for index, block in enumerate(model.model.transformer["blocks"]):
        for group in GROUPS:
            quantized = inputs_of_layer(model, index, group[0], states)
            full = inputs_of_layer(full_model, index, group[0], states)
            if recipe.weights.inputs == "quantized":
                quantized = quantize_activation(quantized, scheme)
            hessian, cross, total = 0.0, 0.0, 0.0
            for row, full_row, weights in zip(quantized, full, states.weights, strict=True):
                for x, source, w in zip(row.double(), full_row.double(), weights.double(), strict=True):
                    if w > 0:
                        hessian, total = hessian + w * torch.outer(x, x), total + w
                        cross = cross + w * torch.outer(source - x, x)
            moments = [(hessian / total).float()]
            if recipe.weights.solver != "gptq":
                moments.append((recipe.weights.correction * cross / total).float())
            solver = {"gptq": gptq, "gptaq": gptaq, "qronos": qronos}[recipe.weights.solver]
            for name in group:
                solved = solver(
                    block.get_submodule(name).weight.detach(),
                    *moments,
                    grid,
                    act_order=recipe.weights.act_order,
                    damping=recipe.weights.damping,
                    clip=recipe.weights.clip,
                )
                path = f"model.transformer.blocks.{index}.{name}"
                solutions[path] = solved.weight
                block.set_submodule(name, found.get_submodule(path))
    return solutions


@pytest.mark.parametrize(
    ("batch_size", "weights"),
    [
        (3, {}),
        (12, {}),
        (5, {"inputs": "quantized"}),
        (5, {"solver": "gptaq"}),
        (3, {"solver": "gptaq", "correction": 0.25}),
        (5, {"solver": "qronos", "inputs": "quantized"}),
    ],
    ids=str,
)
def test_streaming_equals_a_whole_model_reference(batch_size, weights):
    recipe = Recipe.load(tiny_recipe(weights=weights))
    model = tiny_llada()
    original, states = copy.deepcopy(model), calibrated(model, recipe)
    adapter = adapter_for(model)
    plan = make_plan(model, adapter, recipe)
    preparation = prepare(model, adapter, plan, recipe, states, progress=False)
    quantize_blocks(model, adapter, plan, recipe, states, preparation, batch_size=batch_size, progress=False)
    with torch.no_grad():
        reference = whole_model_reference(original, recipe, states, model)
    agreed = []
    for name in plan.modules:
        ours, theirs = model.get_submodule(name).quantized_weight(), reference[name]
        agreed.append((ours.codes == theirs.codes).float().mean())
        assert agreed[-1] > 0.98, name  # float32 sums in another order may flip a tie
    assert torch.stack(agreed).mean() > 0.999


def mixed_losses(model, monkeypatch, **weights):
    """Losses by layer, and what the allocation was asked."""
    asked = []

    def spy(*args, **kwargs):
        asked.append(kwargs)
        return allocate(*args, **kwargs)

    allocate = pipeline.allocate_group_bits
    monkeypatch.setattr(pipeline, "allocate_group_bits", spy)
    quantizer = DLLMQuantizer(tiny_recipe(weights={"bits": 2, "group_size": 8} | weights, activations=None))
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    monkeypatch.undo()
    return {report.name: report.loss for report in quantizer.reports}, asked


def test_the_allocation_of_widths_sees_what_the_solver_does(monkeypatch):
    weights = {"act_order": True, "damping": 0.05, "clip": "mse"}
    _, asked = mixed_losses(tiny_llada(), monkeypatch, mixed={"choices": [1, 2, 3], "mean": 2}, **weights)
    assert all(kwargs.items() >= weights.items() for kwargs in asked)
    assert len(asked) == 2 * 7


def test_mixed_widths_never_lose_more_than_one_width(monkeypatch):
    """The worst allocation there is: one group rounded to 3 bits, another to 1, whatever they matter."""
    first = "model.transformer.blocks.0.q_proj"  # all layers after it see other inputs
    uniform, _ = mixed_losses(tiny_llada(), monkeypatch)
    mixed, _ = mixed_losses(tiny_llada(), monkeypatch, mixed={"choices": [1, 2, 3], "mean": 2})
    assert mixed[first] <= uniform[first]
    monkeypatch.setattr(pipeline, "allocate_group_bits", lambda *_, **__: (1, 1, 3, 3))
    solved = []
    solver = pipeline._SOLVERS["gptq"]
    monkeypatch.setitem(pipeline._SOLVERS, "gptq", lambda *a, **k: solved.append(solver(*a, **k)) or solved[-1])
    model = tiny_llada()
    recipe = tiny_recipe(
        weights={"bits": 2, "group_size": 8, "mixed": {"choices": [1, 2, 3], "mean": 2}},
        activations=None,
        skip=["*.ff_out"],
    )
    quantizer = DLLMQuantizer(recipe)
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert len(solved) == 2 * len(quantizer.reports)
    for report, pair in zip(quantizer.reports, zip(solved[::2], solved[1::2], strict=True), strict=True):
        assert report.loss == min(found.loss for found in pair)


def test_every_planned_layer_is_packed_and_nothing_else():
    model = tiny_llada()
    before = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    kept = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(packed) == 2 * 7
    assert packed | kept == before
    assert kept == {"model.transformer.ff_out"}


def test_the_weights_reach_the_solver():
    uniform = tiny_recipe(token_weights={"kind": "uniform"})
    codes = []
    for recipe in (tiny_recipe(), uniform):
        model = tiny_llada()
        DLLMQuantizer(recipe).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
        codes.append(model.model.transformer["blocks"][0].q_proj.weight)
    assert not torch.equal(*codes)


def test_later_layers_see_the_quantized_earlier_ones():
    """With the first block's layers skipped, the second block is solved against other inputs."""
    second = "model.transformer.blocks.1."
    codes = []
    for skip in ((), ("model.transformer.blocks.0.*",)):
        model = tiny_llada()
        DLLMQuantizer(tiny_recipe(skip=skip)).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
        codes.append(model.get_submodule(second + "ff_out").weight)
    assert not torch.equal(*codes)


def test_reports_cover_every_layer():
    model = tiny_llada()
    quantizer = DLLMQuantizer(tiny_recipe())
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert [report.name for report in quantizer.reports] == [
        name for name, module in adapter_for_names(model) if isinstance(module, QuantLinear)
    ]
    for report in quantizer.reports:
        assert report.tokens == int(quantizer.states.batch.attention_mask.sum())
        assert report.loss >= 0
        assert report.damping == pytest.approx(0.01)


def adapter_for_names(model):
    return list(adapter_for(model).linears(model))


def test_escalated_damping_is_reported(caplog):
    """One state of few tokens leaves the Hessian singular; a vanishing damping cannot repair it."""
    recipe = tiny_recipe(
        weights={"damping": 1e-12, "group_size": 16},
        calibration={"num_states": 1, "num_prompts": 1, "batch_size": 1},
    )
    quantizer = DLLMQuantizer(recipe)
    with caplog.at_level(logging.WARNING, logger="dllmquant.pipeline"):
        quantizer.quantize(tiny_llada(), tokenizer=tiny_tokenizer(), progress=False)
    assert any("damping escalated" in record.message for record in caplog.records)
    assert max(report.damping for report in quantizer.reports) > 1e-12


def test_a_skip_pattern_that_matches_nothing_is_an_error():
    model = tiny_llada()
    recipe = Recipe.load(tiny_recipe(skip=("model.transformer.blocks.7.q_proj",)))
    with pytest.raises(RecipeError, match=r"skip: 'model\.transformer\.blocks\.7\.q_proj' matches no"):
        make_plan(model, adapter_for(model), recipe)


def test_the_head_is_never_reached_by_the_name_it_shares():
    model = tiny_llada()
    with pytest.raises(RecipeError, match="matches no"):
        make_plan(model, adapter_for(model), Recipe.load(tiny_recipe(skip=("ff_out",))))


def test_skipping_everything_is_an_error():
    model = tiny_llada()
    with pytest.raises(RecipeError, match="nothing would be quantized"):
        make_plan(model, adapter_for(model), Recipe.load(tiny_recipe(skip=("model.*",))))


@pytest.mark.parametrize("section", ["weights", "activations"])
def test_group_sizes_that_do_not_divide_are_errors(section):
    model = tiny_llada()
    recipe = Recipe.load(tiny_recipe(**{section: {"group_size": 24}}))
    with pytest.raises(RecipeError, match=rf"{section}\.group_size: 24 does not divide the 32"):
        make_plan(model, adapter_for(model), recipe)


def test_failure_in_the_first_block_leaves_the_model_untouched(monkeypatch):
    model = tiny_llada()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # in the third group of the first block
            raise ValueError("no solution")
        return gptq(*args, **kwargs)

    monkeypatch.setitem(pipeline._SOLVERS, "gptq", failing)
    with pytest.raises(ValueError, match=r"model\.transformer\.blocks\.0\.ff_proj: no solution"):
        DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert getattr(model.config, "quantization_config", None) is None


def test_nan_weights_are_found_before_any_work():
    model = tiny_llada()
    with torch.no_grad():
        model.model.transformer["blocks"][1].up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.up_proj\.weight holds NaN"):
        DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
