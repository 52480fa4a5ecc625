"""AWQ's searches against brute force in float64 numpy, one token, row and candidate at a time."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dllmquant.capture import BlockCall
from dllmquant.core.grid import Grid, QuantizedWeight, fit_scale, quantize_to_grid
from dllmquant.core.stats import HessianAccumulator
from dllmquant.models.layers import rotary_cos_sin
from dllmquant.nn.activation import ActivationScheme
from dllmquant.transforms.awq import linear_objective, mean_magnitude, search_clip, search_scales, sub_block_objective
from dllmquant.transforms.fold import apply_scales
from dllmquant.transforms.hadamard import fit_hadamard
from tests.models.toys import tiny_model
from tests.oracles import obs

CHANNELS = 12


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed, tokens=40):
    """Two weights, correlated tokens with one large and one dead channel, and uneven token weights with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = normal(generator, tokens, 4) @ normal(generator, 4, CHANNELS) + 0.4 * normal(generator, tokens, CHANNELS)
    x[:, 2] *= 20
    x[:, 5] = 0
    share = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.3
    share[::7] = 0
    return [normal(generator, 6, CHANNELS), normal(generator, 3, CHANNELS)], x, share


def mean_abs(x, share):
    return (x.abs() * share[:, None]).sum(0) / share.sum()


# -- Brute force ------------------------------------------------------------------------------------------------------


def round_rows(weight, bits, group_size, symmetric):
    """Round to nearest, one group of one row at a time."""
    out = np.empty_like(weight)
    width = group_size or weight.shape[1]
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], width):
            values = weight[row, start : start + width]
            scale, zero = obs.fit(values, bits, symmetric, "none", np.ones(width))
            out[row, start : start + width] = (obs.snap(values, scale, zero, bits) - zero) * scale
    return out


def round_token(x, bits, group_size):
    """Symmetric dynamic rounding of one token."""
    out, width, top = np.zeros_like(x), group_size or len(x), 2 ** (bits - 1) - 1
    for start in range(0, len(x), width):
        scale = np.abs(x[start : start + width]).max() / top
        if scale:
            out[start : start + width] = np.rint(x[start : start + width] / scale) * scale
    return out


def brute_force(weights, x, share, scales, grid, activation, matrix=None):
    """Σ_j w_j Σ_l ‖W_l x_j − Q(W_l diag s T⁻ᵀ) A((x_j / s) T)‖² / Σ_j w_j."""
    matrix = np.eye(x.shape[1]) if matrix is None else matrix
    dual = np.linalg.inv(matrix).T
    rounded = [round_rows((w.numpy() * scales) @ dual, grid.bits, grid.group_size, grid.symmetric) for w in weights]
    total = 0.0
    for token, weight in zip(x.numpy(), share.tolist(), strict=True):
        scaled = (token / scales) @ matrix
        if activation is not None:
            scaled = round_token(scaled, activation.bits, activation.group_size)
        for w, q in zip(weights, rounded, strict=True):
            total += weight * float(((w.numpy() @ token - q @ scaled) ** 2).sum())
    return total / float(share.sum())


def candidate(magnitudes, beta, weight_mean=None):
    """One candidate: s = m^β (/ v^(1−β)) on live channels, times a constant that makes max s · min s = 1."""
    m = magnitudes.numpy()
    v = np.ones_like(m) if weight_mean is None else weight_mean.numpy()
    alive = np.flatnonzero((m > 0) & (v > 0))
    s = np.ones_like(m)
    for i in alive:
        s[i] = max(m[i], 1e-4 * m[alive].max()) ** beta / max(v[i], 1e-4 * v[alive].max()) ** (1 - beta)
    s[alive] /= np.sqrt(s[alive].max() * s[alive].min())
    return s


# -- Scales -----------------------------------------------------------------------------------------------------------

GRIDS = [Grid(3, 4, False), Grid(4, None, True), Grid(2, 6, False)]
SCHEMES = [None, ActivationScheme(4), ActivationScheme(4, group_size=4)]


