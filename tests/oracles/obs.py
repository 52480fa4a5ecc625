"""Textbook OBS in float64 numpy: the reference of the GPTQ solver, sharing no code with it.

One column at a time: the explicit inverse of the damped Hessian of the columns not yet rounded, the rounding error
spread over all of them (Frantar et al., eq. 2: δ = −(w_q − ŵ_q)/[H⁻¹]_qq · [H⁻¹]_:,q), then the Schur downdate that
removes q from the inverse. No Cholesky factor, no blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RATIOS = [1 - 0.025 * step for step in range(29)]  # full range, then in steps of 2.5 % down to 0.3
SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Oracle:
    """Codes [out, in], scales and zero points [out, groups], the restored weight [out, in] and Tr(ΔW H ΔWᵀ)."""

    codes: NDArray[np.int64]
    scale: Array
    zero: Array
    restored: Array
    loss: float


def affine(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, float]:
    """Scale, rounded to float16, and zero point of a range."""
    top = 2**bits - 1
    scale = float(np.float16(max((high - low) / top, SMALLEST_SCALE)))
    return scale, float(2 ** (bits - 1)) if symmetric else float(min(max(np.rint(-low / scale), 0), top))


def snap(values: Array, scale: float, zero: float, bits: int) -> Array:
    """Nearest codes; halves go to the even one. One bit has the codes 0 and 2 about zero point 1."""
    if bits == 1:
        return np.where(np.abs(values + scale) < np.abs(values - scale), 0.0, 2.0)
    return np.minimum(np.maximum(np.rint(values / scale) + zero, 0), 2**bits - 1)


def fit(values: Array, bits: int, symmetric: bool, clip: str, importance: Array) -> tuple[float, float]:
    """Scale and zero point of one group; the "mse" clip tries every ratio and keeps the first of the best.

    One bit: the least squares solution of importance · (scale · sign(w) − w)², with "none" of equal importance.
    """
    if bits == 1:
        rooted = np.sqrt(importance if clip == "mse" and importance.any() else np.ones_like(values))
        signs = np.where(values < 0, -1.0, 1.0)
        level = np.linalg.lstsq((rooted * signs)[:, None], rooted * values, rcond=None)[0][0]
        return float(np.float16(max(level, 2.0**-24))), 1.0
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    best, best_error = (0.0, 0.0), np.inf
    for ratio in RATIOS if clip == "mse" else [1.0]:
        scale, zero = affine(low * ratio, high * ratio, bits, symmetric)
        restored = (snap(values, scale, zero, bits) - zero) * scale
        error = float((importance * (values - restored) ** 2).sum())
        if error < best_error:
            best, best_error = (scale, zero), error
    return best


def solve(
    weight: Array,
    hessian: Array,
    bits: int | Sequence[int],
    group_size: int | None,
    symmetric: bool,
    *,
    act_order: bool = False,
    clip: str = "none",
    damping: float = 0.01,
) -> Oracle:
    """Rounds a weight [out, in]. Dead columns (zero diagonal) must not occur here.

    `bits` is one width, or one per group. Groups are fitted to the original weights with `act_order`, else to the
    compensated ones when their first column is reached.
    """
    rows, columns = weight.shape
    width = group_size or columns
    widths = [bits] * (columns // width) if isinstance(bits, int) else bits
    diagonal = np.diag(hessian)
    w = weight.astype(np.float64).copy()
    codes = np.zeros((rows, columns), dtype=np.int64)
    scale = np.zeros((rows, columns // width))
    zero = np.zeros_like(scale)
    restored = np.zeros_like(w)

    def fit_group(group: int) -> None:
        part = slice(group * width, (group + 1) * width)
        for row in range(rows):
            scale[row, group], zero[row, group] = fit(w[row, part], widths[group], symmetric, clip, diagonal[part])

    remaining = sorted(range(columns), key=lambda q: -diagonal[q]) if act_order else list(range(columns))
    if act_order:
        for group in range(columns // width):
            fit_group(group)
    inverse = np.linalg.inv(hessian + damping * diagonal.mean() * np.eye(columns))
    while remaining:
        q, rest = remaining[0], remaining[1:]
        if not act_order and q % width == 0:
            fit_group(q // width)
        for row in range(rows):
            s, z = scale[row, q // width], zero[row, q // width]
            codes[row, q] = snap(w[row, q], s, z, widths[q // width])
            restored[row, q] = (codes[row, q] - z) * s
        error = (w[:, q] - restored[:, q]) / inverse[q, q]
        w[:, rest] -= np.outer(error, inverse[q, rest])
        inverse -= np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]  # row and column q become zero
        remaining = rest
    return Oracle(codes, scale, zero, restored, quadratic_loss(restored - weight, hessian))


def quadratic_loss(delta: Array, hessian: Array) -> float:
    """Σ_r Σ_i Σ_j Δ_ri H_ij Δ_rj, spelled out."""
    return float(sum(row @ hessian @ row for row in delta))
