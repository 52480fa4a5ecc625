"""IA-AQ against its definitions: loops over states, heads, queries, keys, channels and α in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor

from dllmquant.core.attention import attention_gram, quantize_probabilities
from dllmquant.core.iaaq import (
    ALPHAS,
    SiteErrors,
    ValueRange,
    ValueScaleSearch,
    input_scales,
    interaction,
    normalised_interaction,
    search_value_scales,
)

HEADS, KV_HEADS, QUERIES, KEYS, CHANNELS = 4, 2, 5, 7, 3
State = tuple[Tensor, Tensor, Tensor | None]


def state(seed: int, weighted: bool = True) -> State:
    """Ã [heads, q, k] in 4 bits, V [kv heads, k, channels] with a few large values, w [q]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    probabilities = (2 * normal(HEADS, QUERIES, KEYS)).softmax(-1)
    probabilities = quantize_probabilities(probabilities, torch.tensor(0.8), 4, "uniform")
    values = normal(KV_HEADS, KEYS, CHANNELS) ** 3 + torch.tensor([0.0, 4.0], dtype=torch.float64)[:, None, None]
    weights = torch.rand(QUERIES, generator=generator, dtype=torch.float64)
    return probabilities, values, weights if weighted else None


STATES = [state(seed) for seed in range(5)]


def step_and_zero(low: float, high: float, bits: int, alpha: float) -> tuple[float, float]:
    """ŝ = (max − min)/(2^b − 1), s = αŝ, the zero point that keeps the middle of the range; rounded as stored."""
    low, high = float(np.float32(low)), float(np.float32(high))
    step = np.float32(np.float32(high - low) * np.float32(alpha / (2**bits - 1)))
    return float(step), float(np.rint((2**bits - 1) / 2 - (low + high) / 2 / float(step)))


def brute_force(states: list[State], bits: int, granularity: str) -> np.ndarray:
    """L [alphas, kv heads, 1 or channels] = Σ_states Σ_i w_i ‖(Ã (V̂_α − V))_i‖², one number at a time."""
    stacked = np.stack([values.numpy() for _, values, _ in states])
    table = np.zeros((len(ALPHAS), KV_HEADS, 1 if granularity == "head" else CHANNELS))
    for index, alpha in enumerate(ALPHAS):
        for head in range(KV_HEADS):
            for channel in range(CHANNELS):
                pool = stacked[:, head] if granularity == "head" else stacked[:, head, :, channel]
                step, zero = step_and_zero(pool.min(), pool.max(), bits, alpha)
                for probabilities, values, weights in states:
                    v = values[head, :, channel].numpy()
                    codes = np.clip(np.rint(v / step) + zero, 0, 2**bits - 1)
                    delta = (codes - zero) * step - v
                    for query_head in range(HEADS):
                        if query_head // (HEADS // KV_HEADS) != head:
                            continue
                        for i in range(QUERIES):
                            w = 1.0 if weights is None else float(weights[i])
                            error = float(probabilities[query_head, i].numpy() @ delta)
                            table[index, head, 0 if granularity == "head" else channel] += w * error**2
    return table


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("bits", [2, 4])
def test_value_scales_equal_brute_force(bits, granularity, weighted):
    states = [state(seed, weighted) for seed in range(5)]
    table = brute_force(states, bits, granularity)
    result = search_value_scales(states, bits, granularity)
    best = table.argmin(0)
    np.testing.assert_allclose(result.alpha.numpy(), np.array(ALPHAS)[best])
    np.testing.assert_allclose(result.error.numpy(), table.min(0), rtol=1e-9)
    np.testing.assert_allclose(result.full_range_error.numpy(), table[0], rtol=1e-9)
    assert len(np.unique(best)) > 1  # else the choice of α was hardly tested
    stacked = torch.stack([values for _, values, _ in states])
    axes = (0, 2, 3) if granularity == "head" else (0, 2)
    low, high = stacked.amin(axes).numpy().reshape(best.shape), stacked.amax(axes).numpy().reshape(best.shape)
    for place in np.ndindex(best.shape):
        step, zero = step_and_zero(low[place], high[place], bits, ALPHAS[best[place]])
        assert float(result.scale[place]) == pytest.approx(step, rel=1e-6)
        assert float(result.zero[place]) == zero
    assert result.scale.dtype == result.zero.dtype == torch.float32