@pytest.mark.parametrize("activation", SCHEMES, ids=["a16", "token", "group"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_linear_objective_is_the_weighted_output_error(grid, activation):
    weights, x, share = problem(0)
    evaluate = linear_objective(weights, x, share, grid, activation)
    for beta in (0.0, 0.35, 1.0):
        scales = candidate(mean_abs(x, share), beta)
        expected = brute_force(weights, x, share, scales, grid, activation)
        assert expected > 0
        assert evaluate(torch.tensor(scales)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("activation", SCHEMES, ids=["a16", "token", "group"])
def test_linear_objective_rounds_what_a_transform_behind_the_scales_gives_out(activation):
    weights, x, share = problem(3)
    transform = fit_hadamard(CHANNELS, block_size=4, seed=5)
    matrix = transform.matrix().numpy()
    evaluate = linear_objective(weights, x, share, GRIDS[0], activation, transform)
    for beta in (0.0, 0.35, 1.0):
        scales = candidate(mean_abs(x, share), beta)
        expected = brute_force(weights, x, share, scales, GRIDS[0], activation, matrix)
        assert expected != pytest.approx(brute_force(weights, x, share, scales, GRIDS[0], activation), rel=1e-3)
        assert evaluate(torch.tensor(scales)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("activation", SCHEMES[:2], ids=["a16", "token"])
@pytest.mark.parametrize("duo", [False, True], ids=["plain", "duo"])
def test_the_search_finds_the_best_candidate(duo, activation):
    weights, x, share = problem(1)
    grid, magnitudes = GRIDS[0], mean_abs(x, share)
    weight_mean = mean_magnitude(weights, grid) if duo else None
    evaluate = linear_objective(weights, x, share, grid, activation)
    found = search_scales(magnitudes, evaluate, weight_mean=weight_mean)
    losses = {None: brute_force(weights, x, share, np.ones(CHANNELS), grid, activation)}
    for k in range(21):
        scales = candidate(magnitudes, k / 20, weight_mean)
        losses[k / 20] = brute_force(weights, x, share, scales, grid, activation)
    best = min(losses, key=lambda beta: losses[beta])
    assert found.beta == best
    assert best not in (None, 0.0)
    assert found.loss == pytest.approx(losses[best], rel=1e-9)
    assert found.unscaled_loss == pytest.approx(losses[None], rel=1e-9)
    np.testing.assert_allclose(found.scales.numpy(), candidate(magnitudes, best, weight_mean), rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4, 8]),
    grid_points=st.integers(1, 6),
    duo=st.booleans(),
    activated=st.booleans(),
)
def test_never_worse_than_no_scales(seed, bits, grid_points, duo, activated):
    weights, x, share = problem(seed, tokens=12)
    grid = Grid(bits, 4, False)
    evaluate = linear_objective(weights, x, share, grid, ActivationScheme(4) if activated else None)
    weight_mean = mean_magnitude(weights, grid) if duo else None
    found = search_scales(mean_abs(x, share), evaluate, grid_points=grid_points, weight_mean=weight_mean)
    assert found.loss <= found.unscaled_loss == evaluate(torch.ones(CHANNELS))
    assert evaluate(found.scales) == found.loss
    assert bool((torch.isfinite(found.scales) & (found.scales > 0)).all())


def test_scales_of_one_come_first_and_win_ties():
    tried = []

    def evaluate(scales):
        tried.append(scales)
        return 1.0

    found = search_scales(torch.tensor([0.5, 2.0, 8.0]), evaluate, grid_points=4)
    assert found.beta is None
    assert torch.equal(found.scales, torch.ones(3, dtype=torch.float64))
    assert torch.equal(tried[0], torch.ones(3, dtype=torch.float64))
    assert len(tried) == 6
    torch.testing.assert_close(tried[5], torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(tried[3], tried[5].sqrt())


def test_the_unit_of_the_activations_does_not_matter_and_extremes_are_bounded():
    tried = {1.0: [], 1e6: []}
    for unit, seen in tried.items():
        search_scales(torch.tensor([1e-20, 0.5, 2.0, 0.0]) * unit, lambda s, seen=seen: seen.append(s) or 1.0)
    for one, other in zip(*tried.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        assert float(one[3]) == 1
        assert float(one.max() / one.min()) <= 1.0001e4
    assert float(tried[1.0][-1][0]) == pytest.approx(1e-2)


def test_all_dead_channels_keep_scales_of_one():
    found = search_scales(torch.zeros(3), lambda scales: 2.0)
    assert (found.loss, found.beta) == (2.0, None)
    assert torch.equal(found.scales, torch.ones(3, dtype=torch.float64))


def test_candidates_without_a_finite_loss_are_never_taken():
    losses = iter([1.0, float("nan"), 0.5, float("inf"), 0.7])
    found = search_scales(torch.tensor([1.0, 2.0]), lambda scales: next(losses), grid_points=3)
    assert (found.beta, found.loss) == (pytest.approx(1 / 3), 0.5)


@pytest.mark.parametrize("activation", SCHEMES[:2], ids=["a16", "token"])
def test_a_token_twice_is_a_token_of_weight_two(activation):
    weights, x, _ = problem(2)
    scales = torch.tensor(candidate(x.abs().mean(0), 0.5))
    share = torch.ones(len(x), dtype=torch.float64)
    share[:5] = 2
    weighted = linear_objective(weights, x, share, GRIDS[0], activation)
    repeated = torch.cat((x, x[:5]))
    twice = linear_objective(weights, repeated, torch.ones(len(repeated)), GRIDS[0], activation)
    assert weighted(scales) == pytest.approx(twice(scales), rel=1e-12)
    huge = linear_objective(weights, x, share * 1e5, GRIDS[0], activation)
    assert huge(scales) == pytest.approx(weighted(scales), rel=1e-9)


def test_tokens_of_weight_zero_may_hold_anything():
    weights, x, share = problem(3)
    scales = torch.tensor(candidate(mean_abs(x, share), 0.5))
    expected = linear_objective(weights, x, share, GRIDS[0])(scales)
    x[share == 0] = torch.nan
    assert linear_objective(weights, x, share, GRIDS[0])(scales) == expected


def test_narrow_tokens_are_computed_in_float32():
    weights, x, share = problem(4)
    scales = torch.tensor(candidate(mean_abs(x, share), 0.5))
    x, weights = x.bfloat16(), [weight.bfloat16() for weight in weights]
    wide = linear_objective([weight.double() for weight in weights], x.double(), share, GRIDS[0])(scales)
    assert linear_objective(weights, x, share.float(), GRIDS[0])(scales) == pytest.approx(wide, rel=1e-3)


@pytest.mark.parametrize("group_size", [4, None])
def test_mean_magnitude_is_relative_to_the_groups_largest(group_size):
    weights, _, _ = problem(5)
    weights[0][1, 4:8] = 0
    width = group_size or CHANNELS
    expected = np.zeros(CHANNELS)
    rows = [row for weight in weights for row in weight.numpy()]
    for row in rows:
        for i in range(CHANNELS):
            largest = np.abs(row[i // width * width : (i // width + 1) * width]).max()
            expected[i] += abs(row[i]) / largest / len(rows) if largest else 0
    actual = mean_magnitude(weights, Grid(4, group_size, True))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


# -- The objective of a block -----------------------------------------------------------------------------------------


class RoundingLinear(nn.Module):
    """A quantized linear of the oracle: Q(W) fixed, inputs rounded token by token, behind a rotation if given."""

    def __init__(self, linear, grid, activation, rotation=None):
        super().__init__()
        self.rotation = torch.eye(linear.in_features, dtype=torch.float64) if rotation is None else rotation
        weight = (linear.weight @ self.rotation).numpy()
        self.weight = torch.tensor(round_rows(weight, grid.bits, grid.group_size, grid.symmetric))
        self.bias, self.activation = linear.bias, activation

    def forward(self, x):
        x = x @ self.rotation
        if self.activation is not None:
            tokens = x.reshape(-1, x.shape[-1]).numpy()
            rounded = np.stack([round_token(t, self.activation.bits, self.activation.group_size) for t in tokens])
            x = torch.tensor(rounded).reshape(x.shape)
        return nn.functional.linear(x, self.weight, self.bias)


def block_problem():
    block = tiny_model(dtype=torch.float64, include_bias=True, n_kv_heads=1).model.transformer["blocks"][0]
    block.requires_grad_(False)
    generator = torch.Generator().manual_seed(6)
    calls, shares = [], []
    for length in (5, 7):
        keep = torch.ones(2, 1, 1, length, dtype=torch.bool)
        keep[1, ..., :2] = False
        cos, sin = rotary_cos_sin(length, 8, 100.0, torch.device("cpu"))
        calls.append(BlockCall(normal(generator, 2, length, 16), (cos, sin), {"attention_mask": keep}))
        share = torch.rand(2, length, generator=generator) + 0.2
        shares.append(share * keep[:, 0, 0])
    return block, calls, shares


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("activation", [None, ActivationScheme(4, group_size=8)], ids=["a16", "a4"])
@pytest.mark.parametrize(
    ("producer", "consumers"),
    [("attn_norm", ["q_proj", "k_proj", "v_proj"]), ("ff_norm", ["ff_proj", "up_proj"]), ("up_proj", ["ff_out"])],
)
def test_sub_block_objective_is_the_error_of_a_block_that_was_really_quantized(
    producer, consumers, activation, rotated
):
    block, calls, shares = block_problem()
    grid = Grid(3, 8, False)
    width = block.get_submodule(consumers[0]).in_features
    transform = fit_hadamard(width, block_size=8, seed=4) if rotated else None
    rotation = None if transform is None else transform.matrix()
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    evaluate = sub_block_objective(
        block, consumers, lambda: (call.run(block) for call in calls), shares, grid, activation, transform
    )
    generator = torch.Generator().manual_seed(7)
    for scales in (torch.ones(block.get_submodule(consumers[0]).in_features), None):
        if scales is None:
            scales = torch.rand(block.get_submodule(consumers[0]).in_features, generator=generator) + 0.3
        real = copy.deepcopy(block)
        apply_scales(real, producer, consumers, scales)
        for consumer in consumers:
            real.set_submodule(consumer, RoundingLinear(real.get_submodule(consumer), grid, activation, rotation))
        total = weight = 0.0
        for call, share in zip(calls, shares, strict=True):
            error = (call.run(real) - call.run(block)).square().sum(-1)
            total += float((error * share).sum())
            weight += float(share.sum())
        assert total > 0
        assert evaluate(scales) == pytest.approx(total / weight, rel=1e-6)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_the_search_runs_on_a_block():
    block, calls, shares = block_problem()
    seen = []
    handle = block.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for call in calls:
        call.run(block)
    handle.remove()
    consumers = ["q_proj", "k_proj", "v_proj"]
    run = lambda: (call.run(block) for call in calls)  # noqa: E731 - as the docstring shows it
    evaluate = sub_block_objective(block, consumers, run, shares, Grid(2, 8, False))
    found = search_scales(mean_abs(torch.cat(seen), torch.cat([s.flatten() for s in shares])), evaluate)
    assert found.loss < found.unscaled_loss


def test_a_block_that_fails_while_quantized_is_restored():
    block, calls, shares = block_problem()
    weight = block.q_proj.weight.clone()
    evaluate = sub_block_objective(
        block, ["q_proj"], lambda: (call.run(block) for call in calls), shares, Grid(2, 8, False)
    )
    calls[1] = BlockCall(torch.zeros(1), (), {})
    with pytest.raises(TypeError):
        evaluate(torch.ones(16))
    with pytest.raises(ValueError, match="group_size: 5"):
        sub_block_objective(
            block, ["q_proj"], lambda: (c.run(block) for c in calls[:1]), shares[:1], Grid(2, 5, False)
        )(torch.ones(16))
    assert torch.equal(block.q_proj.weight, weight)
    assert not block.q_proj._forward_pre_hooks


# -- Clipping ---------------------------------------------------------------------------------------------------------


def clip_problem(seed, rows=6):
    generator = torch.Generator().manual_seed(seed)
    _, x, share = problem(seed)
    accumulator = HessianAccumulator(CHANNELS, dtype=torch.float64)
    accumulator.add(x, share)
    heavy = normal(generator, rows, CHANNELS) * normal(generator, rows, CHANNELS)
    return heavy, accumulator.hessian(), x, share


def group_losses(weight, scale, zero, grid, x, share):
    """Per row and group Σ_j w_j (x_g · Δ_g)² / Σ_j w_j by explicit products with every token."""
    restored = QuantizedWeight(grid, quantize_to_grid(weight, scale, zero, grid), scale, zero).dequantize(torch.float64)
    delta, width = (weight - restored).numpy(), grid.width(CHANNELS)
    losses = np.zeros((len(weight), CHANNELS // width))
    for group in range(CHANNELS // width):
        columns = slice(group * width, (group + 1) * width)
        outputs = x.numpy()[:, columns] @ delta[:, columns].T
        losses[:, group] = (outputs**2 * share.numpy()[:, None]).sum(0) / float(share.sum())
    return losses


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [4, 6, None])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_clip_is_the_best_ratio_of_every_group(bits, group_size, symmetric):
    weight, hessian, x, share = clip_problem(bits)
    grid = Grid(bits, group_size, symmetric)
    scale, zero = search_clip(weight, hessian, grid)
    assert (scale.dtype, zero.dtype) == (torch.float16, torch.uint8)
    width = group_size or CHANNELS
    shrunk = 0
    for row in range(len(weight)):
        for group in range(CHANNELS // width):
            columns = slice(group * width, (group + 1) * width)
            values = weight[row, columns].numpy()
            low, high = min(values.min(), 0.0), max(values.max(), 0.0)
            if symmetric:
                high = max(-low, high)
                low = -high
            tried = []
            for k in range(21):
                ratio = 1 - 0.025 * k
                s, z = obs.affine(low * ratio, high * ratio, bits, symmetric)
                error = x.numpy()[:, columns] @ (values - (obs.snap(values, s, z, bits) - z) * s)
                tried.append((float((share.numpy() * error**2).sum()), s, z))
            best = min(tried, key=lambda item: item[0])
            assert (float(scale[row, group]), float(zero[row, group])) == best[1:]
            shrunk += best[1] != tried[0][1]
    assert shrunk > 0


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([1, 3, 12]),
)
def test_no_group_is_worse_than_unclipped(seed, bits, symmetric, group_size):
    weight, hessian, x, share = clip_problem(seed)
    grid = Grid(bits, group_size, symmetric)
    clipped = group_losses(weight, *search_clip(weight, hessian, grid), grid, x, share)
    full = group_losses(weight, *fit_scale(weight, grid), grid, x, share)
    assert bool((clipped <= full * (1 + 1e-9) + 1e-12).all())


def test_one_group_is_solved_as_if_alone_and_the_unit_of_the_hessian_does_not_matter():
    weight, hessian, _, _ = clip_problem(8)
    scale, zero = search_clip(weight, hessian, Grid(3, 4, False))
    for group in range(3):
        columns = slice(4 * group, 4 * group + 4)
        alone = search_clip(weight[:, columns], hessian[columns, columns] * 2.0**20, Grid(3, None, False))
        assert torch.equal(alone[0][:, 0], scale[:, group])
        assert torch.equal(alone[1][:, 0], zero[:, group])


def test_a_token_twice_clips_as_a_token_of_weight_two():
    weight, _, x, _ = clip_problem(9)
    share = torch.ones(len(x))
    share[:6] = 2
    results = []
    for tokens, weights in ((x, share), (torch.cat((x, x[:6])), torch.ones(len(x) + 6))):
        accumulator = HessianAccumulator(CHANNELS, dtype=torch.float64)
        accumulator.add(tokens, weights)
        results.append(search_clip(weight, accumulator.hessian(), Grid(2, 4, False)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_steps_and_the_smallest_ratio_are_followed():
    """One outlier among weights that carry all the loss: the more the range may shrink, the finer they are rounded."""
    weight = torch.tensor([[1.0, 0.11, -0.13, 0.07]], dtype=torch.float64)
    hessian = torch.diag(torch.tensor([0.0, 1, 1, 1], dtype=torch.float64))
    grid = Grid(3, None, True)
    full = float(fit_scale(weight, grid)[0])
    for smallest in (0.8, 0.4, 0.2):
        assert float(search_clip(weight, hessian, grid, steps=1, smallest=smallest)[0]) == pytest.approx(
            full * smallest, rel=1e-3
        )


def test_inputs_are_left_alone():
    weight, hessian, x, share = clip_problem(10)
    before = [t.clone() for t in (weight, hessian, x, share)]
    search_clip(weight, hessian, GRIDS[0])
    search_scales(mean_abs(x, share), linear_objective([weight], x, share, GRIDS[0], ActivationScheme(4)))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, x, share), strict=True))


# -- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_points": 0}, "grid_points: 0"),
        ({"mean_abs": torch.tensor([1.0, -1.0])}, "mean_abs: shape"),
        ({"mean_abs": torch.tensor([1.0, torch.nan])}, "mean_abs"),
        ({"mean_abs": torch.ones(2, 2)}, "mean_abs"),
        ({"weight_mean": torch.ones(3)}, r"weight_mean: shape \(3,\)"),
        ({"weight_mean": torch.tensor([1.0, torch.inf])}, "weight_mean"),
        ({"evaluate": lambda scales: float("nan")}, "evaluate: scales of 1 have the loss nan"),
        ({"evaluate": lambda scales: float("inf")}, "loss inf"),
    ],
)
def test_wrong_arguments_of_the_scale_search(options, message):
    with pytest.raises(ValueError, match=message):
        search_scales(**({"mean_abs": torch.ones(2), "evaluate": lambda scales: 1.0} | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_weights": torch.ones(3)}, r"token_weights: shape \(3,\), tokens \(40, 12\)"),
        ({"token_weights": torch.full((40,), -1.0)}, "finite and not negative"),
        ({"token_weights": torch.full((40,), torch.inf)}, "finite and not negative"),
        ({"token_weights": torch.zeros(40)}, "one at least is positive"),
        ({"weights": [torch.ones(2, 5)]}, r"weights: shapes \[\(2, 5\)\]; valid: \[out, 12\]"),
        ({"x": torch.ones(2, 20, 12)}, r"tokens \(2, 20, 12\)"),
    ],
)
def test_wrong_arguments_of_the_linear_objective(change, message):
    weights, x, share = problem(11)
    with pytest.raises(ValueError, match=message):
        linear_objective(**({"weights": weights, "x": x, "token_weights": share, "grid": GRIDS[0]} | change))


def test_wrong_arguments_of_the_sub_block_objective():
    block, calls, shares = block_problem()
    with pytest.raises(ValueError, match=r"attn_norm: a RMSNorm; valid: nn\.Linear"):
        sub_block_objective(block, ["attn_norm"], lambda: (call.run(block) for call in calls), shares, GRIDS[0])
    with pytest.raises(ValueError, match="token_weights"):
        sub_block_objective(block, ["q_proj"], lambda: (), [torch.zeros(2, 3)], GRIDS[0])
    with pytest.raises(ValueError, match="zip"):
        sub_block_objective(block, ["q_proj"], lambda: (call.run(block) for call in calls[:1]), shares, GRIDS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.ones(11, 11)}, r"hessian: shape \(11, 11\); valid: finite numbers, \(12, 12\)"),
        ({"hessian": torch.full((12, 12), torch.nan)}, "hessian"),
        ({"weight": torch.full((2, 12), torch.inf)}, "weight: expected a matrix of finite"),
        ({"steps": 0}, "steps: 0"),
        ({"smallest": 1.0}, "smallest: 1.0"),
        ({"smallest": 0.0}, "smallest: 0.0"),
        ({"grid": Grid(4, 5, False)}, "group_size: 5 does not divide"),
    ],
)
def test_wrong_arguments_of_the_clip_search(change, message):
    weight, hessian, _, _ = clip_problem(12)
    with pytest.raises(ValueError, match=message):
        search_clip(**({"weight": weight, "hessian": hessian, "grid": GRIDS[0]} | change))
