import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from dllmquant.lab.statistics import (
    mcnemar_exact,
    paired_difference,
    paired_difference_clustered,
    recovered_share,
    wilson_interval,
)

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


# several runs


def runs(items: int, columns: int, share: float, spread: float, seed: int) -> Bools:
    """Answers of several runs: items differ in how hard they are, runs of one item agree more than by chance."""
    rng = np.random.default_rng(seed)
    hardness = np.clip(share + spread * rng.standard_normal((items, 1)), 0, 1)
    found: Bools = rng.random((items, columns)) < hardness
    return found


def flipped_by_enumeration(a: Bools, b: Bools) -> float:
    """Share of all sign patterns with a sum as far from 0 as the observed one, in exact fractions."""
    d = [Fraction(int(y.sum()), len(y)) - Fraction(int(x.sum()), len(x)) for x, y in zip(a, b, strict=True)]
    patterns = list(itertools.product((1, -1), repeat=len(d)))
    sums = [abs(sum((sign * each for sign, each in zip(signs, d, strict=True)), Fraction())) for signs in patterns]
    return sum(each >= abs(sum(d, Fraction())) for each in sums) / len(sums)


@pytest.mark.parametrize(("runs_a", "runs_b"), [(1, 1), (1, 3), (2, 3), (2, 4), (4, 4)])
def test_sign_flips_by_enumeration(runs_a: int, runs_b: int) -> None:
    for seed in range(5):
        a, b = runs(10, runs_a, 0.4, 0.3, seed), runs(10, runs_b, 0.7, 0.3, seed + 100)
        found = paired_difference_clustered(a, b, resamples=10)
        assert found.p_value == pytest.approx(flipped_by_enumeration(a, b), rel=1e-10)
        assert found.difference == pytest.approx(b.mean(axis=1).mean() - a.mean(axis=1).mean(), abs=1e-12)
        d = b.mean(axis=1) - a.mean(axis=1)
        assert (found.n, found.only_a, found.only_b) == (10, (d < -1e-9).sum(), (d > 1e-9).sum())


@given(outcomes)
def test_one_run_each_is_the_paired_difference(pairs: Bools) -> None:
    a, b = pairs
    found = paired_difference_clustered(a[:, None], b[:, None], resamples=300)
    assert found.p_value == pytest.approx(mcnemar_exact(a, b), rel=1e-9)
    alone = paired_difference(a, b, resamples=300)
    assert (found.n, found.only_a, found.only_b) == (alone.n, alone.only_a, alone.only_b)
    assert found.difference == pytest.approx(alone.difference)


def test_items_are_resampled_not_runs() -> None:
    a, b = runs(120, 2, 0.6, 0.4, seed=1), runs(120, 3, 0.75, 0.4, seed=2)
    rng = np.random.default_rng(3)
    index = rng.integers(120, size=(20_000, 120))
    means = b[index].mean(axis=(1, 2)) - a[index].mean(axis=(1, 2))
    found = paired_difference_clustered(a, b, resamples=20_000)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.005)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.005)


def test_a_run_that_is_repeated_tells_nothing_new() -> None:
    a, b = runs(80, 1, 0.6, 0.3, seed=1), runs(80, 1, 0.75, 0.3, seed=2)
    once = paired_difference_clustered(a, b)
    again = paired_difference_clustered(a, np.repeat(b, 3, axis=1))
    assert again.low == pytest.approx(once.low)
    assert again.high == pytest.approx(once.high)
    assert again.p_value == pytest.approx(once.p_value)
    assert (again.only_a, again.only_b) == (once.only_a, once.only_b)


def test_clustered_difference_is_antisymmetric_and_blind_to_order() -> None:
    a, b = runs(60, 2, 0.6, 0.3, seed=1), runs(60, 3, 0.7, 0.3, seed=2)
    one, other = paired_difference_clustered(a, b), paired_difference_clustered(b, a)
    assert one.difference == -other.difference
    assert one.p_value == other.p_value
    order = np.random.default_rng(4).permutation(60)
    assert paired_difference_clustered(a[order], b[order][:, ::-1]) == one


def test_clustered_interval_covers_the_truth() -> None:
    hits, trials = 0, 200
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        hardness = rng.random((150, 1))
        found = paired_difference_clustered(
            rng.random((150, 3)) < 0.6 * hardness, rng.random((150, 3)) < 0.6 * hardness + 0.2, resamples=300
        )
        hits += found.low <= 0.2 <= found.high
    assert stats.binomtest(hits, trials, 0.95).pvalue > 0.001


# the recovered share


def test_recovered_share_agrees_with_resampling_items() -> None:
    full, least, most = (
        runs(300, n, share, 0.1, seed) for seed, (n, share) in enumerate([(1, 0.9), (1, 0.5), (3, 0.8)])
    )
    found = recovered_share(full, least, most, resamples=20_000)
    assert found is not None
    index = np.random.default_rng(3).integers(300, size=(20_000, 300))
    means = [each[index].mean(axis=(1, 2)) for each in (full, least, most)]
    shares = (means[2] - means[1]) / (means[0] - means[1])
    assert found.low == pytest.approx(np.quantile(shares, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(shares, 0.975), abs=0.02)
    assert found.share == pytest.approx((most.mean() - least.mean()) / (full.mean() - least.mean()))
    assert found.low < found.share < found.high
    assert found.n == 300


def test_recovered_share_of_the_ends() -> None:
    full, least = runs(100, 1, 0.9, 0.1, seed=1), runs(100, 1, 0.4, 0.1, seed=2)
    whole, nothing = (recovered_share(full, least, each) for each in (full, least))
    assert whole is not None
    assert nothing is not None
    assert (whole.share, whole.low, whole.high) == (1, 1, 1)
    assert (nothing.share, nothing.low, nothing.high) == (0, 0, 0)


def test_nothing_to_recover() -> None:
    full = np.ones((50, 1), dtype=np.bool_)
    slightly = full.copy()
    slightly[0] = False
    assert recovered_share(full, full, full) is None
    assert recovered_share(full, slightly, full) is None
    assert recovered_share(slightly, full, full) is None


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
    ("a", "b", "message"),
    [
        (TRUE, TRUE[:, None], r"a has shape \(2,\) and dtype bool; valid: a boolean array \[items, runs\]"),
        (TRUE[:, None], np.array([[1], [0]]), "b has shape .* dtype int64; valid: a boolean array"),
        (TRUE[:, None], np.zeros((2, 0), dtype=np.bool_), r"b has shape \(2, 0\)"),
        (TRUE[:, None], TRUE[:1, None], "items: a 2, b 1; valid: the same number"),
    ],
)
def test_invalid_runs(a: Any, b: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference_clustered(a, b)


@pytest.mark.parametrize(
    ("options", "message"), [({"confidence": 1}, "confidence is 1; valid"), ({"resamples": 0}, "resamples is 0; valid")]
)
def test_invalid_options_of_runs(options: dict[str, Any], message: str) -> None:
    for function, count in ((paired_difference_clustered, 2), (recovered_share, 3)):
        with pytest.raises(ValueError, match=message):
            function(*[TRUE[:, None]] * count, **options)


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
