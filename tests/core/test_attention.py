"""The grids of quantized attention against the nearest of all their points; the two forms of the output error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmquant.core.attention import (
    attention_gram,
    output_error,
    quantize_probabilities,
    quantize_values,
    value_grid,
)


def softmax(*shape: int, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharpness * scores).softmax(-1)


def points(grid: str, bits: int, upper: float) -> np.ndarray:
    """Every point of a grid, written down from its definition."""
    if grid == "uniform":
        return np.array([upper * code / (2**bits - 1) for code in range(2**bits)])
    base = {"log2": 2.0, "log_sqrt2": 2.0**0.5}[grid]
    return np.array([0.0] + [upper * base**-code for code in range(2**bits - 1)])


@pytest.mark.parametrize("upper", [1.0, 0.37, 2.0**-5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["uniform", "log2", "log_sqrt2"])
def test_probabilities_go_to_the_nearest_point(grid, bits, upper):
    p = softmax(5, 40)
    p[0] = torch.logspace(-90, 0, 40, base=2, dtype=torch.float64)
    expected = points(grid, bits, upper)
    assert len(expected) == 2**bits
    nearest = expected[np.abs(p.numpy()[..., None] - expected).argmin(-1)]
    result = quantize_probabilities(p, torch.tensor(upper, dtype=torch.float64), bits, grid)
    np.testing.assert_allclose(result.numpy(), nearest, rtol=1e-12, atol=1e-300)


def test_log2_by_hand():
    """Levels 1, ½, ¼ and 0: the middles are 0.75, 0.375 and 0.125; upper ends scale all of it."""
    p = torch.tensor([1.0, 0.76, 0.75, 0.74, 0.376, 0.374, 0.126, 0.124, 0.0])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0])
    assert torch.equal(quantize_probabilities(p, torch.tensor(1.0), 2, "log2"), expected)
    assert torch.equal(quantize_probabilities(p / 4, torch.tensor(0.25), 2, "log2"), expected / 4)


@pytest.mark.parametrize("grid", ["uniform", "log2", "log_sqrt2"])
def test_zero_and_the_upper_end_are_exact(grid):
    for bits in (2, 4, 8):
        p = torch.tensor([0.0, 0.3, 0.9])
        result = quantize_probabilities(p, torch.tensor(0.3), bits, grid)
        torch.testing.assert_close(result, torch.tensor([0.0, 0.3, 0.3]), rtol=1e-6, atol=0)
        assert result[0] == 0


@pytest.mark.parametrize("grid", ["uniform", "log2", "log_sqrt2"])
def test_upper_ends_broadcast_per_head_and_narrow_types_are_widened(grid):
    p = softmax(2, 3, 4, 6)
    upper = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)[:, None, None]
    result = quantize_probabilities(p, upper, 3, grid)
    for head in range(3):
        assert torch.equal(result[:, head], quantize_probabilities(p[:, head], upper[head], 3, grid))
    narrow = quantize_probabilities(p.bfloat16(), upper, 3, grid)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, quantize_probabilities(p.bfloat16().float(), upper, 3, grid))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (-3.3, 0.1), (5.0, 6.5), (-9.0, -8.0), (0.0, 1.0)])
@pytest.mark.parametrize("alpha", [1.0, 0.83])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_go_to_the_nearest_point(bits, alpha, low, high):
    v = torch.linspace(low, high, 301, dtype=torch.float64)
    scale, zero = value_grid(torch.tensor([low]), torch.tensor([high]), bits, alpha)
    assert scale.dtype == zero.dtype == torch.float32
    assert torch.equal(zero, zero.round())
    assert float(scale) == pytest.approx(alpha * (high - low) / (2**bits - 1), rel=1e-5)
    result = quantize_values(v, scale, zero, bits)
    steps = result / scale.double()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-6)
    assert len(result.unique()) <= 2**bits
    distance = (v - result).abs() / float(scale)
    inside = (v >= float(result.min())) & (v <= float(result.max()))
    assert float(distance[inside].max()) <= 0.5 + 1e-6
    # what is cut off at either end is the same, but for the step by which an integer zero point may move the range
    cut = (1 - alpha) * (high - low) / 2 / float(scale) + 0.5
    assert float(distance.max()) <= cut + 1e-4


def test_values_by_hand():
    """[−1, 2] in 2 bits: step 1, zero point 1. Shrunk to α = ½: step ½, and [−¼, 1¼] holds −0.5, 0, 0.5, 1."""
    low, high = torch.tensor([-1.0]), torch.tensor([2.0])
    v = torch.tensor([-1.0, -0.4, 0.6, 1.9, 7.0])
    assert [float(x) for x in value_grid(low, high, 2)] == [1.0, 1.0]
    assert quantize_values(v, *value_grid(low, high, 2), 2).tolist() == [-1.0, 0.0, 1.0, 2.0, 2.0]
    scale, zero = value_grid(low, high, 2, 0.5)
    assert (float(scale), float(zero)) in ((0.5, 0.0), (0.5, 1.0))  # 0.5 is a tie
    assert quantize_values(torch.tensor([0.0, 0.6]), scale, zero, 2).tolist() == [0.0, 0.5]


@settings(max_examples=25)
@given(value=st.floats(-1e4, 1e4, width=32), bits=st.sampled_from([2, 4, 8]))
def test_a_range_of_one_point_keeps_it(value, bits):
    point = torch.tensor([value])
    result = quantize_values(point, *value_grid(point, point, bits), bits)
    assert float(result) == pytest.approx(value, rel=2.0**-19, abs=1e-30)


@settings(max_examples=25)
@given(seed=st.integers(0, 99), weighted=st.booleans())
def test_both_forms_of_the_output_error_are_the_loop(seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    p, delta = softmax(3, 4, 5, seed=seed), torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, 4, generator=generator, dtype=torch.float64) if weighted else None
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for n in range(3):
        for i in range(4):
            for c in range(2):
                error = sum(float(p[n, i, j] * delta[n, j, c]) for j in range(5))
                expected[n, c] += (1.0 if weights is None else float(weights[n, i])) * error**2
    torch.testing.assert_close(output_error(p, delta, weights), expected)
    gram = attention_gram(p, weights)
    torch.testing.assert_close(((gram @ delta) * delta).sum(1), expected)
    torch.testing.assert_close(gram, gram.mT)


def test_errors():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="grid: 'log' is unknown; valid: uniform, log2, log_sqrt2"):
        quantize_probabilities(one, one, 4, "log")
    for alpha in (0.0, 1.01):
        with pytest.raises(ValueError, match=r"alpha: .*; valid: in \(0, 1\]"):
            value_grid(-one, one, 4, alpha)
    for low, high in ((one, -one), (one * torch.nan, one), (-one * torch.inf, one)):
        with pytest.raises(ValueError, match="low, high: a range is empty or not finite"):
            value_grid(low, high, 4)
    with pytest.raises(ValueError, match=r"weights: shape \(3, 1\), expected \(3, 4\)"):
        output_error(torch.ones(3, 4, 5), torch.ones(3, 5, 2), torch.ones(3, 1))
