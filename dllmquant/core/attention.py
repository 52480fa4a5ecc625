"""Grids of quantized attention, O = Ã V̂, and the error they leave in O.

Softmax probabilities lie on an unsigned grid that ends at s, values on an asymmetric one whose scale many tokens share:

    uniform   Ã = code · s / (2**b − 1),   code = min(round(A / s · (2**b − 1)), 2**b − 1)
    log2      Ã = s · 2**−code,            code = 0 ... 2**b − 2;   code 2**b − 1 is zero
    log_sqrt2 Ã = s · 2**(−code / 2),      likewise
    values    V̂ = (code − zero) · scale,   code = clamp(round(V / scale) + zero, 0, 2**b − 1)

Everything is computed in float32, or float64 if given.
"""

from typing import Literal

import torch
from torch import Tensor

ProbsGrid = Literal["uniform", "log2", "log_sqrt2"]
PROBS_GRIDS: tuple[ProbsGrid, ...] = ("uniform", "log2", "log_sqrt2")


def quantize_probabilities(probabilities: Tensor, upper: Tensor, bits: int, grid: ProbsGrid) -> Tensor:
    """Rounds probabilities to the nearest point of their grid; what exceeds its upper end becomes the upper end.

    Nearest is meant in value also on the logarithmic grids, where rounding the logarithm would be farther off.

    Args:
        probabilities: A in [0, 1], float, any shape.
        upper: s > 0, broadcastable to it.
        bits: b.
        grid: "uniform", "log2" or "log_sqrt2".

    Returns:
        Ã, of the shape of A, float32 or wider. Exact zeros (masked keys) stay zero on every grid.

    Raises:
        ValueError: The grid is unknown.
    """
    if grid not in PROBS_GRIDS:
        raise ValueError(f"grid: {grid!r} is unknown; valid: {', '.join(PROBS_GRIDS)}")
    p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    upper = upper.to(p)
    top = (1 << bits) - 1
    if grid == "uniform":
        return (p / upper).mul_(top).round_().clamp_(max=top).mul_(upper / top)
    octaves = 1.0 if grid == "log2" else 0.5  # per code
    first_middle = (1 + 2.0**-octaves) / 2  # of the levels 1 and 2**−octaves; the others are powers times it
    code: Tensor = (first_middle * upper / p).log2_().div_(octaves).ceil_().clamp_(0, top - 1)
    zero = p <= 0.5 * 2.0 ** (-octaves * (top - 1)) * upper
    return code.mul_(-octaves).exp2_().mul_(upper).masked_fill_(zero, 0.0)


def value_grid(low: Tensor, high: Tensor, bits: int, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the scale α·(high − low) / (2**b − 1) and the zero point of values between `low` and `high`.

    The range shrinks about its middle. Zero points are integers, whatever their size, so v = 0 keeps an exact code when
    it lies in the range. A range of one point gets a scale fine enough to represent it to 2**−20.

    Args:
        low: Finite, any shape.
        high: At least `low`, of the same shape.
        bits: b.
        alpha: α in (0, 1].

    Returns:
        scale and zero, float32 of that shape.

    Raises:
        ValueError: A range is empty or not finite, or α is outside (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: {alpha}; valid: in (0, 1]")
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise ValueError("low, high: a range is empty or not finite; was every token padding?")
    low, high = low.float(), high.float()
    top = (1 << bits) - 1
    smallest = (torch.maximum(low.abs(), high.abs()) * 2.0**-20).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.maximum((high - low) * (alpha / top), smallest)
    return scale, torch.round(top / 2 - (low + high) / 2 / scale)


def quantize_values(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Rounds values, any shape, to the grid of `scale` and `zero`, broadcastable to them; float32 or wider."""
    v = values.to(torch.promote_types(values.dtype, torch.float32))
    scale, zero = scale.to(v), zero.to(v)
    return ((torch.round(v / scale) + zero).clamp(0, (1 << bits) - 1) - zero) * scale


def output_error(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns Σ_i w_i (L R)_ic², float64 [n, channels]: the error of an attention output when L or R is a difference.

    Args:
        left: Ã or Ã − A, float [n, q, k].
        right: V or V̂ − V, float [n, k, channels].
        weights: w ≥ 0, float [n, q]; None counts every query once.

    Raises:
        ValueError: The weights do not fit.
    """
    squared = (left @ right).square()
    if weights is not None:
        if weights.shape != left.shape[:-1]:
            raise ValueError(f"weights: shape {tuple(weights.shape)}, expected {tuple(left.shape[:-1])}")
        squared = squared * weights.to(squared)[..., None]
    return squared.sum(1, dtype=torch.float64)


def attention_gram(probabilities: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns G = Ãᵀ diag(w) Ã, float [n, k, k], of Ã [n, q, k] and w [n, q] (None: all 1).

    Tr(Rᵀ G R) is then the sum over channels of `output_error(Ã, R, w)`.
    """
    weighted = probabilities if weights is None else probabilities * weights.to(probabilities)[..., None]
    return probabilities.transpose(-1, -2) @ weighted
