import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from dllmquant.lab.statistics import mcnemar_exact, paired_difference, wilson_interval

Bools = NDArray[np.bool_]
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40).map(lambda x: np.array(x).T)


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[Bools, Bools]:
    """Two models' answers, in an order that depends on nothing."""
    a = np.array([True] * both + [True] * only_a + [False] * only_b + [False] * neither)
    b = np.array([True] * both + [False] * only_a + [True] * only_b + [False] * neither)
    order = np.random.default_rng(3).permutation(a.size)
    return a[order], b[order]


# McNemar


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (0, 4), (3, 3), (2, 5), (7, 2), (9, 0), (5, 6)])
def test_mcnemar_enumerates_who_owns_the_disagreements(only_a: int, only_b: int) -> None:
    disagreements = only_a + only_b
    lead = abs(only_a - only_b)
    as_far = [
        abs(2 * sum(owners) - disagreements) >= lead for owners in itertools.product((0, 1), repeat=disagreements)
    ]
    a, b = answers(4, only_a, only_b, 3)
    assert mcnemar_exact(a, b) == pytest.approx(sum(as_far) / len(as_far), rel=1e-12)


def test_mcnemar_large() -> None:
    a, b = answers(1000, 60, 90, 500)
    assert mcnemar_exact(a, b) == pytest.approx(2 * stats.binom.cdf(60, 150, 0.5), rel=1e-9)


@given(outcomes)
def test_mcnemar_properties(pairs: Bools) -> None:
    a, b = pairs
    p = mcnemar_exact(a, b)
    assert 0 < p <= 1
    assert mcnemar_exact(b, a) == p
    assert mcnemar_exact(np.append(a, [True, False]), np.append(b, [True, False])) == p
    assert mcnemar_exact(a, a) == 1


# the paired difference


def exact_quantiles(only_a: int, only_b: int, n: int, levels: list[float]) -> list[float]:
    """Quantiles of the mean of n independent draws from the observed differences, by convolution."""
    one = np.array([only_a, n - only_a - only_b, only_b]) / n
    distribution = np.array([1.0])
    for _ in range(n):
        distribution = np.convolve(distribution, one)
    cumulative = distribution.cumsum()
    return [(int(np.searchsorted(cumulative, level)) - n) / n for level in levels]


@pytest.mark.parametrize(("both", "only_a", "only_b", "neither"), [(90, 10, 22, 78), (5, 1, 9, 5), (50, 30, 3, 117)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_agrees_with_the_exact_bootstrap(
    both: int, only_a: int, only_b: int, neither: int, confidence: float
) -> None:
    a, b = answers(both, only_a, only_b, neither)
    n = a.size
    found = paired_difference(a, b, confidence=confidence, resamples=100_000)
    low, high = exact_quantiles(only_a, only_b, n, [(1 - confidence) / 2, (1 + confidence) / 2])
    assert found.low == pytest.approx(low, abs=1.01 / n)
    assert found.high == pytest.approx(high, abs=1.01 / n)
    assert (found.n, found.only_a, found.only_b) == (n, only_a, only_b)
    assert found.difference == pytest.approx(b.mean() - a.mean())
    assert found.p_value == mcnemar_exact(a, b)


def test_interval_agrees_with_resampling_items() -> None:
    a, b = answers(60, 25, 45, 70)
    rng = np.random.default_rng(1)
    index = rng.integers(a.size, size=(20_000, a.size))
    means = b[index].mean(axis=1) - a[index].mean(axis=1)
    found = paired_difference(a, b, resamples=20_000)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.01)


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(5)
    hits, trials, truth = 0, 300, 0.15
    for trial in range(trials):
        draw = rng.random(200)
        found = paired_difference(draw < 0.1, (draw >= 0.1) & (draw < 0.35), resamples=500, seed=trial)
        hits += found.low <= truth <= found.high
    assert stats.binomtest(hits, trials, 0.95).pvalue > 0.001


@given(outcomes)
def test_difference_properties(pairs: Bools) -> None:
    a, b = pairs
    one, other = paired_difference(a, b, resamples=400), paired_difference(b, a, resamples=400)
    assert -1 <= one.low <= one.high <= 1
    assert one.difference == -other.difference == pytest.approx(b.mean() - a.mean())
    assert (one.only_a, one.only_b, one.n) == (other.only_b, other.only_a, a.size)
    assert one.p_value == other.p_value
    assert one == paired_difference(list(a), list(b), resamples=400)
    if one.only_a + one.only_b == 0:
        assert (one.low, one.high, one.p_value) == (0, 0, 1)


def test_resamples_depend_on_the_seed() -> None:
    a, b = answers(60, 25, 45, 70)
    found = {paired_difference(a, b, resamples=37, seed=seed).low for seed in range(10)}
    assert len(found) > 1


def test_more_confidence_is_wider() -> None:
    a, b = answers(60, 25, 45, 70)
    narrow, wide = (paired_difference(a, b, confidence=confidence) for confidence in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.difference < narrow.high < wide.high


# Wilson


@given(st.integers(1, 500), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_ends_are_where_the_score_test_rejects(n: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n, confidence=confidence)
    share, z = successes / n, stats.norm.isf((1 - confidence) / 2)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-7)
    mirrored = wilson_interval(n - successes, n, confidence=confidence)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


@given(st.integers(1, 200), st.data())
def test_wilson_narrows_with_items(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n)
    low4, high4 = wilson_interval(4 * successes, 4 * n)
    assume(0 < successes < n)
    assert low < low4 < high4 < high


def test_wilson_known_value() -> None:
    assert wilson_interval(7, 20) == pytest.approx((0.1811918, 0.5671457), abs=1e-6)


# failures

TRUE = np.array([True, False])


@pytest.mark.parametrize("function", [mcnemar_exact, paired_difference])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (TRUE, np.array([1, 0]), "b has shape .* dtype int64; valid: a one-dimensional boolean array"),
        (np.array([0.5, 1.0]), TRUE, "a has shape .* dtype float64; valid"),
        (TRUE[None], TRUE[None], r"a has shape \(1, 2\)"),
        (TRUE, np.array([True]), "a has 2 items and b has 1; valid: the same number"),
        (TRUE[:0], TRUE[:0], "a has 0 items and b has 0; valid: the same number, at least 1"),
    ],
)
def test_invalid_answers(function: Any, a: Any, b: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 0.0}, "confidence is 0.0; valid: a number between 0 and 1"),
        ({"confidence": 95}, "confidence is 95; valid"),
        ({"resamples": 0}, "resamples is 0; valid: an integer of at least 1"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(TRUE, TRUE, **options)


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "n is 0; valid: an integer of at least 1"),
        (-1, 5, 0.95, "successes is -1; valid: 0 to n = 5"),
        (6, 5, 0.95, "successes is 6; valid: 0 to n = 5"),
        (3, 5, 1.0, "confidence is 1.0; valid: a number between 0 and 1"),
    ],
)
def test_invalid_proportions(successes: int, n: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, n, confidence=confidence)
