"""The solver against textbook OBS in float64, its invariances, and what it says when it cannot solve."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dllmquant.core.gptq import GPTQResult, gptq
from dllmquant.core.grid import Grid
from dllmquant.core.rtn import rtn
from dllmquant.core.stats import HessianAccumulator
from tests.oracles import obs

COLUMNS = 24


def problem(seed: int, rows: int = 5, columns: int = COLUMNS, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of strongly correlated tokens with uneven weights, both float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, 6) @ normal(6, columns) + 0.4 * normal(tokens, columns)
    weights = (torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.7).square()
    accumulator = HessianAccumulator(columns, dtype=torch.float64)
    accumulator.add(x, weights)
    return normal(rows, columns), accumulator.hessian()


def same(result: GPTQResult, other: GPTQResult) -> None:
    torch.testing.assert_close(result.weight.codes, other.weight.codes, rtol=0, atol=0)
    torch.testing.assert_close(result.weight.scale, other.weight.scale, rtol=0, atol=0)
    torch.testing.assert_close(result.weight.zero, other.weight.zero, rtol=0, atol=0)


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "block_size"),
    [(2, 6, 128), (3, 8, 8), (4, 4, 128), (4, None, 7), (4, 12, 5), (4, 8, 6), (3, 24, 10), (8, 3, 4)],
    ids=lambda value: str(value),
)
def test_equals_textbook_obs(
    bits: int, group_size: int | None, block_size: int, symmetric: bool, act_order: bool, clip: Any
) -> None:
    weight, hessian = problem(bits * 10 + block_size)
    options: dict[str, Any] = {"act_order": act_order, "clip": clip, "damping": 0.02}
    expected = obs.solve(weight.numpy(), hessian.numpy(), bits, group_size, symmetric, **options)
    result = gptq(weight, hessian, Grid(bits, group_size, symmetric), block_size=block_size, **options)
    np.testing.assert_array_equal(result.weight.codes.numpy(), expected.codes)
    np.testing.assert_array_equal(result.weight.scale.double().numpy(), expected.scale)
    np.testing.assert_array_equal(result.weight.zero.double().numpy(), expected.zero)
    np.testing.assert_array_equal(result.weight.dequantize(torch.float64).numpy(), expected.restored)
    assert result.loss == pytest.approx(expected.loss, rel=1e-9)
    assert (result.damping, result.attempts, result.dead) == (0.02, 1, 0)


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("group_bits", "block_size"), [((1, 1, 1), 128), ((1, 2, 3), 10), ((3, 1, 8, 2), 128), ((2, 1, 4, 1, 1, 3), 7)]
)
def test_mixed_widths_equal_textbook_obs(
    group_bits: tuple[int, ...], block_size: int, symmetric: bool, act_order: bool, clip: Any
) -> None:
    weight, hessian = problem(sum(group_bits))
    size = COLUMNS // len(group_bits)
    options: dict[str, Any] = {"act_order": act_order, "clip": clip}
    expected = obs.solve(weight.numpy(), hessian.numpy(), group_bits, size, symmetric, **options)
    result = gptq(weight, hessian, Grid(4, size, symmetric, group_bits), block_size=block_size, **options)
    np.testing.assert_array_equal(result.weight.codes.numpy(), expected.codes)
    np.testing.assert_array_equal(result.weight.scale.double().numpy(), expected.scale)
    np.testing.assert_array_equal(result.weight.zero.double().numpy(), expected.zero)
    assert result.loss == pytest.approx(expected.loss, rel=1e-9)
    assert result.weight.grid.group_bits == group_bits


def test_the_oracle_inverts_what_remains() -> None:
    """The Schur downdate is the inverse of the remaining Hessian, so the oracle is OBS and not a relative of it."""
    hessian = problem(0)[1].numpy()
    inverse = np.linalg.inv(hessian)
    downdated = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    np.testing.assert_allclose(downdated, np.linalg.inv(hessian[1:, 1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [4, 24, None])
def test_block_size_does_not_matter(group_size: int | None, act_order: bool) -> None:
    weight, hessian = problem(1)
    grid = Grid(3, group_size, False)
    reference = gptq(weight, hessian, grid, act_order=act_order, block_size=COLUMNS)
    for block_size in (1, 2, 5, 8, 23, 1000):
        same(gptq(weight, hessian, grid, act_order=act_order, block_size=block_size), reference)


@pytest.mark.parametrize("act_order", [False, True])
def test_rows_are_independent(act_order: bool) -> None:
    weight, hessian = problem(2)
    grid = Grid(4, 8, True)
    result = gptq(weight, hessian, grid, act_order=act_order)
    for row in range(len(weight)):
        alone = gptq(weight[row : row + 1], hessian, grid, act_order=act_order)
        torch.testing.assert_close(alone.weight.codes[0], result.weight.codes[row], rtol=0, atol=0)
        torch.testing.assert_close(alone.weight.scale[0], result.weight.scale[row], rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, hessian = problem(3)
    hessian[:, 5] = hessian[5, :] = 0  # a dead channel must not set the damping
    grid = Grid(3, 8, False)
    same(gptq(weight, hessian * factor, grid), gptq(weight, hessian, grid))


def test_diagonal_hessian_is_round_to_nearest() -> None:
    weight, _ = problem(4)
    grid = Grid(4, 8, False)
    result = gptq(weight, torch.diag(torch.linspace(0.1, 3, COLUMNS, dtype=torch.float64)), grid)
    torch.testing.assert_close(result.weight.codes, rtn(weight, grid).codes, rtol=0, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_round_to_nearest_on_correlated_tokens(bits: int, act_order: bool) -> None:
    weight, hessian = problem(5, rows=32)
    grid = Grid(bits, 8, False)
    delta = rtn(weight, grid).dequantize(torch.float64) - weight
    nearest = obs.quadratic_loss(delta.numpy(), hessian.numpy())
    assert gptq(weight, hessian, grid, act_order=act_order).loss < 0.7 * nearest


def test_the_order_is_that_of_decreasing_diagonal_and_is_undone() -> None:
    """Relabelling the channels changes nothing when the order is by diagonal and the scale is shared by the row."""
    weight, hessian = problem(6)
    shuffle = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    grid = Grid(3, None, True)
    plain = gptq(weight, hessian, grid, act_order=True)
    shuffled = gptq(weight[:, shuffle], hessian[shuffle][:, shuffle], grid, act_order=True)
    torch.testing.assert_close(shuffled.weight.codes, plain.weight.codes[:, shuffle], rtol=0, atol=0)
    unordered = gptq(weight, hessian, grid)
    assert not torch.equal(unordered.weight.codes, plain.weight.codes)


def test_float32_comes_close_to_float64() -> None:
    weight, hessian = problem(7, rows=32)
    grid = Grid(4, 8, False)
    wide, narrow = gptq(weight, hessian, grid), gptq(weight.float(), hessian.float(), grid)
    assert (wide.weight.codes == narrow.weight.codes).double().mean() > 0.99
    assert narrow.loss == pytest.approx(wide.loss, rel=0.02)


def test_inputs_are_left_alone() -> None:
    weight, hessian = problem(8)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, Grid(4, 8, False), act_order=True)
    torch.testing.assert_close((weight, hessian), before, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_channels_are_zeroed_and_the_rest_is_solved_as_if_they_were_not_there(
    act_order: bool, symmetric: bool
) -> None:
    weight, hessian = problem(9)
    dead = torch.zeros(COLUMNS, dtype=torch.bool)
    dead[[0, 7, 20]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    grid = Grid(4, None, symmetric)
    result = gptq(weight, hessian, grid, act_order=act_order)
    assert result.dead == 3
    assert result.attempts == 1
    assert bool((result.weight.dequantize()[:, dead] == 0).all())
    without = gptq(weight[:, ~dead], hessian[~dead][:, ~dead], grid, act_order=act_order)
    torch.testing.assert_close(result.weight.codes[:, ~dead], without.weight.codes, rtol=0, atol=0)
    assert result.loss == pytest.approx(without.loss)


def test_all_channels_dead() -> None:
    result = gptq(problem(10)[0], torch.zeros(COLUMNS, COLUMNS), Grid(4, 8, False))
    assert result.dead == COLUMNS
    assert result.loss == 0
    assert bool((result.weight.dequantize() == 0).all())


def test_damping_escalates_and_is_reported() -> None:
    weight, hessian = problem(11)
    mean = float(hessian.diagonal().mean())
    smallest = float(torch.linalg.eigvalsh(hessian)[0])
    identity = torch.eye(COLUMNS, dtype=torch.float64)
    hessian = hessian - (smallest + 0.05 * mean) * identity  # least eigenvalue −0.05·mean
    result = gptq(weight, hessian, Grid(4, 8, False), damping=0.01)
    assert result.damping == pytest.approx(0.1)
    assert result.attempts == 2
    straight = gptq(weight, hessian, Grid(4, 8, False), damping=0.1)
    assert straight.attempts == 1
    same(result, straight)
    assert gptq(weight, hessian, Grid(4, 8, False), damping=0.003).attempts == 3  # 0.003, 0.03, 0.3


def test_rank_deficient_hessian_is_solved() -> None:
    weight = problem(12)[0]
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = gptq(weight, x.T @ x, Grid(4, 8, False))
    assert result.attempts == 1
    assert np.isfinite(result.loss)


def test_hopeless_hessian_is_an_error() -> None:
    weight, hessian = problem(13)
    hessian = hessian - 10 * hessian.diagonal().mean() * torch.ones_like(hessian)
    with pytest.raises(ValueError, match="not positive definite even with damping 1"):
        gptq(weight, hessian, Grid(4, 8, False))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["weight", "hessian"])
def test_not_finite_is_an_error(which: str, bad: float) -> None:
    weight, hessian = problem(14)
    (weight if which == "weight" else hessian)[2, 3] = bad
    with pytest.raises(ValueError, match="must be finite"):
        gptq(weight, hessian, Grid(4, 8, False))


def test_wrong_arguments() -> None:
    weight, hessian = problem(15)
    with pytest.raises(ValueError, match=r"hessian: shape \(23, 23\), expected \(24, 24\)"):
        gptq(weight, hessian[1:, 1:], Grid(4, 8, False))
    with pytest.raises(ValueError, match="group_size: 7 does not divide"):
        gptq(weight, hessian, Grid(4, 7, False))
    with pytest.raises(ValueError, match="group_bits: 4 widths; valid: 3, one per group"):
        gptq(weight, hessian, Grid(4, 8, False, (2, 2, 2, 2)))
    with pytest.raises(ValueError, match="block_size: 0"):
        gptq(weight, hessian, Grid(4, 8, False), block_size=0)
    for damping in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="damping: "):
            gptq(weight, hessian, Grid(4, 8, False), damping=damping)


def test_results_cannot_be_changed() -> None:
    result = gptq(*problem(16), Grid(4, 8, False))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.loss = 0.0  # type: ignore[misc]
