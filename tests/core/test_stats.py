"""The weighted Hessian and the other sums of a layer's input against sums over single tokens in float64."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmquant.core.stats import HessianAccumulator, InputStatistics, input_magnitudes

FEATURES = 7


def tokens(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, FEATURES, generator=generator, dtype=torch.float64)
    return x + x.sum(-1, keepdim=True), 3 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def brute_force(x: Tensor, weights: Tensor) -> Tensor:
    """Σ w x xᵀ / Σ w, one token at a time."""
    total = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    for token, weight in zip(x.reshape(-1, FEATURES), weights.reshape(-1), strict=True):
        if weight > 0:
            total += weight * torch.outer(token, token)
    return total / weights.sum()


def brute_force_all(x: Tensor, weights: Tensor, full: Tensor | None = None) -> InputStatistics:
    """Every statistic, one token at a time; `full` [..., features] are the tokens of the full-precision path."""
    cross = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    used = [j for j in range(weights.numel()) if weights.flatten()[j] > 0]
    for j in used:
        share, token = float(weights.flatten()[j] / weights.sum()), x.reshape(-1, FEATURES)[j]
        if full is not None:
            other = full.reshape(-1, FEATURES)[j]
            for row in range(FEATURES):
                cross[row] += share * (other[row] - token[row]) * token
    return InputStatistics(
        hessian=brute_force(x, weights),
        tokens=len(used),
        cross=None if full is None else cross,
    )


def same(result: InputStatistics, expected: InputStatistics, tolerance: float = 1e-10) -> None:
    for name in ("hessian", "cross"):
        one, other = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_dtype=False)
    assert result.tokens == expected.tokens


def accumulate(*batches: tuple[Tensor, Tensor | None], dtype: torch.dtype = torch.float64) -> HessianAccumulator:
    accumulator = HessianAccumulator(FEATURES, dtype=dtype)
    for x, weights in batches:
        accumulator.add(x, weights)
    return accumulator


def accumulate_both(*batches: tuple[Tensor, Tensor, Tensor]) -> HessianAccumulator:
    """From batches of quantized-path tokens, weights, full-precision-path tokens."""
    accumulator = HessianAccumulator(FEATURES, dtype=torch.float64, cross=True)
    for x, weights, full in batches:
        accumulator.add(x, weights, full)
    return accumulator


def test_equals_the_sum_over_tokens() -> None:
    x, weights = tokens(3, 5)
    accumulator = accumulate((x, weights))
    torch.testing.assert_close(accumulator.hessian(), brute_force(x, weights))
    assert accumulator.total_weight == pytest.approx(float(weights.sum()))
    assert accumulator.tokens == 15
    assert accumulator.hessian().dtype == torch.float64


def test_by_hand() -> None:
    accumulator = HessianAccumulator(2, dtype=torch.float64)
    accumulator.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(accumulator.hessian() * 3, torch.tensor([[11.0, 4.0], [4.0, 8.0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_tokens_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, weights = tokens(4, 50)
    accumulator = HessianAccumulator(FEATURES)
    accumulator.add(x.to(dtype), weights)
    assert accumulator.hessian().dtype == torch.float32
    torch.testing.assert_close(
        accumulator.hessian().double(), brute_force(x.to(dtype).double(), weights), rtol=1e-5, atol=1e-5
    )


def test_no_weights_count_every_token_once() -> None:
    x, _ = tokens(2, 3)
    torch.testing.assert_close(accumulate((x, None)).hessian(), brute_force(x, torch.ones(2, 3, dtype=torch.float64)))
    assert accumulate((x, None)).total_weight == 6


@pytest.mark.parametrize("bad", [0.0, 1e30, float("nan"), float("inf")])
def test_tokens_of_weight_zero_are_excluded(bad: float) -> None:
    x, weights = tokens(4, 6)
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1, 3:] = keep[2, 5:] = False
    expected = accumulate((x[keep], weights[keep]))
    x[~keep] = bad
    accumulator = accumulate((x, weights * keep))
    torch.testing.assert_close(accumulator.hessian(), expected.hessian())
    assert accumulator.tokens == expected.tokens == 20
    assert accumulator.total_weight == pytest.approx(expected.total_weight)


def test_a_mask_serves_as_weights() -> None:
    x, _ = tokens(2, 4)
    keep = torch.tensor([[True, True, False, True], [True, False, False, False]])
    torch.testing.assert_close(accumulate((x, keep)).hessian(), accumulate((x[keep], None)).hessian())


def test_weight_four_is_the_token_four_times() -> None:
    x, _ = tokens(3)
    weighted = accumulate((x, torch.tensor([4.0, 1.0, 2.0])))
    repeated = accumulate((x[[0, 0, 0, 0, 1, 2, 2]], None))
    torch.testing.assert_close(weighted.hessian(), repeated.hessian())
    assert weighted.total_weight == repeated.total_weight == 7
    assert (weighted.tokens, repeated.tokens) == (3, 7)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), merged=st.booleans(), seed=st.integers(0, 99))
def test_any_split_and_any_merge_give_the_same(cuts: list[int], merged: bool, seed: int) -> None:
    x, weights = tokens(12, seed=seed)
    weights[seed % 12] = 0
    edges = [0, *sorted(cuts), 12]
    parts = [(x[low:high], weights[low:high]) for low, high in pairwise(edges)]
    if merged:
        accumulator = HessianAccumulator(FEATURES, dtype=torch.float64)
        for part in reversed(parts):
            accumulator.merge(accumulate(part))
    else:
        accumulator = accumulate(*parts)
    torch.testing.assert_close(accumulator.hessian(), brute_force(x, weights))
    assert accumulator.tokens == 11
    assert accumulator.total_weight == pytest.approx(float(weights.sum()))


def test_state_dict_round_trip() -> None:
    first, second = tokens(4, seed=1), tokens(5, seed=2)
    source = accumulate(first)
    state = source.state_dict()
    source.add(*second)
    kept = {key: value.clone() for key, value in state.items()}
    restored, other = (HessianAccumulator(FEATURES, dtype=torch.float64) for _ in range(2))
    restored.load_state_dict(state)
    other.load_state_dict(state)
    restored.add(*second)
    assert torch.equal(restored.hessian(), source.hessian())
    assert (restored.tokens, restored.total_weight) == (source.tokens, source.total_weight)
    assert all(torch.equal(state[key], kept[key]) for key in state)  # neither accumulator lives in the state
    assert torch.equal(other.hessian(), accumulate(first).hessian())


def test_the_result_is_a_copy() -> None:
    accumulator = accumulate(tokens(3))
    accumulator.hessian().zero_()
    assert bool((accumulator.hessian().diagonal() > 0).all())


def test_errors() -> None:
    x, weights = tokens(2, 3)
    accumulator = HessianAccumulator(FEATURES)
    with pytest.raises(ValueError, match="no token with a positive weight"):
        accumulator.hessian()
    with pytest.raises(ValueError, match="x: 6 features, expected 7"):
        accumulator.add(x[..., 1:])
    with pytest.raises(ValueError, match=r"weights: shape \(3, 2\), expected \(2, 3\)"):
        accumulator.add(x, weights.T)
    for bad in (-0.5, float("nan"), float("inf")):
        broken = weights.clone()
        broken[1, 1] = bad
        with pytest.raises(ValueError, match="weights: valid weights are finite and not negative"):
            accumulator.add(x, broken)
    x[0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="x: a token with a positive weight holds NaN"):
        accumulator.add(x, weights)
    assert (accumulator.tokens, accumulator.total_weight) == (0, 0)  # a refused batch leaves no trace
    accumulator.add(x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no token with a positive weight"):
        accumulator.hessian()
    with pytest.raises(ValueError, match="other: 3 features, expected 7"):
        accumulator.merge(HessianAccumulator(3))
    with pytest.raises(ValueError, match=r"state: sum of shape \(3, 3\), expected \(7, 7\)"):
        accumulator.load_state_dict(HessianAccumulator(3).state_dict())
    with pytest.raises(ValueError, match=r"dtype: torch.bfloat16 is too narrow"):
        HessianAccumulator(3, dtype=torch.bfloat16)


def test_statistics_equal_the_sums_over_tokens() -> None:
    x, weights = tokens(3, 5)
    weights[1, 2:] = 0
    same(accumulate((x, weights)).statistics(), brute_force_all(x, weights))
    full = tokens(3, 5, seed=1)[0]
    both = accumulate_both((x, weights, full)).statistics()
    same(both, brute_force_all(x, weights, full))
    assert both.cross is not None
    used = weights > 0
    mixed = torch.einsum("t,ti,tj->ij", weights[used], full[used], x[used]) / weights.sum()
    torch.testing.assert_close(both.hessian + both.cross, mixed)  # E x x̃ᵀ


def test_statistics_by_hand() -> None:
    accumulator = HessianAccumulator(2, dtype=torch.float64, cross=True)
    quantized, full = torch.tensor([[1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[1.5, -2.0], [-3.0, 1.0]])
    accumulator.add(quantized, torch.tensor([2.0, 1.0]), full)
    result = accumulator.statistics()
    assert result.cross is not None
    assert (result.cross * 3).tolist() == [[1, -2], [-3, 0]]  # 2·(½, 0)ᵀ(1, −2) + 1·(0, 1)ᵀ(−3, 0)


def test_equal_paths_have_no_cross_statistic() -> None:
    x, weights = tokens(4)
    assert not bool(accumulate_both((x, weights, x)).statistics().cross.any())  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [0.0, 1e30, float("nan"), float("inf")])
def test_statistics_exclude_tokens_of_weight_zero(bad: float) -> None:
    (x, weights), full = tokens(6), tokens(6, seed=1)[0]
    weights[[1, 4]] = 0
    expected = brute_force_all(x, weights, full)
    x[1] = full[1] = x[4] = bad
    same(accumulate_both((x, weights, full)).statistics(), expected)


def test_narrow_paths_are_subtracted_in_float32() -> None:
    (x, weights), full = tokens(50), tokens(50, seed=1)[0]
    narrow, other = x.bfloat16(), (x + 1e-2 * full).bfloat16()
    accumulator = HessianAccumulator(FEATURES, cross=True)
    accumulator.add(narrow, weights, other)
    result = accumulator.statistics()
    same(result, brute_force_all(narrow.double(), weights, other.double()), 1e-5)
    assert {part.dtype for part in vars(result).values() if isinstance(part, Tensor)} == {torch.float32}


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), merged=st.booleans(), seed=st.integers(0, 99))
def test_statistics_do_not_depend_on_splits_and_merges(cuts: list[int], merged: bool, seed: int) -> None:
    (x, weights), full = tokens(12, seed=seed), tokens(12, seed=seed + 100)[0]
    weights[seed % 12] = 0
    parts = [(x[low:high], weights[low:high], full[low:high]) for low, high in pairwise([0, *sorted(cuts), 12])]
    if merged:
        accumulator = accumulate_both()
        for part in reversed(parts):
            accumulator.merge(accumulate_both(part))
    else:
        accumulator = accumulate_both(*parts)
    result = accumulator.statistics()
    same(result, brute_force_all(x, weights, full))
    magnitudes, energy = input_magnitudes((x, w) for x, w, _ in parts), result.hessian.diagonal()
    assert bool((magnitudes.mean_abs.square() <= energy * (1 + 1e-12)).all())
    assert bool((energy <= magnitudes.absmax * magnitudes.mean_abs * (1 + 1e-12)).all())


def test_statistics_survive_the_state_dict() -> None:
    (x, weights), full = tokens(4, seed=1), tokens(4, seed=2)[0]
    source = accumulate_both((x, weights, full))
    state = source.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    restored, other = accumulate_both(), accumulate_both()
    restored.load_state_dict(state)
    other.load_state_dict(state)
    for accumulator in (source, restored):
        accumulator.add(2 * full, weights, x)
    same(restored.statistics(), source.statistics(), 0)
    assert all(torch.equal(state[key], kept[key]) for key in state)
    same(other.statistics(), brute_force_all(x, weights, full))


def test_statistics_are_copies() -> None:
    (x, weights), full = tokens(4), tokens(4, seed=1)[0]
    accumulator = accumulate_both((x, weights, full))
    result = accumulator.statistics()
    for part in (result.hessian, result.cross):
        assert part is not None
        part.zero_()
    same(accumulator.statistics(), brute_force_all(x, weights, full))


def test_statistics_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        accumulate(tokens(3)).statistics().tokens = 0  # type: ignore[misc]


def test_errors_of_the_second_path() -> None:
    x, weights = tokens(2, 3)
    one, both = HessianAccumulator(FEATURES), HessianAccumulator(FEATURES, cross=True)
    with pytest.raises(ValueError, match="no token with a positive weight"):
        both.statistics()
    for accumulator, full in ((one, x), (both, None)):
        with pytest.raises(ValueError, match=r"full: .* valid: both or neither"):
            accumulator.add(x, weights, full)
    with pytest.raises(ValueError, match=r"full: shape \(2, 2, 7\), expected \(2, 3, 7\)"):
        both.add(x, weights, x[:, 1:])
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[0, 1, 2] = bad
        with pytest.raises(ValueError, match="full: a token with a positive weight holds NaN"):
            both.add(x, weights, broken)
    assert (both.tokens, both.total_weight) == (0, 0)
    assert not any(bool(value.any()) for value in both.state_dict().values())  # a refused batch leaves no trace
    for first, second in ((one, both), (both, one)):
        with pytest.raises(ValueError, match=r"other: .* cross sum, .* valid: both or neither"):
            first.merge(second)
        with pytest.raises(ValueError, match=r"state: .* cross sum; valid: both or neither"):
            first.load_state_dict(second.state_dict())


@pytest.mark.parametrize("cuts", [[0, 12], [0, 5, 5, 12], [0, 1, 12]])
def test_magnitudes_equal_the_maxima_and_means_over_tokens(cuts: list[int]) -> None:
    x, weights = tokens(12)
    weights[[1, 4]] = 0
    x[4] = float("nan")
    absmax, mean_abs, mean_square = ([0.0] * FEATURES for _ in range(3))
    for token, weight in zip(x, weights, strict=True):
        for i in range(FEATURES if weight > 0 else 0):
            absmax[i] = max(absmax[i], abs(float(token[i])))
            mean_abs[i] += float(weight / weights.sum()) * abs(float(token[i]))
            mean_square[i] += float(weight / weights.sum()) * float(token[i]) ** 2
    result = input_magnitudes((x[low:high], weights[low:high]) for low, high in pairwise(cuts))
    torch.testing.assert_close(result.absmax, torch.tensor(absmax, dtype=torch.float64))
    torch.testing.assert_close(result.mean_abs, torch.tensor(mean_abs, dtype=torch.float64))
    torch.testing.assert_close(result.mean_square, torch.tensor(mean_square, dtype=torch.float64))


def test_magnitudes_by_hand() -> None:
    result = input_magnitudes([(torch.tensor([[1.0, -2.0], [-3.0, 0.0]]).bfloat16(), torch.tensor([2.0, 1.0]))])
    assert result.absmax.tolist() == [3, 2]
    assert (result.mean_abs * 3).tolist() == [5, 4]
    assert (result.mean_square * 3).tolist() == [11, 8]
    assert result.absmax.dtype == torch.float32


def test_magnitudes_errors() -> None:
    x, weights = tokens(3)
    with pytest.raises(ValueError, match="no token with a positive weight"):
        input_magnitudes([(x, torch.zeros(3))])
    with pytest.raises(ValueError, match=r"weights: shape \(2,\), expected \(3,\)"):
        input_magnitudes([(x, weights[:2])])
    with pytest.raises(ValueError, match="weights: valid weights are finite and not negative"):
        input_magnitudes([(x, -weights)])
    with pytest.raises(ValueError, match="x: a token with a positive weight holds NaN"):
        input_magnitudes([(x * float("inf"), weights)])
