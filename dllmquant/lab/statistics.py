"""Statistics of right and wrong answers: two models on the same items, and one model alone.

A model that is run more than once (calibration seeds, training seeds) answers every item more than once. Those answers
are not independent, so resampling and testing is by item, all runs of an item together.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, binomtest


@dataclass(frozen=True)
class PairedDifference:
    """How much better model b is than model a on the same items.

    Attributes:
        difference: Accuracy of b minus accuracy of a, in [-1, 1].
        low: Lower end of its confidence interval.
        high: Upper end of its confidence interval.
        p_value: Of McNemar's exact test that a and b are equally good.
        n: Number of items.
        only_a: Items that only a has right.
        only_b: Items that only b has right.
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    only_a: int
    only_b: int


@dataclass(frozen=True)
class RecoveredShare:
    """How much of what a baseline loses a better model keeps.

    Attributes:
        share: (model − baseline) / (reference − baseline), of accuracies: 1 loses nothing, 0 is no better.
        low: Lower end of its confidence interval.
        high: Upper end of it.
        n: Number of items.
    """

    share: float
    low: float
    high: float
    n: int


def mcnemar_exact(a: ArrayLike, b: ArrayLike) -> float:
    """Tests whether two models are equally good on the same items.

    Of the items that exactly one of them has right, either is expected to own half: an exact two-sided binomial test.

    Args:
        a: Whether each item is right, boolean [items].
        b: The same for the other model, items in the same order.

    Returns:
        The p-value; 1 when the models are right on the same items.

    Raises:
        ValueError: The arrays are not boolean, one-dimensional, of one length and non-empty.
    """
    a, b = _paired(a, b)
    return _mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compares the accuracies of two models on the same items.

    The interval is the percentile bootstrap over items. Resampling n paired items only matters through how many of
    them a alone and b alone have right, so a resample is drawn as one multinomial count, which has the same
    distribution. Where the models never disagree the interval has no width: the items then hold no information about
    the difference, not a proof that there is none.

    Args:
        a: Whether each item is right, boolean [items].
        b: The same for the other model, items in the same order.
        confidence: Coverage of the interval, in (0, 1).
        resamples: Bootstrap resamples, at least 1.
        seed: Seed of the resamples.

    Raises:
        ValueError: The arrays are not boolean, one-dimensional, of one length and non-empty, or `confidence` or
            `resamples` is out of range.
    """
    a, b = _paired(a, b)
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; valid: an integer of at least 1")
    n, only_a, only_b = a.size, int((a & ~b).sum()), int((b & ~a).sum())
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(
        difference=(only_b - only_a) / n,
        low=float(low),
        high=float(high),
        p_value=_mcnemar(only_a, only_b),
        n=n,
        only_a=only_a,
        only_b=only_b,
    )


def paired_difference_clustered(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compares the accuracies of two models that each answered the same items in one or more runs.

    Every item counts once, with d = its mean over the runs of b minus its mean over the runs of a. The interval is the
    percentile bootstrap over items (clusters), drawn as one multinomial count of the distinct values of d. The p-value
    is of the exact sign-flip test of Σ d: under the hypothesis that a and b are equally good, each item's d is as
    likely to have the other sign. With one run each this is McNemar's exact test; with unequal numbers of runs the
    signs are only asymptotically exchangeable.

    Args:
        a: Whether each item is right in each run, boolean [items, runs].
        b: The same for the other model, boolean [items, runs of b], items in the same order.
        confidence: Coverage of the interval, in (0, 1).
        resamples: Bootstrap resamples, at least 1.
        seed: Seed of the resamples.

    Returns:
        The difference; `n`, `only_a` and `only_b` count items: all, those with d < 0, and those with d > 0.

    Raises:
        ValueError: The arrays are not boolean, two-dimensional, of as many items and non-empty, or `confidence` or
            `resamples` is out of range.
    """
    a, b = _runs({"a": a, "b": b}, confidence, resamples)
    runs = math.lcm(a.shape[1], b.shape[1])
    # In integers, so that equal differences are equal.
    scaled = b.sum(axis=1) * (runs // b.shape[1]) - a.sum(axis=1) * (runs // a.shape[1])
    n = scaled.size
    values, counts = np.unique(scaled, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ values / (n * runs)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(
        difference=float(scaled.sum() / (n * runs)),
        low=float(low),
        high=float(high),
        p_value=_sign_flip(scaled),
        n=n,
        only_a=int((scaled < 0).sum()),
        only_b=int((scaled > 0).sum()),
    )


def recovered_share(
    reference: ArrayLike,
    baseline: ArrayLike,
    model: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> RecoveredShare | None:
    """Measures how much of a baseline's loss a model recovers, on the same items.

    The interval is the percentile bootstrap over items, the three models' answers to an item together. Resamples in
    which the baseline loses nothing have no ratio and are left out: at most (1 − confidence) / 2 of them, see below.

    Args:
        reference: Whether each item is right in each run of the original, boolean [items, runs].
        baseline: The same for the baseline, boolean [items, its runs].
        model: The same for the model, boolean [items, its runs].
        confidence: Coverage of the interval, in (0, 1).
        resamples: Bootstrap resamples, at least 1.
        seed: Seed of the resamples.

    Returns:
        The share; None when the interval of the baseline's loss reaches 0: there may be nothing to recover.

    Raises:
        ValueError: As `paired_difference_clustered`.
    """
    arrays = _runs({"reference": reference, "baseline": baseline, "model": model}, confidence, resamples)
    means = np.stack([array.mean(axis=1) for array in arrays], axis=1)
    n = len(means)
    values, counts = np.unique(means, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ values / n
    loss = drawn[:, 0] - drawn[:, 1]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    if np.quantile(loss, tails[0]) <= 0:
        return None
    low, high = np.quantile(((drawn[:, 2] - drawn[:, 1])[loss > 0]) / loss[loss > 0], tails)
    full, least, most = means.mean(axis=0)
    return RecoveredShare(float((most - least) / (full - least)), float(low), float(high), n)


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion.

    Args:
        successes: Items that are right, from 0 to `n`.
        n: Number of items, at least 1.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: An argument is out of range.
    """
    if n < 1:
        raise ValueError(f"n is {n}; valid: an integer of at least 1")
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}; valid: 0 to n = {n}")
    _check_confidence(confidence)
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _mcnemar(only_a: int, only_b: int) -> float:
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _sign_flip(scaled: NDArray[np.int64]) -> float:
    """Probability that Σ ± scaled, each sign a fair coin, is at least as far from 0 as Σ scaled."""
    sizes, counts = np.unique(np.abs(scaled[scaled != 0]), return_counts=True)
    if not sizes.size:
        return 1.0
    unit = math.gcd(*sizes.tolist())
    sizes = sizes // unit
    # Of the items of one size, a binomial number has the sign +; the law of the sum of sizes with the sign +.
    law = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        positive = np.zeros(size * count + 1)
        positive[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        law = np.convolve(law, positive)
    total = int((sizes * counts).sum())
    sums = 2 * np.arange(law.size) - total
    return min(1.0, float(law[np.abs(sums) >= abs(int(scaled.sum())) // unit].sum()))


def _runs(arrays: dict[str, ArrayLike], confidence: float, resamples: int) -> list[NDArray[np.bool_]]:
    checked = {name: np.asarray(values) for name, values in arrays.items()}
    for name, values in checked.items():
        if values.dtype != np.bool_ or values.ndim != 2 or not values.size:
            raise ValueError(
                f"{name} has shape {values.shape} and dtype {values.dtype}; valid: a boolean array [items, runs]"
            )
    if len({len(values) for values in checked.values()}) > 1:
        sizes = ", ".join(f"{name} {len(values)}" for name, values in checked.items())
        raise ValueError(f"items: {sizes}; valid: the same number")
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; valid: an integer of at least 1")
    return list(checked.values())


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a, b = np.asarray(a), np.asarray(b)
    for name, values in (("a", a), ("b", b)):
        if values.dtype != np.bool_ or values.ndim != 1:
            raise ValueError(
                f"{name} has shape {values.shape} and dtype {values.dtype}; valid: a one-dimensional boolean array"
            )
    if a.size != b.size or not a.size:
        raise ValueError(f"a has {a.size} items and b has {b.size}; valid: the same number, at least 1")
    return a, b


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; valid: a number between 0 and 1")
