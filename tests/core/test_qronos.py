"""Qronos against its two steps taken literally on the tokens; what it shares with GPTAQ is tested there."""

from typing import Any

import numpy as np
import pytest
import torch

from dllmquant.core.gptq import gptq
from dllmquant.core.grid import Grid
from dllmquant.core.qronos import qronos
from tests.core.test_gptaq import COLUMNS, problem, statistics
from tests.oracles import asymmetric
from tests.oracles.asymmetric import Paths


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
def test_equals_its_two_steps_on_the_tokens(
    bits: int, group_size: int | None, block_size: int, clip: Any, symmetric: bool, act_order: bool
) -> None:
    weight, paths = asymmetric.problem(bits * 10 + block_size)
    options: dict[str, Any] = {"act_order": act_order, "clip": clip, "damping": 0.02}
    expected = asymmetric.solve("qronos", weight, paths, bits, group_size, symmetric, **options)
    grid = Grid(bits, group_size, symmetric)
    result = qronos(torch.from_numpy(weight), *statistics(paths), grid, block_size=block_size, **options)
    np.testing.assert_array_equal(result.weight.codes.numpy(), expected.codes)
    np.testing.assert_array_equal(result.weight.scale.double().numpy(), expected.scale)
    np.testing.assert_array_equal(result.weight.zero.double().numpy(), expected.zero)
    assert result.loss == pytest.approx(expected.loss, rel=1e-9)
    assert (result.damping, result.attempts, result.dead) == (0.02, 1, 0)


def test_a_linear_change_of_the_input_is_undone() -> None:
    """Where x̃ = M x, the weight W M⁻¹ restores every output; Qronos finds it up to the grid, GPTQ cannot know."""
    weight, paths = asymmetric.problem(0, rows=8)
    mix = 0.9 * np.eye(COLUMNS) + 0.05 * np.random.default_rng(0).normal(size=(COLUMNS, COLUMNS))
    paths = Paths(paths.full, paths.full @ mix.T, paths.weights)
    hessian, cross = statistics(paths)
    result = qronos(torch.from_numpy(weight), hessian, cross, Grid(8, 4, False), damping=1e-8)
    blind = gptq(torch.from_numpy(weight), hessian, Grid(8, 4, False), damping=1e-8)
    output = paths.full @ weight.T
    left, without = (
        np.square(output - paths.quantized @ found.weight.dequantize(torch.float64).numpy().T).mean()
        for found in (result, blind)
    )
    assert left < 1e-3 * np.square(output).mean()
    assert without > 0.02 * np.square(output).mean()


def test_the_others_make_up_for_what_a_dead_channel_gave() -> None:
    """Channel 3 is the sum of two others in the full-precision path and zero in the quantized one."""
    weight, paths = asymmetric.problem(1)
    full = paths.full.copy()
    full[:, 3] = full[:, 0] + full[:, 8]
    quantized = full.copy()
    quantized[:, 3] = 0
    hessian, cross = statistics(Paths(full, quantized, paths.weights))
    result = qronos(torch.from_numpy(weight), hessian, cross, Grid(8, 4, False), damping=1e-6)
    expected = weight.copy()
    expected[:, [0, 8]] += weight[:, [3]]
    expected[:, 3] = 0
    assert result.dead == 1
    output = full @ weight.T
    error = np.square(output - full @ expected.T).mean()
    assert error < 1e-20
    left = np.square(output - quantized @ result.weight.dequantize(torch.float64).numpy().T).mean()
    assert left < 1e-4 * np.square(output).mean()


@pytest.mark.parametrize("act_order", [False, True])
def test_the_first_column_is_the_first_that_is_not_dead(act_order: bool) -> None:
    weight, hessian, cross = problem(3)
    for matrix in (hessian, cross):
        matrix[:2] = matrix[:, :2] = 0
    result = qronos(weight, hessian, cross, Grid(4, None, False), act_order=act_order)
    live = qronos(weight[:, 2:], hessian[2:, 2:], cross[2:, 2:], Grid(4, None, False), act_order=act_order)
    torch.testing.assert_close(result.weight.codes[:, 2:], live.weight.codes, rtol=0, atol=0)
    assert result.dead == 2


def test_escalated_damping_is_used_throughout_and_reported() -> None:
    weight, hessian, cross = problem(4)
    shift = float(torch.linalg.eigvalsh(hessian)[0]) + 0.05 * float(hessian.diagonal().mean())
    hessian = hessian - shift * torch.eye(COLUMNS)
    result = qronos(weight, hessian, cross, Grid(4, 8, False), damping=0.01)
    straight = qronos(weight, hessian, cross, Grid(4, 8, False), damping=0.1)
    assert result.damping == straight.damping == pytest.approx(0.1)
    assert (result.attempts, straight.attempts) == (2, 1)
    torch.testing.assert_close(result.weight.codes, straight.weight.codes, rtol=0, atol=0)


def test_the_more_damping_the_closer_to_gptq() -> None:
    weight, hessian, cross = problem(2, rows=32)
    noise = 1e4 * hessian.diagonal().mean() * torch.eye(COLUMNS)  # in both paths, so the cross statistic stays
    result = qronos(weight, hessian + noise, cross, Grid(4, 8, False))
    plain = gptq(weight, hessian + noise, Grid(4, 8, False))
    assert (result.weight.codes == plain.weight.codes).double().mean() > 0.99
    assert not torch.equal(
        qronos(weight, hessian, cross, Grid(4, 8, False)).weight.codes,
        gptq(weight, hessian, Grid(4, 8, False)).weight.codes,
    )


def test_one_column_is_rounded_from_its_least_squares_answer() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    result = qronos(2 * one, 4 * one, one, Grid(8, None, False), damping=0.25)
    # W (H + λH + C) / (H + λH) = 2 · 6 / 5
    assert float(result.weight.dequantize(torch.float64)) == pytest.approx(2.4, rel=2e-3)