def test_candidates_are_the_papers():
    assert pytest.approx([1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8]) == ALPHAS


def ranges(states: list[State], granularity: str) -> ValueRange:
    found = ValueRange(KV_HEADS, 1 if granularity == "head" else CHANNELS)
    for _, values, _ in states:
        found.add(values[None])
    return found


def search_over(states: list[State], granularity: str, *, rows: int = HEADS, gram: bool = False) -> ValueScaleSearch:
    search = ValueScaleSearch(ranges(STATES, granularity), 4)
    for probabilities, values, weights in states:
        for part in torch.arange(HEADS).split(rows):
            heads = part // (HEADS // KV_HEADS)
            w = None if weights is None else weights.expand(len(part), -1)
            if gram:
                search.add_gram(attention_gram(probabilities[part], w), values[heads], heads)
            else:
                search.add(probabilities[part], values[heads], heads, w)
    return search


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_gram_form_portions_and_merging_change_nothing(granularity):
    expected = search_over(STATES, granularity).table
    torch.testing.assert_close(search_over(STATES, granularity, gram=True).table, expected)
    torch.testing.assert_close(search_over(STATES, granularity, rows=1).table, expected)
    merged = search_over(STATES[:2], granularity)
    merged.merge(search_over(STATES[2:], granularity))
    torch.testing.assert_close(merged.table, expected)
    assert merged.table.dtype == torch.float64


@settings(max_examples=20)
@given(seed=st.integers(0, 999), granularity=st.sampled_from(["head", "channel"]), bits=st.sampled_from([2, 3, 4, 8]))
def test_never_worse_than_the_full_range_and_channels_never_worse_off(seed, granularity, bits):
    result = search_value_scales([state(seed), state(seed + 1000)], bits, granularity)
    assert (result.error <= result.full_range_error).all()
    assert (result.scale > 0).all()


def test_narrow_tensors_are_searched_in_float32():
    narrow = [(p.float(), v.bfloat16(), w) for p, v, w in STATES]
    wide = [(p, v.bfloat16().double(), w) for p, v, w in STATES]
    results = [search_value_scales(states, 4, "channel") for states in (narrow, wide)]
    torch.testing.assert_close(results[0].error, results[1].error, rtol=1e-4, atol=1e-6)


def test_ties_go_to_the_full_range():
    one = ValueRange(1)
    one.add(torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1))
    assert ValueScaleSearch(one, 4).result().alpha.tolist() == [[1.0]]


def test_the_range_folds_repeated_heads_and_leaves_padding_out():
    values = torch.randn(3, KV_HEADS, KEYS, CHANNELS)
    real = torch.rand(3, KEYS) > 0.3
    for channels, axes in ((1, (0, 2, 3)), (CHANNELS, (0, 2))):
        found = ValueRange(KV_HEADS, channels)
        poisoned = torch.where(real[:, None, :, None], values, torch.nan)
        found.add(poisoned[:2].repeat_interleave(2, dim=1), real[:2])
        other = ValueRange(KV_HEADS, channels)
        other.add(poisoned[2:], real[2:])
        other.add(poisoned[2:], torch.zeros(1, KEYS, dtype=torch.bool))
        found.merge(other)
        low = torch.where(real[:, None, :, None], values, torch.inf).amin(axes).view(KV_HEADS, channels)
        high = torch.where(real[:, None, :, None], values, -torch.inf).amax(axes).view(KV_HEADS, channels)
        assert torch.equal(found.low, low)
        assert torch.equal(found.high, high)


def test_interaction_is_the_weighted_column_mass():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(2, HEADS, KEYS, KEYS, generator=generator, dtype=torch.float64).softmax(-1)
    weights = torch.rand(2, KEYS, generator=generator, dtype=torch.float64)
    weights[:, 1] = 0  # not padding: it is read as others are
    weights[1, 4:] = 0  # padding
    padded = torch.ones(2, KEYS, dtype=torch.bool)
    padded[1, 4:] = False
    result = interaction(probabilities, weights, padded)
    assert (result[:, 1] > 0).all()
    for item, real in enumerate((KEYS, 4)):
        mass = [
            sum(
                float(weights[item, i] * probabilities[item, h, i, j]) / HEADS
                for h in range(HEADS)
                for i in range(KEYS)
            )
            for j in range(real)
        ]
        expected = [m / (sum(mass) / real) for m in mass] + [0.0] * (KEYS - real)
        np.testing.assert_allclose(result[item].numpy(), expected, rtol=1e-12)
    # what batch a sequence is in and how its weights are scaled does not matter
    torch.testing.assert_close(interaction(probabilities[1], 7 * weights[1], padded[1]), result[1])
    torch.testing.assert_close(interaction(probabilities[0], weights[0]), result[0])


