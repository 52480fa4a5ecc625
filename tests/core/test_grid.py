"""Scales and rounding against float64 numpy: what is stored is exact, and the clip search never does harm."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmquant.core.grid import Grid, QuantizedWeight, fit_scale, quantize_to_grid
from tests.oracles import obs

GRIDS = [
    pytest.param(Grid(bits, group_size, symmetric), id=f"{bits}-{group_size}-{'sym' if symmetric else 'asym'}")
    for bits, group_size in ((2, 4), (3, 12), (4, 6), (4, None), (8, 8))
    for symmetric in (False, True)
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_errors(weight: Tensor, grid: Grid, scale: Tensor, zero: Tensor, importance: Tensor) -> np.ndarray:
    """Σ importance·(w − q(w))² per row and group, spelled out."""
    width = grid.group_size or weight.shape[1]
    errors = np.zeros(scale.shape)
    for row in range(scale.shape[0]):
        for group in range(scale.shape[1]):
            part = slice(group * width, (group + 1) * width)
            s, z = float(scale[row, group]), float(zero[row, group])
            values = weight[row, part].double().numpy()
            restored = (obs.snap(values, s, z, grid.of_group(group).bits) - z) * s
            errors[row, group] = (importance[part].double().numpy() * (values - restored) ** 2).sum()
    return errors


@pytest.mark.parametrize("grid", GRIDS)
def test_full_range_by_hand(grid: Grid) -> None:
    weight = normal(3, 24)
    weight[0, :] = weight[0].abs() + 0.1  # one-sided groups: the range still holds 0
    weight[1, :] = -weight[1].abs() - 0.1
    scale, zero = fit_scale(weight, grid)
    width = grid.group_size or 24
    assert scale.shape == zero.shape == (3, 24 // width)
    assert (scale.dtype, zero.dtype) == (torch.float16, torch.uint8)
    for row in range(3):
        for group in range(24 // width):
            values = weight[row, group * width : (group + 1) * width].tolist()
            if grid.symmetric:
                expected = 2 * max(map(abs, values)) / (2**grid.bits - 1)
                middle = 2 ** (grid.bits - 1)
            else:
                expected = (max(*values, 0.0) - min(*values, 0.0)) / (2**grid.bits - 1)
                middle = round(-min(*values, 0.0) / float(scale[row, group]))
            assert float(scale[row, group]) == float(np.float16(expected))
            assert int(zero[row, group]) == min(middle, 2**grid.bits - 1)


def test_two_bits_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.6, 2.0]])
    scale, zero = fit_scale(weight, Grid(2, None, False))
    assert (scale.item(), zero.item()) == (1.0, 1)
    assert quantize_to_grid(weight, scale, zero, Grid(2, None, False)).tolist() == [[0, 1, 2, 3]]
    scale, zero = fit_scale(weight * 0.75, Grid(2, None, True))
    assert (scale.item(), zero.item()) == (1.0, 2)
    assert quantize_to_grid(weight * 0.75, scale, zero, Grid(2, None, True)).tolist() == [[1, 2, 2, 3]]


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_are_the_nearest(grid: Grid) -> None:
    weight = normal(4, 24, seed=1)
    scale, zero = fit_scale(weight, grid)
    width = grid.group_size or 24
    s, z = (part.repeat_interleave(width, 1).double() for part in (scale, zero))
    levels = torch.arange(grid.levels, dtype=torch.float64)
    distance = ((levels - z[..., None]) * s[..., None] - weight[..., None]).abs()
    codes = quantize_to_grid(weight, scale, zero, grid)
    assert codes.dtype == torch.uint8
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("importance", [None, "given"])
@pytest.mark.parametrize("grid", GRIDS)
def test_mse_is_the_best_of_the_ratios_and_never_worse_than_none(grid: Grid, importance: Any) -> None:
    weight = normal(6, 24, seed=2) ** 3  # heavy tails
    counted = normal(24, seed=3).square() if importance else torch.ones(24, dtype=torch.float64)
    scale, zero = fit_scale(weight, grid, clip="mse", importance=counted if importance else None)
    errors = group_errors(weight, grid, scale, zero, counted)
    full = group_errors(weight, grid, *fit_scale(weight, grid), counted)
    assert (errors <= full * (1 + 1e-12)).all()
    width = grid.group_size or 24
    best = np.full(errors.shape, np.inf)
    for ratio in obs.RATIOS:
        tried = np.zeros((*errors.shape, 2))
        for row in range(errors.shape[0]):
            for group in range(errors.shape[1]):
                values = weight[row, group * width : (group + 1) * width].numpy()
                low, high = min(values.min(), 0.0), max(values.max(), 0.0)
                if grid.symmetric:
                    low, high = -max(-low, high), max(-low, high)
                tried[row, group] = obs.affine(low * ratio, high * ratio, grid.bits, grid.symmetric)
        shrunk = torch.from_numpy(tried)
        best = np.minimum(best, group_errors(weight, grid, shrunk[..., 0], shrunk[..., 1], counted))
    np.testing.assert_allclose(errors, best, rtol=1e-9)
    if grid.bits < 8:
        assert errors.sum() < 0.97 * full.sum()


def test_one_bit_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, -2.5]])
    for symmetric in (False, True):
        grid = Grid(1, None, symmetric)
        scale, zero = fit_scale(weight, grid)
        codes = quantize_to_grid(weight, scale, zero, grid)
        assert (scale.item(), zero.item(), codes.tolist()) == (1.0, 1, [[0, 2, 2, 0]])
        assert QuantizedWeight(grid, codes, scale, zero).dequantize().tolist() == [[-1.0, 1.0, 1.0, -1.0]]
        counted = fit_scale(weight, grid, clip="mse", importance=torch.tensor([1.0, 0.0, 2.0, 1.0]))
        assert counted[0].item() == (1 + 2 * 0.5 + 2.5) / 4
        assert fit_scale(weight, grid, clip="mse", importance=torch.zeros(4))[0].item() == 1.0


@pytest.mark.parametrize("clip", ["none", "mse"])
def test_one_bit_is_the_best_float16(clip: Any) -> None:
    """No float16 within 40 of the fitted one, in either direction, is better."""
    weight, importance = normal(5, 24, seed=7), normal(24, seed=8).square()
    grid = Grid(1, 8, False)
    scale, zero = fit_scale(weight, grid, clip=clip, importance=importance)
    counted = importance if clip == "mse" else torch.ones_like(importance)
    fitted = group_errors(weight, grid, scale, zero, counted)
    for step in (*range(-40, 0), *range(1, 41)):
        near = (scale.view(torch.int16) + step).view(torch.float16)
        assert (group_errors(weight, grid, near, zero, counted) >= fitted * (1 - 1e-12)).all()


@settings(max_examples=25, deadline=None)
@given(
    group_bits=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=6),
    size=st.integers(1, 7),
    symmetric=st.booleans(),
    clip=st.sampled_from(["none", "mse"]),
    seed=st.integers(0, 1000),
)
def test_mixed_groups_are_each_on_their_own_grid(
    group_bits: list[int], size: int, symmetric: bool, clip: Any, seed: int
) -> None:
    grid = Grid(4, size, symmetric, tuple(group_bits))
    columns = size * len(group_bits)
    weight, importance = normal(3, columns, seed=seed), normal(columns, seed=seed + 1).square()
    scale, zero = fit_scale(weight, grid, clip=clip, importance=importance)
    assert (scale.dtype, zero.dtype, scale.shape) == (torch.float16, torch.uint8, (3, len(group_bits)))
    quantized = QuantizedWeight(grid, quantize_to_grid(weight, scale, zero, grid), scale, zero)
    for group in range(len(group_bits)):
        part, own = slice(group * size, (group + 1) * size), grid.of_group(group)
        alone = fit_scale(weight[:, part], own, clip=clip, importance=importance[part])
        assert torch.equal(scale[:, group : group + 1], alone[0])
        assert torch.equal(zero[:, group : group + 1], alone[1])
        codes = quantize_to_grid(weight[:, part], *alone, own)
        assert torch.equal(quantized.codes[:, part], codes)
        restored = QuantizedWeight(own, codes, *alone).dequantize()
        assert torch.equal(quantized.dequantize()[:, part], restored)
        if group_bits[group] == 1:
            assert set(codes.unique().tolist()) <= {0, 2}
            torch.testing.assert_close(restored.abs(), alone[0].float().expand(-1, size), rtol=0, atol=0)


def test_importance_is_honoured() -> None:
    weight = torch.tensor([[4.0, 0.4, -0.5, 0.3, 0.6, -0.4]])
    grid = Grid(2, None, False)
    for favoured, neglected in ((0, 4), (4, 0)):
        importance = torch.full((6,), 1e-4)
        importance[favoured] = 1.0
        scale, zero = fit_scale(weight, grid, clip="mse", importance=importance)
        other = torch.full((6,), 1e-4)
        other[neglected] = 1.0
        rival = fit_scale(weight, grid, clip="mse", importance=other)
        ours, theirs = (group_errors(weight, grid, *fit, importance)[0, 0] for fit in ((scale, zero), rival))
        assert ours < theirs


def test_groups_do_not_see_each_other() -> None:
    weight = normal(2, 12, seed=4)
    scale, zero = fit_scale(weight, Grid(4, 4, False), clip="mse")
    weight[:, 4:8] *= 100
    again, zero_again = fit_scale(weight, Grid(4, 4, False), clip="mse")
    assert torch.equal(again[:, [0, 2]], scale[:, [0, 2]])
    assert torch.equal(zero_again[:, [0, 2]], zero[:, [0, 2]])
    assert bool((again[:, 1] > 10 * scale[:, 1]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_fitted_in_float32(dtype: torch.dtype) -> None:
    weight, grid = normal(4, 24, seed=5).to(dtype), Grid(8, 8, False)
    for clip in ("none", "mse"):
        narrow, wide = fit_scale(weight, grid, clip=clip), fit_scale(weight.float(), grid, clip=clip)
        assert torch.equal(narrow[0], wide[0])
        assert torch.equal(narrow[1], wide[1])
        assert torch.equal(quantize_to_grid(weight, *narrow, grid), quantize_to_grid(weight.float(), *wide, grid))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    magnitude=st.floats(-6, 3),
    seed=st.integers(0, 1000),
    clip=st.sampled_from(["none", "mse"]),
)
def test_invariant_of_quantized_weights(bits: int, symmetric: bool, magnitude: float, seed: int, clip: Any) -> None:
    """Codes and zero points fit their width, scales are positive and lossless, zeros are exact, errors are bounded."""
    weight = normal(3, 12, seed=seed) * 10**magnitude
    weight[0, :6] = 0
    weight[1, 3] = 0
    grid = Grid(bits, 6, symmetric)
    scale, zero = fit_scale(weight, grid, clip=clip)
    quantized = QuantizedWeight(grid, quantize_to_grid(weight, scale, zero, grid), scale, zero)
    assert int(quantized.codes.max()) < grid.levels
    assert int(zero.max()) < grid.levels
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())
    if symmetric:
        assert bool((zero == 2 ** (bits - 1)).all())
    restored = quantized.dequantize(torch.float64)
    assert bool((restored[weight == 0] == 0).all())
    step = scale.double().repeat_interleave(6, 1)
    if clip == "none":  # half a step, up to one at the ends; float16 rounds scales by 2⁻¹¹, subnormals by 2⁻²⁵
        rounding = 2.0**bits * (step * 2**-11).clamp(min=2**-25)
        assert bool(((restored - weight).abs() <= 1.02 * step + rounding).all())


def test_dequantize_is_exact() -> None:
    grid = Grid(4, 4, False)
    weight = normal(3, 8, seed=6)
    scale, zero = fit_scale(weight, grid)
    codes = quantize_to_grid(weight, scale, zero, grid)
    quantized = QuantizedWeight(grid, codes, scale, zero)
    expected = (codes.double() - zero.double().repeat_interleave(4, 1)) * scale.double().repeat_interleave(4, 1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert quantized.dequantize(dtype).dtype == dtype
        assert torch.equal(quantized.dequantize(dtype), expected.to(dtype))


def test_grid_arithmetic_and_errors() -> None:
    assert Grid(3, 4, True).levels == 8
    assert (Grid(3, 4, True).width(12), Grid(3, 4, True).num_groups(12)) == (4, 3)
    assert (Grid(3, None, True).width(12), Grid(3, None, True).num_groups(12)) == (12, 1)
    for bits in (0, 5, 16, -4):
        with pytest.raises(ValueError, match=f"^bits: {bits} is not supported; valid: 1, 2, 3, 4, 8"):
            Grid(bits, 4, True)
        with pytest.raises(ValueError, match=f"group_bits: {bits} is not supported; valid: 1, 2, 3, 4, 8"):
            Grid(4, 4, True, (4, bits))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"group_size: {size}; valid: a positive"):
            Grid(4, size, True)
    with pytest.raises(ValueError, match="group_size: 5 does not divide the 12 input channels"):
        Grid(4, 5, True).num_groups(12)
    with pytest.raises(ValueError, match="group_bits: given without a group_size"):
        Grid(4, None, True, (4,))
    for method in ("width", "num_groups", "bits_of_groups", "mean_bits"):
        with pytest.raises(ValueError, match="group_bits: 2 widths; valid: 3, one per group"):
            getattr(Grid(4, 4, True, (1, 2)), method)(12)
    with pytest.raises(ValueError, match="group_bits: 2 widths; valid: 3, one per group"):
        fit_scale(normal(2, 12), Grid(4, 4, True, (1, 2)))


def test_mixed_grid_arithmetic() -> None:
    grid = Grid(8, 4, False, (1, 3, 4))
    assert [grid.of_group(group) for group in range(3)] == [Grid(bits, None, False) for bits in (1, 3, 4)]
    assert grid.bits_of_groups(12) == (1, 3, 4)
    assert grid.mean_bits(12) == pytest.approx(8 / 3)
    assert Grid(3, 4, True).bits_of_groups(12) == (3, 3, 3)
    assert (Grid(3, 4, True).mean_bits(12), Grid(3, None, True).mean_bits(12)) == (3, 3)
    from_json = Grid(**json.loads(json.dumps(dataclasses.asdict(grid))))
    assert from_json == grid
    assert hash(from_json) == hash(grid)


def test_wrong_weights_and_importance() -> None:
    grid, weight = Grid(4, 4, False), normal(2, 8)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = weight.clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match="weight: expected a matrix of finite numbers"):
            fit_scale(broken, grid)
    with pytest.raises(ValueError, match=r"got shape \(8,\)"):
        fit_scale(weight[0], grid)
    with pytest.raises(ValueError, match="group_size: 3 does not divide"):
        fit_scale(weight, Grid(4, 3, False))
    with pytest.raises(ValueError, match="clip: 'max' is unknown; valid: none, mse"):
        fit_scale(weight, grid, clip="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a scale exceeds float16"):
        fit_scale(weight * 1e7, grid)
    for importance in (torch.ones(4), torch.ones(16), torch.ones(1, 8), torch.full((8,), -1.0), torch.ones(8) / 0):
        with pytest.raises(ValueError, match="importance: shape"):
            fit_scale(weight, grid, clip="mse", importance=importance)
