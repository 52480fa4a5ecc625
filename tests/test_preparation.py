"""What happens before solving: transforms keep the function, attention and errors are measured, bits are allocated."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dllmquant import DLLMQuantizer, Recipe, RecipeError, pipeline
from dllmquant.calibration import builtin_prompts, collect_states
from dllmquant.core.allocate import allocate
from dllmquant.models import adapter_for
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.linear import QuantLinear
from dllmquant.plan import make_plan
from dllmquant.preparation import block_token_weights, prepare, scaling
from tests.tiny import tiny_llada, tiny_recipe, tiny_tokenizer

SITES = ("q_proj", "attn_out", "ff_proj", "ff_out")


def prepared(model, recipe):
    """The states and the preparation of a recipe."""
    states = collect_states(
        model,
        tiny_tokenizer(),
        builtin_prompts(16, 0),
        recipe.calibration,
        recipe.token_weights,
        seed=0,
        progress=False,
    )
    adapter = adapter_for(model)
    return states, prepare(model, adapter, make_plan(model, adapter, recipe), recipe, states, progress=False)


def logits(model, states):
    with torch.no_grad():
        return model(states.batch.ids, attention_mask=states.batch.attention_mask).logits[states.batch.mask]


def attention_by_hand(model, states, index):
    """Attention received per token in block `index`, from explicit softmaxes, normalised to mean 1 over real tokens."""
    blocks = model.model.transformer["blocks"]
    seen = []
    hook = lambda _module, args, kwargs: seen.append((args, kwargs))  # noqa: E731
    handle = blocks[index].register_forward_pre_hook(hook, with_kwargs=True)
    logits(model, states)
    handle.remove()
    (x, cos, sin), _ = seen[0]
    block = blocks[index]
    h = block.attn_norm(x)

    def heads(linear):
        return linear(h).unflatten(-1, (4, -1)).transpose(1, 2)

    def rotate(t):
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat((-second, first), -1) * sin

    scores = rotate(heads(block.q_proj)) @ rotate(heads(block.k_proj)).mT / (x.shape[-1] // 4) ** 0.5
    keep = states.batch.attention_mask
    scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    mass = torch.einsum("bhqk,bq->bk", scores.softmax(-1), states.weights) * keep
    return mass / (mass.sum(1, keepdim=True) / keep.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "transforms",
    [
        [{"kind": "smoothquant"}],
        [{"kind": "awq", "grid_points": 5}],
        [{"kind": "awq", "grid_points": 3, "objective": "layer", "duo_scaling": True}],
        [{"kind": "quarot"}],
        [{"kind": "quarot", "values": False}, {"kind": "smoothquant", "alpha": 0.8}],
    ],
    ids=lambda transforms: "+".join(t["kind"] for t in transforms),
)
def test_folded_transforms_change_weights_but_not_the_function(transforms):
    recipe = Recipe.load(tiny_recipe(transforms=transforms))
    model = tiny_llada()
    original = copy.deepcopy(model)
    states, _ = prepared(model, recipe)
    assert not torch.allclose(
        model.model.transformer["blocks"][0].q_proj.weight, original.model.transformer["blocks"][0].q_proj.weight
    )
    torch.testing.assert_close(logits(model, states), logits(original, states), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("producers", ["norms", "all"])
def test_smoothing_behind_linear_layers_if_asked(producers):
    """Equal largest magnitudes of input and weight (alpha 0.5), channel by channel, wherever scales can be folded."""
    recipe = Recipe.load(tiny_recipe(transforms=[{"kind": "smoothquant", "producers": producers}]))
    model = tiny_llada(init_std=0.3)
    original = copy.deepcopy(model)
    states, _ = prepared(model, recipe)
    torch.testing.assert_close(logits(model, states), logits(original, states), rtol=1e-3, atol=1e-3)
    for block, was in zip(model.model.transformer["blocks"], original.model.transformer["blocks"], strict=True):
        for readers in (("q_proj", "k_proj", "v_proj"), ("ff_proj", "up_proj"), ("attn_out",), ("ff_out",)):
            seen = []
            handle = block.get_submodule(readers[0]).register_forward_pre_hook(
                lambda _module, args, seen=seen: seen.append(args[0])
            )
            logits(model, states)
            handle.remove()
            x = seen[0][states.batch.attention_mask].abs().amax(0)
            w = torch.stack([block.get_submodule(name).weight.abs().amax(0) for name in readers]).amax(0)
            if (producers == "all") == (len(readers) == 1):  # scaling a linear layer moves what was equal before it
                ratio = x / w
                torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-2, atol=0)
            elif producers == "norms":
                assert torch.equal(block.get_submodule(readers[0]).weight, was.get_submodule(readers[0]).weight)


@pytest.mark.parametrize("objective", ["sub_block", "layer"])
def test_awq_searches_behind_the_rotation_it_stands_in_front_of(objective, monkeypatch):
    name, seen = f"{'sub_block' if objective == 'sub_block' else 'linear'}_objective", []
    real = getattr(scaling, name)

    def spy(*args):
        seen.append(args[-1])
        return real(*args)

    monkeypatch.setattr(scaling, name, spy)
    rotated = [{"kind": "awq", "grid_points": 2, "objective": objective}, {"kind": "hadamard", "sites": ["ff_out"]}]
    _, preparation = prepared(tiny_llada(), Recipe.load(tiny_recipe(transforms=rotated)))
    assert [behind is not None for behind in seen] == [False, False, False, True] * 2
    assert seen[3] is preparation.input_transforms["model.transformer.blocks.0.ff_out"]


SCALED = [{"kind": "iaaq"}, {"kind": "hadamard", "sites": ["ff_out"]}]


@pytest.mark.parametrize("interaction", [True, False])
def test_input_scales_are_folded_in_front_of_the_rotation_only(interaction):
    """s_i⁴ ∝ Σ_j w_j x_ji² / Σ_o W_oi², w_j the attention received times CGQ's weight, or that weight alone."""
    recipe = Recipe.load(
        tiny_recipe(
            transforms=[SCALED[0] | {"interaction": interaction}, SCALED[1]],
            token_weights={"kind": "cgq"},
            calibration={"states": "trajectory"},
        )
    )
    model = tiny_llada(init_std=0.3)
    before = copy.deepcopy(model)
    states, _ = prepared(model, recipe)
    torch.testing.assert_close(logits(model, states), logits(before, states), rtol=1e-4, atol=1e-4)
    blocks, old = model.model.transformer["blocks"], before.model.transformer["blocks"]
    for index, (block, was) in enumerate(zip(blocks, old, strict=True)):
        seen = []
        handle = was.ff_out.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        logits(before, states)
        handle.remove()
        w = states.weights.double()
        if interaction:
            w = w * attention_by_hand(before, states, index).double()
        a = torch.einsum("bk,bki->i", w, seen[0].double() ** 2)
        expected = (a / was.ff_out.weight.double().square().sum(0)) ** 0.25
        expected = expected / (expected.max() * expected.min()).sqrt()
        scales = (was.up_proj.weight / block.up_proj.weight).double()
        torch.testing.assert_close(scales, expected[:, None].expand_as(scales), rtol=1e-4, atol=0)
        torch.testing.assert_close(
            block.ff_out.weight / was.ff_out.weight,
            expected.float().expand(len(was.ff_out.weight), -1),
            rtol=1e-4,
            atol=0,
        )
        for name, parameter in was.named_parameters():
            if name not in ("up_proj.weight", "ff_out.weight"):
                assert torch.equal(block.get_parameter(name), parameter), name


