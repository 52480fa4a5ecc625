"""The softmax quantizer that the published IA-AQ leaves untreated, chosen on the objective of its value scales.

Per head, the upper end s of the grid and (reported apart) its kind minimise the error of the attention output,

    L(s) = Σ_states Σ_i w_i ‖((Q_s(A) − A) V)_i‖².

A bidirectional denoiser spreads attention over all tokens: with s = 1, few probabilities of a long sequence reach the
first step of a 4-bit uniform grid. Choices:
    1. V is not quantized here. Q(A) V̂ − A V = (Q(A) − A) V + Q(A) (V̂ − V): this file treats the first term, the
       value scales the second one, and the product of both is left out.
    2. s ∈ {1, 2**−½, 2**−1 ... 2**−8}, for every state the same; the largest wins ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllmquant.core.attention import PROBS_GRIDS, ProbsGrid, output_error, quantize_probabilities

UPPER_ENDS = tuple(2.0 ** (-step / 2) for step in range(17))


@dataclass(frozen=True, eq=False)
class SoftmaxScales:
    """The best softmax quantizer of one kind.

    Attributes:
        grid: Its kind.
        upper: float32 [heads], the upper ends.
        error: float64 [heads], L there.
        full_range_error: float64 [heads], L at s = 1; never below `error`.
    """

    grid: ProbsGrid
    upper: Tensor
    error: Tensor
    full_range_error: Tensor


class SoftmaxSearch:
    """Accumulates L for every head, kind of grid and candidate s.

    Attributes:
        table: float64 [grids, candidates, heads], L so far; grids as in `PROBS_GRIDS`.
    """

    def __init__(
        self, heads: int, bits: int, ends: Sequence[float] = UPPER_ENDS, device: torch.device | str | None = None
    ) -> None:
        """Starts with zero error.

        Args:
            heads: Query heads.
            bits: Bits per probability.
            ends: Candidates for s, 1 first.
            device: Where the table lives.

        Raises:
            ValueError: The candidates do not start with 1 or are not positive.
        """
        if not ends or ends[0] != 1 or min(ends) <= 0:
            raise ValueError(f"ends: {tuple(ends)}; valid: positive numbers, the first of them 1")
        self.bits = bits
        self.ends = torch.tensor(ends, dtype=torch.float32, device=device)  # as they are stored, before any rounding
        self.table = torch.zeros(len(PROBS_GRIDS), len(ends), heads, dtype=torch.float64, device=device)

    def add(self, probabilities: Tensor, values: Tensor, heads: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows, one per sequence and query head.

        Args:
            probabilities: A, float [n, q, k].
            values: V of each row's value head, float [n, k, channels].
            heads: int64 [n], the query head of each row.
            weights: w ≥ 0, float [n, q]; None counts every query once.

        Raises:
            ValueError: The weights do not fit.
        """
        for row, grid in enumerate(PROBS_GRIDS):
            for column, end in enumerate(self.ends):
                delta = quantize_probabilities(probabilities, end, self.bits, grid) - probabilities
                self.table[row, column].index_add_(0, heads, output_error(delta, values, weights).sum(1))

    def merge(self, other: "SoftmaxSearch") -> None:
        """Adds another search's errors to this one's.

        Raises:
            ValueError: The other one searches other heads, bits or candidates.
        """
        same = self.bits == other.bits and self.table.shape == other.table.shape
        if not same or not torch.equal(self.ends, other.ends.to(self.ends)):
            raise ValueError("other: it searches other grids; valid: the same heads, bits and ends")
        self.table += other.table.to(self.table)

    def result(self, grid: ProbsGrid) -> SoftmaxScales:
        """Returns the best quantizer of one kind."""
        table = self.table[PROBS_GRIDS.index(grid)]
        best = table.argmin(0)
        return SoftmaxScales(grid, self.ends[best], table.gather(0, best[None])[0], table[0].clone())