def test_interaction_by_hand():
    """Query 0 (weight 3) looks at key 1, query 1 (weight 1) at both: masses 0.5 and 3.5, mean 2."""
    probabilities = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    weights = torch.tensor([3.0, 1.0])
    assert interaction(probabilities, weights).tolist() == [0.25, 1.75]
    assert interaction(probabilities, weights, torch.tensor([False, True])).tolist() == [0.0, 1.0]
    assert interaction(probabilities, torch.zeros(2)).tolist() == [0.0, 0.0]
    assert interaction(torch.zeros(1, 2, 2), weights).tolist() == [0.0, 0.0]


def rounding(step: float, x: Tensor) -> Tensor:
    return torch.round(x / step) * step


CHOICES = [partial(rounding, 1.0), partial(rounding, 0.1), lambda x: x]


def test_site_errors_are_the_definition():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    weights[1, 3:] = 0
    numerator, denominator = [0.0, 0.0, 0.0], 0.0
    for token, w in zip(x.view(-1, 3), weights.view(-1), strict=True):
        denominator += float(w) * float((weight @ token).square().sum())
        for index, choice in enumerate(CHOICES):
            numerator[index] += float(w) * float((weight @ (token - choice(token))).square().sum())
    expected = [error / denominator for error in numerator]
    x[1, 3:] = torch.nan
    for chunk in (1, 5, 4096):
        errors = SiteErrors(weight, CHOICES)
        errors.add(x[:1], weights[:1], chunk)
        other = SiteErrors(weight, CHOICES)
        other.add(x[1:], weights[1:], chunk)
        errors.merge(other)
        np.testing.assert_allclose(errors.relative().numpy(), expected, rtol=1e-12)
    assert expected[0] > 10 * expected[1] > expected[2] == 0


def test_site_errors_of_narrow_tokens_are_taken_in_float32():
    x = torch.randn(50, 3).bfloat16()
    errors = SiteErrors(torch.eye(3).bfloat16(), [partial(rounding, 2.0**-7)])
    errors.add(x, torch.ones(50))
    delta = x.double() - rounding(2.0**-7, x).double()
    assert float(errors.relative()) == pytest.approx(float(delta.square().sum() / x.double().square().sum()), rel=1e-4)


def test_errors():
    with pytest.raises(ValueError, match=r"query_weights: shape \(2, 3\) does not fit \(2, 4, 5, 5\)"):
        interaction(torch.ones(2, 4, 5, 5), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"real: shape \(5,\), expected \(2, 5\)"):
        normalised_interaction(torch.ones(2, 5), torch.ones(5, dtype=torch.bool))
    for shape in ((1, 3, 4, 2), (2, 4, 3), (1, 2, 4, 2)):
        with pytest.raises(ValueError, match=r"values: shape .*; valid: \[batch, 2·r, k, 3 \(1: any\)\]"):
            ValueRange(2, 3).add(torch.ones(shape))
    with pytest.raises(ValueError, match="values: a value that is not padding is NaN or infinite"):
        ValueRange(2, 1).add(torch.full((1, 2, 1, 1), torch.inf))
    with pytest.raises(ValueError, match=r"other: range of shape \(2, 1\), expected \(2, 3\)"):
        ValueRange(2, 3).merge(ValueRange(2, 1))
    with pytest.raises(ValueError, match="low, high: a range is empty"):
        ValueScaleSearch(ValueRange(2, 1), 4)
    one, two = ValueRange(1), ValueRange(1)
    one.add(torch.tensor([0.0, 1.0]).view(1, 1, 2, 1))
    two.add(torch.tensor([3.0, 4.0]).view(1, 1, 2, 1))
    for alphas in ((), (0.9, 1.0)):
        with pytest.raises(ValueError, match=r"alphas: .*; valid: ratios in"):
            ValueScaleSearch(one, 4, alphas)
    for other in (ValueScaleSearch(two, 4), ValueScaleSearch(one, 3), ValueScaleSearch(one, 4, (1.0,))):
        with pytest.raises(ValueError, match="other: it searches other scales"):
            ValueScaleSearch(one, 4).merge(other)
    for states, granularity in (([], "head"), (STATES, "token")):
        with pytest.raises(ValueError, match=r"states, granularity: .*; valid: 1 or more, head or channel"):
            search_value_scales(states, 4, granularity)
    site = SiteErrors(torch.ones(2, 3), CHOICES)
    with pytest.raises(ValueError, match=r"x, weights: shapes \(5, 4\), \(5,\) do not fit W's 3 columns"):
        site.add(torch.ones(5, 4), torch.ones(5))
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="weights: valid weights are finite and not negative"):
            site.add(torch.ones(1, 3), torch.tensor([bad]))
    with pytest.raises(ValueError, match="x: a token with a positive weight holds NaN"):
        site.add(torch.full((1, 3), torch.nan), torch.ones(1))
    with pytest.raises(ValueError, match="relative: no token with a positive weight"):
        site.relative()


