import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmquant.decoding import transfer_counts, transfer_fractions


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 64))
def test_deals_tokens_round_robin(masked: list[int], steps: int) -> None:
    expected = [[0] * steps for _ in masked]
    for row, count in enumerate(masked):
        for token in range(count):  # one token at a time, first steps first
            expected[row][token % steps] += 1
    assert transfer_counts(torch.tensor(masked), steps).tolist() == expected


def test_worked_example_and_dtype() -> None:
    counts = transfer_counts(torch.tensor([11, 4, 0], dtype=torch.int32), 4)
    assert counts.tolist() == [[3, 3, 3, 2], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("counts", "steps", "message"),
    [
        (torch.tensor([3]), 0, r"steps is 0; valid"),
        (torch.tensor([3, -1]), 2, r"mask_counts has minimum -1; valid"),
        (torch.tensor([3.0]), 2, r"mask_counts has shape \(1,\) and dtype torch.float32"),
        (torch.tensor([True]), 2, r"mask_counts .* torch.bool"),
        (torch.tensor(3), 2, r"mask_counts has shape \(\)"),
    ],
)
def test_errors(counts: torch.Tensor, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transfer_counts(counts, steps)


@given(st.integers(1, 600), st.sampled_from([1e-3, 1e-5, 0.3]))
def test_fractions_are_what_is_unmasked_between_two_times(steps: int, eps: float) -> None:
    fractions = transfer_fractions(steps, eps)
    assert fractions.dtype == torch.float32
    assert fractions[-1] == 1
    times = [1 - i * (1 - eps) / steps for i in range(steps + 1)]
    expected = [1 - s / t for t, s in itertools.pairwise(times[:-1])]
    np.testing.assert_allclose(fractions[:-1].numpy(), expected, rtol=1e-3)  # 1 − s/t is a small difference of ones
    assert bool((fractions.diff() > 0).all())


def test_fractions_are_rounded_as_published() -> None:
    """At step 232 of 333, 304 of 768 tokens are left: 1 − s/t is 3/304 but for float32, which makes it two tokens."""
    times = torch.linspace(1, 1e-3, 334)
    published = int(torch.tensor(304.0) * (1 - times[233] / times[232]))
    assert int(304 * transfer_fractions(333, 1e-3)[232]) == published == 2


@pytest.mark.parametrize(
    ("steps", "eps", "message"),
    [
        (0, 1e-3, "steps is 0; valid: an integer of at least 1"),
        (4, 0.0, "eps is 0.0; valid: a number between 0 and 1"),
        (4, 1.0, "eps is 1.0; valid"),
        (4, float("nan"), "eps is nan; valid"),
    ],
)
def test_fraction_errors(steps: int, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transfer_fractions(steps, eps)
