import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmquant.decoding import transfer_counts


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
