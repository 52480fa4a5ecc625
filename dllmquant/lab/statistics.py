"""Statistics of right and wrong answers: two models on the same items, and one model alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest


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