@st.composite
def rotated_inputs(draw):
    """Tokens [n, 8], their weights [n] and the weights [out, 8] of two layers; some channels are much larger."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x, first, second = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (6, 5, 3))
    gains = torch.tensor(draw(st.lists(st.sampled_from([0.1, 1.0, 64.0]), min_size=8, max_size=8)), dtype=torch.float64)
    return x * gains, torch.rand(6, generator=generator, dtype=torch.float64), [first / gains, second]


def rounding_energy(x: Tensor, w: Tensor, weights: list[Tensor], scales: Tensor) -> float:
    """Σ_j w_j ‖x_j/s H‖² / Σ_j w_j times Σ_l ‖W_l diag(s) H‖², token by token, with a Hadamard matrix H of SciPy."""
    h = torch.from_numpy(hadamard(len(scales), dtype=np.float64)) / len(scales) ** 0.5
    tokens = sum(float(weight * ((token / scales) @ h).square().sum()) for token, weight in zip(x, w, strict=True))
    return tokens / float(w.sum()) * sum(float(((matrix * scales) @ h).square().sum()) for matrix in weights)


@given(rotated_inputs(), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_no_other_input_scales_err_less_behind_a_rotation(inputs, seed):
    x, w, weights = inputs
    a = (w[:, None] * x.square()).sum(0) / w.sum()
    scales = input_scales(a, weights)
    least = rounding_energy(x, w, weights, scales)
    b = sum(matrix.square().sum(0) for matrix in weights)
    assert least == pytest.approx(float((a * b).sqrt().sum()) ** 2, rel=1e-9)  # Cauchy's bound
    generator = torch.Generator().manual_seed(seed)
    for spread in (0.01, 1.0):
        others = scales * (spread * torch.randn(8, generator=generator, dtype=torch.float64)).exp()
        assert rounding_energy(x, w, weights, others) >= least * (1 - 1e-12)
    assert float(scales.max() * scales.min()) == pytest.approx(1)


def test_input_scales_of_idle_channels_stay_moderate():
    a, weight = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([[1.0, 1.0, 0.0]])
    scales = input_scales(a, [weight])
    assert scales.dtype == torch.float64
    expected = torch.tensor([4e-8 / 1, 1.0, 4 / 1e-8], dtype=torch.float64) ** 0.25
    assert torch.allclose(scales, expected / (expected.max() * expected.min()).sqrt())
    for nothing in ((torch.zeros(3), [weight]), (a, [torch.zeros(2, 3)])):
        assert torch.equal(input_scales(*nothing), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("mean_square", "weights", "message"),
    [
        (torch.ones(2, 2), [torch.ones(3, 2)], "mean_square: shape"),
        (torch.tensor([1.0, -1.0]), [torch.ones(3, 2)], "none negative"),
        (torch.tensor([1.0, torch.nan]), [torch.ones(3, 2)], "finite"),
        (torch.ones(2), [], "at least one"),
        (torch.ones(2), [torch.ones(3, 3)], r"each \[out, 2\]"),
        (torch.ones(2), [torch.full((3, 2), torch.inf)], "NaN or infinity"),
    ],
)
def test_input_scales_refuse(mean_square, weights, message):
    with pytest.raises(ValueError, match=message):
        input_scales(mean_square, weights)
