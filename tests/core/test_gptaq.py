"""GPTAQ against least squares on the tokens themselves, and what it and Qronos promise alike."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dllmquant.core.gptaq import gptaq
from dllmquant.core.gptq import GPTQResult, gptq
from dllmquant.core.grid import Grid
from dllmquant.core.qronos import qronos
from dllmquant.core.stats import HessianAccumulator
from tests.oracles import asymmetric
from tests.oracles.asymmetric import Paths

COLUMNS = 24
Solver = Callable[..., GPTQResult]
both = pytest.mark.parametrize("solver", [gptaq, qronos])


def statistics(paths: Paths) -> tuple[Tensor, Tensor]:
    """The Hessian and the cross statistic of two paths."""
    full, quantized, weights = (torch.from_numpy(part) for part in (paths.full, paths.quantized, paths.weights))
    accumulator = HessianAccumulator(quantized.shape[1], dtype=torch.float64, cross=True)
    accumulator.add(quantized, weights, full)
    result = accumulator.statistics()
    assert result.cross is not None
    return result.hessian, result.cross


def problem(seed: int, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    weight, paths = asymmetric.problem(seed, rows)
    return torch.from_numpy(weight), *statistics(paths)


def same(result: GPTQResult, other: GPTQResult) -> None:
    torch.testing.assert_close(result.weight.codes, other.weight.codes, rtol=0, atol=0)
    torch.testing.assert_close(result.weight.scale, other.weight.scale, rtol=0, atol=0)
    torch.testing.assert_close(result.weight.zero, other.weight.zero, rtol=0, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "block_size", "clip"),
    [
        (2, 6, 128, "none"),
        (3, 8, 8, "mse"),
        (4, 4, 7, "none"),
        (4, None, 7, "none"),
        (4, 12, 5, "mse"),
        (3, 8, 6, "none"),
        (8, 3, 4, "none"),
    ],
    ids=lambda value: str(value),
)
def test_equals_least_squares_on_the_tokens(
    bits: int, group_size: int | None, block_size: int, clip: Any, symmetric: bool, act_order: bool
) -> None:
    weight, paths = asymmetric.problem(bits * 10 + block_size)
    options: dict[str, Any] = {"act_order": act_order, "clip": clip, "damping": 0.02}
    expected = asymmetric.solve("gptaq", weight, paths, bits, group_size, symmetric, **options)
    grid = Grid(bits, group_size, symmetric)
    result = gptaq(torch.from_numpy(weight), *statistics(paths), grid, block_size=block_size, **options)
    np.testing.assert_array_equal(result.weight.codes.numpy(), expected.codes)
    np.testing.assert_array_equal(result.weight.scale.double().numpy(), expected.scale)
    np.testing.assert_array_equal(result.weight.zero.double().numpy(), expected.zero)
    assert result.loss == pytest.approx(expected.loss, rel=1e-9)
    assert (result.damping, result.attempts, result.dead) == (0.02, 1, 0)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("group_size", "block_size"), [(4, 128), (8, 6), (12, 5), (None, 7)])
def test_is_gptq_where_the_paths_agree(
    solver: Solver, group_size: int | None, block_size: int, act_order: bool, dtype: torch.dtype
) -> None:
    weight, hessian, _ = (tensor.to(dtype) for tensor in problem(0))
    options: dict[str, Any] = {"act_order": act_order, "block_size": block_size, "clip": "mse"}
    result = solver(weight, hessian, torch.zeros_like(hessian), Grid(3, group_size, False), **options)
    plain = gptq(weight, hessian, Grid(3, group_size, False), **options)
    same(result, plain)
    assert result.loss == plain.loss


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_each_knows_of_the_full_precision_path_pays(bits: int, act_order: bool) -> None:
    weight, paths = asymmetric.problem(1, rows=32)
    w, (hessian, cross), grid = torch.from_numpy(weight), statistics(paths), Grid(bits, 8, False)
    results = (
        gptq(w, hessian, grid, act_order=act_order),
        gptaq(w, hessian, cross, grid, act_order=act_order),
        qronos(w, hessian, cross, grid, act_order=act_order),
    )
    losses = [asymmetric.loss(weight, result.weight.dequantize(torch.float64).numpy(), paths) for result in results]
    assert [result.loss for result in results[1:]] == pytest.approx(losses[1:])
    unrounded = asymmetric.loss(weight, 0 * weight, paths)  # an output of zero, for scale
    assert losses[0] > losses[1] + 0.02 * abs(unrounded)
    assert losses[1] > losses[2] + 0.02 * abs(unrounded)


@both
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [4, 24, None])
def test_block_size_does_not_matter(solver: Solver, group_size: int | None, act_order: bool) -> None:
    arguments, grid = problem(2), Grid(3, group_size, False)
    reference = solver(*arguments, grid, act_order=act_order, block_size=COLUMNS)
    for block_size in (1, 2, 5, 8, 23, 1000):
        same(solver(*arguments, grid, act_order=act_order, block_size=block_size), reference)


@both
@pytest.mark.parametrize("act_order", [False, True])
def test_rows_are_independent(solver: Solver, act_order: bool) -> None:
    weight, hessian, cross = problem(3)
    result = solver(weight, hessian, cross, Grid(4, 8, True), act_order=act_order)
    for row in range(len(weight)):
        alone = solver(weight[row : row + 1], hessian, cross, Grid(4, 8, True), act_order=act_order)
        torch.testing.assert_close(alone.weight.codes[0], result.weight.codes[row], rtol=0, atol=0)
        torch.testing.assert_close(alone.weight.scale[0], result.weight.scale[row], rtol=0, atol=0)


@both
def test_channels_may_be_relabelled(solver: Solver) -> None:
    """If the order is by diagonal and the scale is shared by the row."""
    weight, hessian, cross = problem(4)
    shuffle = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    plain = solver(weight, hessian, cross, Grid(3, None, True), act_order=True)
    moved = (weight[:, shuffle], hessian[shuffle][:, shuffle], cross[shuffle][:, shuffle])
    shuffled = solver(*moved, Grid(3, None, True), act_order=True)
    torch.testing.assert_close(shuffled.weight.codes, plain.weight.codes[:, shuffle], rtol=0, atol=0)


@both
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_statistics_does_not_matter(solver: Solver, factor: float) -> None:
    weight, hessian, cross = problem(5)
    for matrix in (hessian, cross):
        matrix[:, 5] = matrix[5, :] = 0
    grid = Grid(3, 8, False)
    same(solver(weight, factor * hessian, factor * cross, grid), solver(weight, hessian, cross, grid))


@both
def test_float32_comes_close_to_float64(solver: Solver) -> None:
    arguments = problem(6, rows=32)
    wide = solver(*arguments, Grid(4, 8, False))
    narrow = solver(*(tensor.float() for tensor in arguments), Grid(4, 8, False))
    assert (wide.weight.codes == narrow.weight.codes).double().mean() > 0.99
    assert narrow.loss == pytest.approx(wide.loss, rel=0.02)


@both
def test_inputs_are_left_alone(solver: Solver) -> None:
    arguments = problem(7)
    before = tuple(tensor.clone() for tensor in arguments)
    solver(*arguments, Grid(4, 8, False), act_order=True)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


@both
@pytest.mark.parametrize("act_order", [False, True])
def test_channels_dead_in_both_paths_are_as_good_as_absent(solver: Solver, act_order: bool) -> None:
    weight, hessian, cross = problem(8)
    dead = torch.zeros(COLUMNS, dtype=torch.bool)
    dead[[0, 7, 20]] = True
    for matrix in (hessian, cross):
        matrix[dead] = 0
        matrix[:, dead] = 0
    result = solver(weight, hessian, cross, Grid(4, None, False), act_order=act_order)
    assert (result.dead, result.attempts) == (3, 1)
    assert bool((result.weight.dequantize()[:, dead] == 0).all())
    live = (weight[:, ~dead], hessian[~dead][:, ~dead], cross[~dead][:, ~dead])
    without = solver(*live, Grid(4, None, False), act_order=act_order)
    torch.testing.assert_close(result.weight.codes[:, ~dead], without.weight.codes, rtol=0, atol=0)
    assert result.loss == pytest.approx(without.loss)
    impossible = cross.clone()
    impossible[:, dead] = 1.0  # E (x − x̃) x̃ᵀ where x̃ = 0
    same(solver(weight, hessian, impossible, Grid(4, None, False), act_order=act_order), result)


def test_gptaq_leaves_what_a_dead_channel_gave() -> None:
    weight, hessian, cross = problem(9)
    hessian[3] = hessian[:, 3] = cross[:, 3] = 0
    result = gptaq(weight, hessian, cross, Grid(4, 8, False))
    cross[3] = 0
    same(result, gptaq(weight, hessian, cross, Grid(4, 8, False)))


@both
def test_all_channels_dead(solver: Solver) -> None:
    nothing = torch.zeros(COLUMNS, COLUMNS)
    result = solver(problem(10)[0], nothing, nothing, Grid(4, 8, False))
    assert (result.dead, result.loss) == (COLUMNS, 0)
    assert bool((result.weight.dequantize() == 0).all())


@both
def test_damping_escalates_and_is_reported(solver: Solver) -> None:
    weight, hessian, cross = problem(11)
    smallest, mean = float(torch.linalg.eigvalsh(hessian)[0]), float(hessian.diagonal().mean())
    hessian = hessian - (smallest + 0.05 * mean) * torch.eye(COLUMNS)  # least eigenvalue −0.05·mean
    result = solver(weight, hessian, cross, Grid(4, 8, False), damping=0.01)
    assert result.damping == pytest.approx(0.1)
    assert result.attempts == 2
    straight = solver(weight, hessian, cross, Grid(4, 8, False), damping=0.1)
    assert straight.attempts == 1
    same(result, straight)
    hopeless = hessian - 10 * mean * torch.ones_like(hessian)
    with pytest.raises(ValueError, match="not positive definite even with damping 1"):
        solver(weight, hopeless, cross, Grid(4, 8, False))


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_finite_is_an_error(solver: Solver, which: int, bad: float) -> None:
    arguments = problem(12)
    arguments[which][2, 3] = bad
    with pytest.raises(ValueError, match="weight, hessian and cross must be finite"):
        solver(*arguments, Grid(4, 8, False))


@both
def test_wrong_arguments(solver: Solver) -> None:
    weight, hessian, cross = problem(13)
    with pytest.raises(ValueError, match=r"hessian: shape \(23, 23\), expected \(24, 24\)"):
        solver(weight, hessian[1:, 1:], cross, Grid(4, 8, False))
    with pytest.raises(ValueError, match=r"cross: shape \(24, 23\), expected \(24, 24\)"):
        solver(weight, hessian, cross[:, 1:], Grid(4, 8, False))
    with pytest.raises(ValueError, match="group_size: 7 does not divide"):
        solver(weight, hessian, cross, Grid(4, 7, False))
    with pytest.raises(ValueError, match="block_size: 0"):
        solver(weight, hessian, cross, Grid(4, 8, False), block_size=0)
    for damping in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="damping: "):
            solver(weight, hessian, cross, Grid(4, 8, False), damping=damping)
