"""The choice of widths against enumeration, and the costs of groups against least squares and against the solver."""

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmquant.core.allocate import allocate, allocate_group_bits, group_costs
from dllmquant.core.gptq import gptq
from dllmquant.core.grid import Grid
from tests.oracles import obs


def enumerate_all(costs: Tensor, sizes: list[int], choices: list[int], budget: float) -> tuple[float, float]:
    """The least cost within the budget, and the least mean bits there is."""
    best, least = math.inf, math.inf
    for picked in itertools.product(range(len(choices)), repeat=len(sizes)):
        mean = sum(size * choices[c] for size, c in zip(sizes, picked, strict=True)) / sum(sizes)
        least = min(least, mean)
        if mean <= budget * (1 + 1e-12):
            best = min(best, sum(float(costs[unit, c]) for unit, c in enumerate(picked)))
    return best, least


def total(costs: Tensor, choices: list[int], bits: list[int]) -> float:
    return sum(float(costs[unit, choices.index(width)]) for unit, width in enumerate(bits))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_equals_enumeration(data: Any) -> None:
    choices = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1, max_size=3, unique=True))
    sizes = data.draw(st.lists(st.integers(1, 9) | st.sampled_from([12_288, 50_331_648]), min_size=1, max_size=5))
    number = st.integers(0, 3) | st.floats(0, 10)
    rows = data.draw(st.lists(st.tuples(*[number] * len(choices)), min_size=len(sizes), max_size=len(sizes)))
    costs = torch.tensor(rows, dtype=torch.float64) * 10.0 ** data.draw(st.integers(-12, 12))
    budget = data.draw(st.sampled_from([1, 2, 3, 2.5, 4]) | st.floats(1, 9))
    expected, least = enumerate_all(costs, sizes, choices, budget)
    if math.isinf(expected):
        with pytest.raises(ValueError, match=rf"^budget: .* allow is {least:g}$"):
            allocate(costs, sizes, choices, budget)
        return
    bits = allocate(costs, sizes, choices, budget)
    assert sum(size * width for size, width in zip(sizes, bits, strict=True)) / sum(sizes) <= budget * (1 + 1e-12)
    spread = float((costs.amax(1) - costs.amin(1)).max())
    assert abs(total(costs, choices, bits) - expected) <= 1e-9 * (spread + abs(expected))
    assert allocate(costs, sizes, choices, budget) == bits


def test_by_hand() -> None:
    """One unit may have 3 bits if another has 1; the pair that gains the most is the first up and the last down."""
    costs = torch.tensor([[9.0, 5.0, 1.0], [5.0, 3.0, 2.0], [2.0, 1.0, 0.9]])
    assert allocate(costs, [1, 1, 1], [1, 2, 3], 2) == [3, 2, 1]
    assert allocate(costs, [1, 1, 1], [1, 2, 3], 1) == [1, 1, 1]
    assert allocate(costs, [1, 1, 1], [1, 2, 3], 3.5) == [3, 3, 3]
    assert allocate(costs[:, [2, 0, 1]], [1, 1, 1], [3, 1, 2], 2) == [3, 2, 1]
    assert allocate(costs, [3, 1, 1], [1, 2, 3], 2) == [2, 2, 2]  # 3 bits for the first would take all spare bits
    assert allocate(costs.numpy(), [1, 1, 1], [1, 2, 3], 2) == [3, 2, 1]  # type: ignore[arg-type]
    assert allocate(torch.ones(2, 2), [1, 1], [2, 4], 2) == [2, 2]


def test_decimal_budgets_are_reached() -> None:
    """2.32 times 25 is 57.99..., and yet 25 units may have 58 bits. Not 59, and not if the budget is really less."""
    costs = -torch.arange(25.0)[:, None] * torch.tensor([2.0, 3.0])
    assert 2.32 * 25 < 58
    for budget, expected in ((2.32, 58), (2.28, 57), (2.3199, 57), (2.359, 58), (2.36, 59)):
        assert sum(allocate(costs, [1] * 25, [2, 3], budget)) == expected
    assert sum(allocate(costs[:11], [1] * 11, [2, 3], 30 / 11)) == 30


