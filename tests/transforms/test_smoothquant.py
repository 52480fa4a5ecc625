"""SmoothQuant's scales against the formula, one channel at a time, and what they achieve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmquant.transforms.fold import apply_scales
from dllmquant.transforms.smoothquant import smooth_scales


def problem(seed, channels=10):
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.05
    absmax[3] *= 40
    weights = [torch.randn(rows, channels, generator=generator, dtype=torch.float64) for rows in (7, 2, 5)]
    return absmax, weights


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_equals_the_formula(alpha):
    absmax, weights = problem(0)
    scales = smooth_scales(absmax, weights, alpha)
    for i in range(len(absmax)):
        largest = max(abs(float(w[row, i])) for w in weights for row in range(len(w)))
        assert float(scales[i]) == pytest.approx(float(absmax[i]) ** alpha / largest ** (1 - alpha), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), unit=st.floats(1e-6, 1e6))
def test_half_makes_activations_and_weights_equally_large_in_any_unit(seed, unit):
    absmax, weights = problem(seed)
    absmax = absmax * unit
    scales = smooth_scales(absmax, weights)
    largest = torch.cat(weights).abs().amax(0)
    torch.testing.assert_close(absmax / scales, largest * scales)
    torch.testing.assert_close(absmax / scales, (absmax * largest).sqrt())


def test_the_default_is_a_half_and_float32_is_widened():
    absmax, weights = problem(1)
    narrow = smooth_scales(absmax.float(), [w.bfloat16() for w in weights])
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, smooth_scales(absmax, weights, 0.5), rtol=0.01, atol=0)


def test_channels_without_activations_or_weights_keep_scale_one():
    absmax, weights = problem(2)
    absmax[1] = 0
    for weight in weights:
        weight[:, 4] = 0
    weights[0][:, 5] = 0  # alive in the others
    scales = smooth_scales(absmax, weights)
    assert (scales[1], scales[4]) == (1, 1)
    assert float(scales[5]) == pytest.approx(float((absmax[5] / torch.cat(weights)[:, 5].abs().max()).sqrt()))
    assert bool((smooth_scales(torch.zeros(10), weights) == 1).all())


def test_hardly_used_channels_get_moderate_scales():
    absmax, weights = problem(3)
    absmax[0] = 1e-30
    weights = [weight.clone() for weight in weights]
    for weight in weights:
        weight[:, 2] *= 1e-30
    scales = smooth_scales(absmax, weights)
    largest = torch.cat(weights).abs().amax(0)
    assert float(scales[0]) == pytest.approx(float((1e-4 * absmax.max() / largest[0]).sqrt()))
    assert float(scales[2]) == pytest.approx(float((absmax[2] / (1e-4 * largest.max())).sqrt()))


def test_applied_they_flatten_an_outlier_channel():
    generator = torch.Generator().manual_seed(4)
    block = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 8)).double()
    with torch.no_grad():
        block[0].weight[3] *= 50
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    hidden, before = block[0](x), block(x)
    apply_scales(block, "0", ["1"], smooth_scales(hidden.detach().abs().amax(0), [block[1].weight.detach()], 0.8))
    after = block[0](x)
    torch.testing.assert_close(block(x), before)
    crest = [float((h.abs().amax(0).max() / h.abs().amax(0).median()).detach()) for h in (hidden, after)]
    assert crest[1] < crest[0] / 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.1}, "alpha: 1.1; valid: 0 to 1"),
        ({"alpha": -0.1}, "alpha: -0.1"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"absmax": torch.full((10,), -1.0)}, r"absmax: shape \(10,\); valid"),
        ({"absmax": torch.full((10,), torch.inf)}, "absmax"),
        ({"absmax": torch.ones(2, 10)}, "absmax"),
        ({"absmax": torch.ones(9)}, r"weights: shapes \[\(7, 10\).*each \[out, 9\]"),
        ({"weights": []}, "at least one"),
        ({"weights": [torch.full((2, 10), torch.nan)]}, "NaN"),
    ],
)
def test_wrong_arguments(change, message):
    absmax, weights = problem(5)
    with pytest.raises(ValueError, match=message):
        smooth_scales(**({"absmax": absmax, "weights": weights} | change))