def test_awq_measures_the_sub_blocks_output_on_states_from_all_over(monkeypatch):
    """The first of several batches is the first part of the trajectories only."""
    monkeypatch.setattr("dllmquant.preparation.walk._SEARCH_STATES", 4)
    asked = []

    def spy(block, consumers, run, token_weights, *rest):
        asked.append((block, tuple(consumers), list(run()), torch.cat(list(token_weights))))
        return lambda scales: 1.0  # scales of 1 win, so the block stays as it is

    monkeypatch.setattr("dllmquant.preparation.scaling.sub_block_objective", spy)
    model = tiny_llada()
    states, _ = prepared(model, Recipe.load(tiny_recipe(transforms=[{"kind": "awq"}])))
    ends = {"q_proj": "attn_out", "attn_out": "attn_out", "ff_proj": "ff_out", "ff_out": "ff_out"}
    seen = {}
    for index, block in enumerate(model.model.transformer["blocks"]):
        for name in set(ends.values()):
            module = block.get_submodule(name)
            module.register_forward_hook(lambda _m, _a, out, key=(index, name): seen.__setitem__(key, out))
    logits(model, states)
    assert len(asked) == 2 * len(ends)
    spread = range(0, 12, 3)
    for call, (_, consumers, outputs, weights) in enumerate(asked):
        expected = seen[call // len(ends), ends[consumers[0]]][spread]
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(weights, states.weights[spread])


def test_a_transform_that_breaks_the_function_is_an_error(monkeypatch):
    def broken(block, producer, consumers, scales):
        for consumer in consumers:
            block.get_submodule(consumer).weight.data.mul_(scales)

    monkeypatch.setattr("dllmquant.preparation.scaling.apply_scales", broken)
    with pytest.raises(ValueError, match="smoothquant: changes what the model computes"):
        prepared(tiny_llada(), Recipe.load(tiny_recipe(transforms=[{"kind": "smoothquant"}])))


@pytest.mark.parametrize(
    ("calibrated", "settings", "broken"),
    [
        (False, {"kind": "hadamard"}, ("_signs", lambda length, *_: torch.full((length,), 2.0))),
        (True, {"kind": "hadamard"}, ("_factors", lambda size, dtype, device: (torch.ones(size, size, dtype=dtype),))),
        (True, {"kind": "duquant", "block_size": 16}, ("_inverse_transpose", lambda name, blocks: blocks.mT)),
        (True, {"kind": "wush", "block_size": 16}, ("_inverse_transpose", lambda name, blocks: blocks)),
    ],
    ids=["without data", "hadamard", "duquant", "wush"],
)
def test_an_input_transform_that_is_not_undone_in_the_weight_is_an_error(settings, broken, calibrated, monkeypatch):
    recipe = tiny_recipe(transforms=[settings | {"sites": ["attn_out"]}])
    if not calibrated:
        recipe |= {"extends": "rtn-w4a4", "calibration": None}
    monkeypatch.setattr(f"dllmquant.nn.transform.{broken[0]}", broken[1])
    model = tiny_llada()
    with pytest.raises(
        ValueError, match=rf"blocks\.0\.attn_out: transform '{settings['kind']}' and its inverse do not"
    ):
        DLLMQuantizer(recipe).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_weights_of_zero_leave_tokens_out_of_ranges():
    """That is all that token weights are to SmoothQuant."""
    found = []
    for base in (0.7, 0.0):
        model = tiny_llada()
        weights = {"kind": "cgq", "unmasked_base": base}
        prepared(model, Recipe.load(tiny_recipe(transforms=[{"kind": "smoothquant"}], token_weights=weights)))
        found.append(model.model.transformer["blocks"][1].q_proj.weight)
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", ["hadamard", "duquant", "wush"])
def test_input_transforms_reach_their_sites_only(kind):
    recipe = tiny_recipe(transforms=[{"kind": kind, "sites": ["q_proj", "ff_out"], "block_size": 16}])
    model = tiny_llada()
    DLLMQuantizer(recipe).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            expected = name.rsplit(".", 1)[1] in ("q_proj", "k_proj", "v_proj", "ff_out")
            assert (module.input_transform is not None) == expected, name


@pytest.mark.parametrize("kind", ["hadamard", "duquant", "wush"])
def test_eight_bits_behind_an_input_transform_are_almost_the_model(kind):
    """The transformed weight belongs to the transformed input: any mix-up would show at 8 bits."""
    recipe = tiny_recipe(transforms=[{"kind": kind, "block_size": 16}], weights={"bits": 8}, activations={"bits": 8})
    model = tiny_llada()
    original = copy.deepcopy(model)
    quantizer = DLLMQuantizer(recipe)
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    exact, rounded = logits(original, quantizer.states), logits(model, quantizer.states)
    assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_interaction_is_the_attention_received_in_each_block():
    model = tiny_llada()
    recipe = Recipe.load(tiny_recipe(token_weights={"kind": "interaction"}))
    states, preparation = prepared(model, recipe)
    with torch.no_grad():
        for index in range(2):
            expected = attention_by_hand(model, states, index)
            torch.testing.assert_close(preparation.token_weights[index], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(preparation.token_weights[0], preparation.token_weights[1])


def test_tokens_that_count_nothing_receive_attention_all_the_same():
    model = tiny_llada()
    recipe = Recipe.load(tiny_recipe(token_weights={"kind": "cgq", "unmasked_base": 0.0}))
    states, _ = prepared(model, recipe)
    silent = (states.weights == 0) & states.batch.attention_mask
    assert silent.any()
    received, _ = block_token_weights(model, adapter_for(model), recipe, states, measures=True)
    with torch.no_grad():
        for index in range(2):
            expected = attention_by_hand(model, states, index)
            torch.testing.assert_close(received[index], expected, rtol=1e-4, atol=1e-5)
            assert (received[index][silent] > 0).all()


def test_other_weights_are_the_states_own_in_every_block():
    model = tiny_llada()
    recipe = Recipe.load(tiny_recipe())
    states, preparation = prepared(model, recipe)
    received, weights = block_token_weights(model, adapter_for(model), recipe, states)
    assert received == []
    assert all(torch.equal(w, states.weights) for w in (*weights, *preparation.token_weights))


def test_output_errors_are_interaction_weighted_relative_errors():
    model = tiny_llada()
    recipe = Recipe.load(tiny_recipe(activations={"allocation": {"mean_bits": 5}}))
    states, preparation = prepared(model, recipe)
    entry = next(e for e in preparation.allocation if e.site.endswith("blocks.1.ff_proj"))
    block = model.model.transformer["blocks"][1]
    seen = []
    handle = block.ff_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        logits(model, states)
        handle.remove()
        w = (states.weights * attention_by_hand(model, states, 1)).double().flatten()
        x = seen[0].flatten(0, 1)
        matrix = torch.cat((block.ff_proj.weight, block.up_proj.weight)).double()
        for bits in (4, 8):
            delta = (x - quantize_activation(x, ActivationScheme(bits))).double()
            error = w @ (delta @ matrix.T).square().sum(1)
            signal = w @ (x.double() @ matrix.T).square().sum(1)
            assert entry.errors[bits] == pytest.approx(float(error / signal), rel=1e-4)


def test_logit_errors_are_the_divergence_with_one_site_quantized():
    model = tiny_llada()
    recipe = Recipe.load(tiny_recipe(activations={"allocation": {"mean_bits": 5, "objective": "logits"}}))
    states, preparation = prepared(model, recipe)
    entry = next(e for e in preparation.allocation if e.site.endswith("blocks.0.attn_out"))
    reference = logits(model, states).log_softmax(-1)
    linear = model.model.transformer["blocks"][0].attn_out
    scheme = ActivationScheme(4)
    handle = linear.register_forward_pre_hook(lambda _module, args: (quantize_activation(args[0], scheme),))
    got = logits(model, states).log_softmax(-1)
    handle.remove()
    weights = states.weights[states.batch.mask]
    divergence = F.kl_div(got, reference, log_target=True, reduction="none").sum(-1)
    assert entry.errors[4] == pytest.approx(float((divergence * weights).sum()), rel=1e-3)


@pytest.mark.parametrize("heads", [False, True])
def test_allocation_spends_its_budget_where_the_errors_are(heads):
    recipe = Recipe.load(tiny_recipe(activations={"allocation": {"mean_bits": 5, "heads": heads}}))
    model = tiny_llada()
    quantizer = DLLMQuantizer(recipe)
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    table = quantizer.allocation
    widths = [64 if e.site.endswith("ff_out") else 8 if e.unit is not None else 32 for e in table]
    assert len(table) == (2 * (3 + 4) if heads else 2 * 4)
    mean = sum(e.bits * n for e, n in zip(table, widths, strict=True)) / sum(widths)
    assert 4 < mean <= 5
    costs = torch.tensor([[e.errors[4], e.errors[8]] for e in table], dtype=torch.float64)
    assert [e.bits for e in table] == allocate(costs, widths, (4, 8), 5.0)
    for entry in table:
        scheme = model.get_submodule(entry.site).activation
        if entry.unit is None:
            assert scheme.bits == entry.bits
        else:
            assert scheme.group_size == 8
            assert scheme.group_bits[entry.unit] == entry.bits


def test_layers_of_one_input_share_their_bits():
    recipe = Recipe.load(tiny_recipe(activations={"allocation": {"mean_bits": 5}}))
    model = tiny_llada()
    DLLMQuantizer(recipe).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    for block in model.model.transformer["blocks"]:
        assert block.q_proj.activation == block.k_proj.activation == block.v_proj.activation
        assert block.ff_proj.activation == block.up_proj.activation


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"kind": "hadamard", "sites": ["down_proj"]}], r"hadamard\.sites: 'down_proj'; valid: q_proj, attn_out"),
        ([{"kind": "wush", "block_size": 24}], r"wush\.block_size 24 does not divide the 32"),
    ],
)
def test_transforms_that_do_not_fit_are_found_before_any_work(transforms, message):
    model = tiny_llada()
    with pytest.raises(RecipeError, match=message):
        make_plan(model, adapter_for(model), Recipe.load(tiny_recipe(transforms=transforms)))