@pytest.mark.parametrize("sizes", ["equal", "kinds"])
def test_thousands_of_units_take_seconds(sizes: str) -> None:
    generator = np.random.default_rng(0)
    importance = np.exp(1.5 * generator.normal(size=(2000, 1)))
    costs = torch.from_numpy(importance * [0.36, 0.12, 0.035] * np.exp(0.1 * generator.normal(size=(2000, 3))))
    counts = [1] * 2000 if sizes == "equal" else generator.choice([4096**2, 4096 * 12288], 2000).tolist()
    start = time.process_time()
    bits = allocate(costs, counts, [1, 2, 3], 2.0)
    assert time.process_time() - start < 10
    used = sum(count * width for count, width in zip(counts, bits, strict=True))
    assert used <= 2 * sum(counts)
    # Lagrange: cost + λ·bits, minimised unit by unit, is a lower bound for every λ >= 0
    extra = torch.tensor(counts)[:, None] * (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) - 2)
    slopes = torch.logspace(-4, 2, 400, dtype=torch.float64) / max(counts)
    bound = max(float((costs + slope * extra).amin(1).sum()) for slope in slopes)
    assert bound <= total(costs, [1, 2, 3], bits) <= 1.001 * bound


def test_what_allocate_refuses() -> None:
    costs = torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"^budget: 1\.5 mean bits; the least that choices \(4, 2\) allow is 2$"):
        allocate(costs, [1, 1, 1], [4, 2], 1.5)
    for bad in (costs[:2], costs[0], costs * math.nan, costs / 0):
        with pytest.raises(ValueError, match=r"costs: shape .*; valid: finite \[3 units, 2 choices\], not empty"):
            allocate(bad, [1, 1, 1], [2, 4], 3)
    with pytest.raises(ValueError, match="not empty"):
        allocate(torch.empty(0, 2), [], [2, 4], 3)
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"sizes: {size}; valid: positive integers"):
            allocate(costs, [1, size, 1], [2, 4], 3)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="choices: 0; valid: positive integers"):
        allocate(costs, [1, 1, 1], [0, 4], 3)
    with pytest.raises(ValueError, match=r"choices: \(4, 4\) has a width twice"):
        allocate(costs, [1, 1, 1], [4, 4], 4)
    for budget in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"budget: (nan|inf); valid: a finite number of bits"):
            allocate(costs, [1, 1, 1], [2, 4], budget)


