"""The softmax quantizer that the published IA-AQ leaves untreated, chosen on the objective of its value scales.

The grid's kind and what it spans minimise the error of the attention output,

    L = Σ_states Σ_i w_i ‖((Q(A) − A) V)_i‖².

A bidirectional denoiser spreads attention over all tokens: on a grid from 0 to 1, few probabilities of a long sequence
reach the first step of 4 bits. Two remedies are searched, apart or together: a grid that ends at s < 1 ("fixed", one s
per head, for all states the same), or at every row's own largest probability ("row"), which is 1 in what flash
attention kernels hold, exp(scores − row's maximum), and so costs nothing there. Choices:
    1. V is not quantized here. Q(A) V̂ − A V = (Q(A) − A) V + Q(A) (V̂ − V): this file treats the first term, the
       value scales the second one, and the product of both is left out.
    2. s ∈ {1, 2**−½, 2**−1 ... 2**−8}; the largest wins ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllmquant.core.attention import PROBS_GRIDS, ProbsGrid, output_error, quantize_probabilities

ProbsRange = Literal["fixed", "row"]
PROBS_RANGES: tuple[ProbsRange, ...] = ("fixed", "row")

UPPER_ENDS = tuple(2.0 ** (-step / 2) for step in range(17))


@dataclass(frozen=True, eq=False)
class SoftmaxScales:
    """The best softmax quantizer of one kind.

    Attributes:
        grid: Its kind.
        range: What it spans.
        upper: float32 [heads], the upper ends; of "row" the factors of the row's largest probability, which are 1.
        error: float64 [heads], L there.
        full_range_error: float64 [heads], L of the grid of this kind from 0 to 1; never below `error` if "fixed".
    """

    grid: ProbsGrid
    range: ProbsRange
    upper: Tensor
    error: Tensor
    full_range_error: Tensor


class SoftmaxSearch:
    """Accumulates L for every head, kind of grid, and candidate s or row's own.

    Attributes:
        table: float64 [grids, candidates + 1, heads], L so far; grids as in `PROBS_GRIDS`, the last candidate being
            each row's largest probability.
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
        self.table = torch.zeros(len(PROBS_GRIDS), len(ends) + 1, heads, dtype=torch.float64, device=device)

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
        ends = (*self.ends, row_ends(probabilities))
        for row, grid in enumerate(PROBS_GRIDS):
            for column, end in enumerate(ends):
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

    def result(self, grid: ProbsGrid, range_: ProbsRange = "fixed") -> SoftmaxScales:
        """Returns the best quantizer of one kind."""
        table = self.table[PROBS_GRIDS.index(grid)]
        if range_ == "row":
            return SoftmaxScales(grid, "row", torch.ones_like(table[-1]).float(), table[-1].clone(), table[0].clone())
        best = table[:-1].argmin(0)
        return SoftmaxScales(grid, "fixed", self.ends[best], table.gather(0, best[None])[0], table[0].clone())


def row_ends(probabilities: Tensor) -> Tensor:
    """Returns each row's largest probability, [..., q, 1], positive, of probabilities [..., q, k]."""
    return probabilities.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