def test_input_scales_need_a_producer_that_can_be_scaled():
    """Two query heads read each value head, whose channels therefore cannot be scaled one by one."""
    recipe = Recipe.load(tiny_recipe(transforms=[{"kind": "iaaq"}, {"kind": "hadamard", "sites": ["attn_out"]}]))
    grouped, plain = tiny_llada(n_kv_heads=2), tiny_llada()
    make_plan(plain, adapter_for(plain), recipe)
    with pytest.raises(RecipeError, match=r"'iaaq': what a 'hadamard' rotates \(attn_out\) has no .* ff_out, ff_proj"):
        make_plan(grouped, adapter_for(grouped), recipe)


@pytest.mark.parametrize("failing", ["measuring", "first block", "second block"])
def test_a_failure_before_the_first_block_is_solved_undoes_folded_transforms(failing, monkeypatch):
    model = tiny_llada()
    before = copy.deepcopy(model.state_dict())
    solver, calls = pipeline._SOLVERS["gptq"], []

    def limited(*args, **kwargs):
        calls.append(1)
        if len(calls) > {"measuring": 0, "first block": 3, "second block": 9}[failing]:
            raise ValueError("no solution")
        return solver(*args, **kwargs)

    if failing == "measuring":
        monkeypatch.setattr("dllmquant.preparation.walk.fit_wush", limited)
    monkeypatch.setitem(pipeline._SOLVERS, "gptq", limited)
    recipe = tiny_recipe(transforms=[{"kind": "quarot"}, {"kind": "smoothquant"}, {"kind": "wush", "block_size": 16}])
    with pytest.raises(ValueError, match="no solution"):
        DLLMQuantizer(recipe).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    after = model.state_dict()
    unchanged = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert unchanged == (failing != "second block")
