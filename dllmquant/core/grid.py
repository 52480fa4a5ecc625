"""Integer grids of weights: fitting scales, rounding onto them, and the value type that carries the result."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Clip = Literal["none", "mse"]

VALID_BITS = (2, 3, 4, 8)
_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16; a higher floor would coarsen the grids of small weights
# Shrink ratios tried by the "mse" clip; the full range is always among them.
_SHRINK = tuple(1.0 - 0.025 * step for step in range(29))


@dataclass(frozen=True)
class Grid:
    """The integer grid of a weight [out, in].

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Consecutive input channels that share a scale and zero point; None means the whole row.
        symmetric: Whether the zero point is fixed at the middle code, 2**(bits-1).

    Raises:
        ValueError: `bits` or `group_size` is not valid.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in VALID_BITS:
            raise ValueError(f"bits: {self.bits!r} is not supported; valid: {', '.join(map(str, VALID_BITS))}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size!r}; valid: a positive integer or None")

    @property
    def levels(self) -> int:
        """Number of codes, 2**bits."""
        return 1 << self.bits

    def width(self, in_features: int) -> int:
        """Returns the input channels per group.

        Raises:
            ValueError: The group size does not divide `in_features`.
        """
        size = in_features if self.group_size is None else self.group_size
        if in_features % size:
            raise ValueError(f"group_size: {size} does not divide the {in_features} input channels")
        return size

    def num_groups(self, in_features: int) -> int:
        """Returns the groups per row; see `width`."""
        return in_features // self.width(in_features)

    def of_group(self, group: int) -> "Grid":
        """Returns the grid of one group's columns: the group is then the whole row."""
        return Grid(self.bits, None, self.symmetric)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight on its grid: W ≈ (codes − zero) · scale.

    Attributes:
        grid: The grid.
        codes: uint8 [out, in], each below 2**bits.
        scale: float16 [out, groups], positive.
        zero: uint8 [out, groups], below 2**bits; 2**(bits-1) everywhere on symmetric grids.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight [out, in], computed in float32 (float64 if asked for) and cast to `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grouped = rearrange(self.codes, "out (g i) -> out g i", g=self.scale.shape[1])
        values = (grouped.to(wide) - self.zero[..., None].to(wide)) * self.scale[..., None].to(wide)
        return values.flatten(1).to(dtype)


def fit_scale(
    weight: Tensor, grid: Grid, *, clip: Clip = "none", importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fits one scale and zero point per row and group.

    Scales are rounded to float16, the type they are stored in, before anything is rounded with them. Without clipping
    a symmetric grid takes scale = 2·absmax / (2**bits − 1); an asymmetric one spans [min(w, 0), max(w, 0)].

    Args:
        weight: Float [out, in].
        grid: The grid.
        clip: "mse" tries shrunken ranges and keeps, per row and group, the one with the least
            Σ_i importance_i (w_i − q(w_i))²; the full range is among them, so it is never worse.
        importance: Float [in], non-negative; None counts every channel once.

    Returns:
        scale, float16 [out, groups], and zero, uint8 [out, groups].

    Raises:
        ValueError: The weight is not a finite matrix, the group size does not divide it, `importance` does not fit it
            or is negative or not finite, or a scale exceeds float16.
    """
    if weight.ndim != 2 or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weight: expected a matrix of finite numbers, got shape {tuple(weight.shape)}")
    if clip not in ("none", "mse"):
        raise ValueError(f"clip: {clip!r} is unknown; valid: none, mse")
    width = grid.width(weight.shape[1])
    groups = rearrange(_widen(weight), "out (g i) -> out g i", i=width)
    if grid.symmetric:
        high = groups.abs().amax(-1)
        low = -high
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best_scale, best_zero = _range_to_scale(low, high, grid)
    if clip == "none":
        return best_scale, best_zero
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    if importance.shape != weight.shape[1:] or not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError(
            f"importance: shape {tuple(importance.shape)}; valid: {weight.shape[1]} finite numbers, none negative"
        )
    importance = rearrange(importance.to(groups), "(g i) -> g i", i=width)
    best_error = _error(groups, best_scale, best_zero, grid, importance)
    for ratio in _SHRINK[1:]:
        scale, zero = _range_to_scale(low * ratio, high * ratio, grid)
        error = _error(groups, scale, zero, grid, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def quantize_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Rounds a weight [out, in] to the nearest codes, uint8 [out, in]; scale and zero are [out, groups]."""
    groups = rearrange(_widen(weight), "out (g i) -> out g i", g=scale.shape[1])
    return _round(groups, scale[..., None], zero[..., None], grid).to(torch.uint8).flatten(1)


def _widen(weight: Tensor) -> Tensor:
    """Returns the weight in at least float32; a narrower type would round the scales once more."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _range_to_scale(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    scale = ((high - low) / (grid.levels - 1)).clamp(min=_SMALLEST_SCALE).to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"weight: a scale exceeds float16 (largest weight {float(high.max()):g})")
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.levels // 2, dtype=torch.uint8)
    zero = torch.round(-low / scale.to(low)).clamp(0, grid.levels - 1)
    return scale, zero.to(torch.uint8)


def _round(values: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return (torch.round(values / scale.to(values)) + zero.to(values)).clamp(0, grid.levels - 1)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    codes = _round(groups, scale[..., None], zero[..., None], grid)
    restored = (codes - zero[..., None].to(groups)) * scale[..., None].to(groups)
    return ((groups - restored).square() * importance).sum(-1)