def problem(seed: int, rows: int = 16, columns: int = 64, uneven: float = 0.5) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated tokens whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(200, 12) @ normal(12, columns) + 1.4 * normal(200, columns)
    x = x * (uneven * normal(columns)).exp()
    return normal(rows, columns), x.T @ x / len(x)


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_costs_are_what_the_best_later_columns_leave(symmetric: bool, act_order: bool, clip: Any) -> None:
    """Column by column: the least (δ, Δ) H (δ, Δ)ᵀ over the changes Δ of all columns solved later, by least squares."""
    weight, hessian = problem(0, rows=4, columns=12)
    w, diagonal = weight.numpy(), np.diag(hessian.numpy())
    root = np.linalg.cholesky(hessian.numpy() + 0.02 * diagonal.mean() * np.eye(12)).T  # ‖root v‖² = vᵀ H v
    order = sorted(range(12), key=lambda q: -diagonal[q]) if act_order else list(range(12))
    expected = np.zeros((3, 3))
    for place, q in enumerate(order):
        later = order[place + 1 :]
        left = root[:, q] - root[:, later] @ np.linalg.lstsq(root[:, later], root[:, q], rcond=None)[0]
        part = slice(q // 4 * 4, q // 4 * 4 + 4)
        for choice, bits in enumerate((1, 2, 4)):
            for row in range(4):
                scale, zero = obs.fit(w[row, part], bits, symmetric, clip, diagonal[part])
                delta = (float(obs.snap(w[row, q], scale, zero, bits)) - zero) * scale - w[row, q]
                expected[q // 4, choice] += delta**2 * (left**2).sum()
    options: dict[str, Any] = {"act_order": act_order, "clip": clip, "damping": 0.02}
    costs = group_costs(weight, hessian, Grid(8, 4, symmetric, (3, 3, 3)), (1, 2, 4), **options)
    np.testing.assert_allclose(costs.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_costs_are_the_loss_where_nothing_is_compensated(bits: int) -> None:
    """Uncorrelated inputs: GPTQ is round to nearest, and the costs are its loss. Dead channels cost nothing."""
    weight, hessian = problem(1)
    hessian = torch.diag(hessian.diagonal())
    hessian[5, 5] = 0
    costs = group_costs(weight, hessian, Grid(2, 8, True), (bits,), damping=1e-12, clip="mse")
    dead = weight.clone()
    dead[:, 5] = 0
    loss = gptq(dead, hessian, Grid(bits, 8, True), damping=1e-12, clip="mse").loss
    assert float(costs.sum()) == pytest.approx(loss, rel=1e-9)


def test_group_bits_are_the_cheapest_of_all() -> None:
    weight, hessian = problem(2, rows=8, columns=32)
    grid = Grid(2, 8, False)
    costs = group_costs(weight, hessian, grid)
    fits = [bits for bits in itertools.product((1, 2, 3), repeat=4) if sum(bits) <= 8]
    best = min(fits, key=lambda bits: sum(float(costs[group, b - 1]) for group, b in enumerate(bits)))
    assert allocate_group_bits(weight, hessian, grid) == best != (2,) * 4
    # The solver itself, run on every one of them: the choice is among the best.
    losses = {bits: gptq(weight, hessian, Grid(2, 8, False, bits)).loss for bits in fits}
    assert losses[best] <= 1.1 * min(losses.values())
    assert sum(loss < losses[best] for loss in losses.values()) < len(losses) / 20


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mixed_loses_less_than_uniform_at_two_bits(symmetric: bool, clip: Any) -> None:
    ratios = []
    for seed in range(3):
        weight, hessian = problem(seed, rows=8, columns=128)
        grid = Grid(2, 8, symmetric)
        bits = allocate_group_bits(weight, hessian, grid, clip=clip)
        mixed = Grid(2, 8, symmetric, bits)
        assert mixed.mean_bits(128) <= 2
        ratios.append(gptq(weight, hessian, mixed, clip=clip).loss / gptq(weight, hessian, grid, clip=clip).loss)
    assert max(ratios) < 0.95, ratios
    assert sum(ratios) / 3 < (0.65 if symmetric else 0.8), ratios


def test_a_group_that_matters_gets_the_bits() -> None:
    weight, _ = problem(3)
    hessian = torch.diag(torch.ones(64, dtype=torch.float64))
    hessian[24:32] *= 100
    bits = allocate_group_bits(weight, hessian, Grid(2, 8, True), (1, 2, 3, 8), mean=2)
    assert bits[3] == max(bits) > 2
    assert sum(bits) <= 16


def test_what_group_bits_refuse() -> None:
    weight, hessian = problem(4)
    with pytest.raises(ValueError, match="group_size: None; valid: a positive integer"):
        allocate_group_bits(weight, hessian, Grid(2, None, True))
    with pytest.raises(ValueError, match="group_size: 7 does not divide"):
        allocate_group_bits(weight, hessian, Grid(2, 7, True))
    with pytest.raises(ValueError, match="bits: 5 is not supported"):
        allocate_group_bits(weight, hessian, Grid(2, 8, True), (1, 5))
    with pytest.raises(ValueError, match=r"budget: 1\.5 mean bits; the least that choices \(2, 3\) allow is 2"):
        allocate_group_bits(weight, hessian, Grid(2, 8, True), (2, 3), 1.5)
    with pytest.raises(ValueError, match="hessian: shape"):
        group_costs(weight, hessian[1:], Grid(2, 8, True))
    with pytest.raises(ValueError, match="damping: 0"):
        group_costs(weight, hessian, Grid(2, 8, True), damping=0)
    with pytest.raises(ValueError, match="must be finite"):
        group_costs(weight * math.nan, hessian, Grid(2, 8, True))
