"""Integer grids of weights: fitting scales, rounding onto them, and the value type that carries the result.

A weight is (code − zero)·scale, in every group and at every width:

    bits    codes               zero point            levels
    1       0 and 2             1                     −scale, +scale; there is no zero
    2 ... 8 0 ... 2**bits − 1   2**(bits−1) if the grid is symmetric, else where the range has its zero
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Clip = Literal["none", "mse"]

VALID_BITS = (1, 2, 3, 4, 8)
_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16; a higher floor would coarsen the grids of small weights
# Shrink ratios tried by the "mse" clip; the full range is always among them.
_SHRINK = tuple(1.0 - 0.025 * step for step in range(29))


@dataclass(frozen=True)
class Grid:
    """The integer grid of a weight [out, in].

    Attributes:
        bits: 1, 2, 3, 4 or 8.
        group_size: Consecutive input channels that share a scale and zero point; None means the whole row.
        symmetric: Whether the zero point is fixed at the middle code, 2**(bits-1). One bit is always symmetric.
        group_bits: A width per column group, which then counts instead of `bits`; a grid like that is called mixed.

    Raises:
        ValueError: A width or `group_size` is not valid, or there are `group_bits` but no `group_size`.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    group_bits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in VALID_BITS:
            raise ValueError(f"bits: {self.bits!r} is not supported; valid: {', '.join(map(str, VALID_BITS))}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size!r}; valid: a positive integer or None")
        if self.group_bits is None:
            return
        if self.group_size is None:
            raise ValueError("group_bits: given without a group_size; valid: one width per group of group_size columns")
        object.__setattr__(self, "group_bits", tuple(self.group_bits))  # JSON has lists
        for bits in self.group_bits:
            if type(bits) is not int or bits not in VALID_BITS:
                raise ValueError(f"group_bits: {bits!r} is not supported; valid: {', '.join(map(str, VALID_BITS))}")

    @property
    def levels(self) -> int:
        """Number of levels of `bits`, 2**bits; on a mixed grid ask `of_group` for the grid of a group first."""
        return 1 << self.bits

    def width(self, in_features: int) -> int:
        """Returns the input channels per group.

        Raises:
            ValueError: The group size does not divide `in_features`, or `group_bits` has another number of groups.
        """
        size = in_features if self.group_size is None else self.group_size
        if in_features % size:
            raise ValueError(f"group_size: {size} does not divide the {in_features} input channels")
        if self.group_bits is not None and len(self.group_bits) * size != in_features:
            raise ValueError(f"group_bits: {len(self.group_bits)} widths; valid: {in_features // size}, one per group")
        return size

    def num_groups(self, in_features: int) -> int:
        """Returns the groups per row; see `width`."""
        return in_features // self.width(in_features)

    def of_group(self, group: int) -> "Grid":
        """Returns the grid of one group's columns: the group is then the whole row."""
        return Grid(self.bits if self.group_bits is None else self.group_bits[group], None, self.symmetric)

    def bits_of_groups(self, in_features: int) -> tuple[int, ...]:
        """Returns the width of every group; see `width`."""
        groups = self.num_groups(in_features)
        return (self.bits,) * groups if self.group_bits is None else self.group_bits

    def mean_bits(self, in_features: int) -> float:
        """Returns the bits per weight of the codes alone; scales and zero points come on top."""
        bits = self.bits_of_groups(in_features)
        return sum(bits) / len(bits)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight on its grid: W ≈ (codes − zero) · scale.

    Attributes:
        grid: The grid.
        codes: uint8 [out, in], each below 2**bits; in groups of one bit 0 or 2.
        scale: float16 [out, groups], positive.
        zero: uint8 [out, groups], below 2**bits; 2**(bits-1) everywhere on symmetric grids, and 1 in groups of one bit.
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
    a symmetric grid takes scale = 2·absmax / (2**bits − 1); an asymmetric one spans [min(w, 0), max(w, 0)]. One bit
    takes scale = mean|w|, the least squares solution: a level at absmax would throw every other weight too far out.

    Args:
        weight: Float [out, in].
        grid: The grid.
        clip: "mse" tries shrunken ranges and keeps, per row and group, the one with the least
            Σ_i importance_i (w_i − q(w_i))²; the full range is among them, so it is never worse. With one bit nothing
            needs trying, Σ importance_i |w_i| / Σ importance_i is the best scale.
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
    if importance is None or clip == "none":
        importance = torch.ones(weight.shape[1], device=weight.device)
    if importance.shape != weight.shape[1:] or not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError(
            f"importance: shape {tuple(importance.shape)}; valid: {weight.shape[1]} finite numbers, none negative"
        )
    groups = rearrange(_widen(weight), "out (g i) -> out g i", i=width)
    importance = rearrange(importance.to(groups), "(g i) -> g i", i=width)
    scale = torch.empty(groups.shape[:2], dtype=torch.float16, device=weight.device)
    zero = torch.empty_like(scale, dtype=torch.uint8)
    for part, members in _parts(grid):
        own, counted = groups[:, members], importance[members]
        fitted = _fit_sign(own, counted) if part.bits == 1 else _fit_range(own, part, clip, counted)
        scale[:, members], zero[:, members] = fitted
    return scale, zero


def quantize_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Rounds a weight [out, in] to the nearest codes, uint8 [out, in]; scale and zero are [out, groups]."""
    groups = rearrange(_widen(weight), "out (g i) -> out g i", g=scale.shape[1])
    codes = torch.empty_like(groups, dtype=torch.uint8)
    for part, members in _parts(grid):
        rounded = _round(groups[:, members], scale[:, members, None], zero[:, members, None], part)
        codes[:, members] = rounded.to(torch.uint8)
    return codes.flatten(1)


def _parts(grid: Grid) -> list[tuple[Grid, list[int] | slice]]:
    """Returns every width's grid and the groups that have it."""
    bits = grid.group_bits
    if bits is None:
        return [(grid, slice(None))]
    return [(Grid(b, None, grid.symmetric), [g for g, own in enumerate(bits) if own == b]) for b in sorted({*bits})]


def _widen(weight: Tensor) -> Tensor:
    """Returns the weight in at least float32; a narrower type would round the scales once more."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _fit_sign(groups: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Fits the two levels of one bit to groups [out, g, i]; importance [g, i]."""
    importance = torch.where(importance.sum(-1, keepdim=True) > 0, importance, 1.0)
    scale = _to_scale((groups.abs() * importance).sum(-1) / importance.sum(-1))
    return scale, torch.ones_like(scale, dtype=torch.uint8)


def _fit_range(groups: Tensor, grid: Grid, clip: Clip, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Fits groups [out, g, i] of two bits or more; importance [g, i]."""
    if grid.symmetric:
        high = groups.abs().amax(-1)
        low = -high
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best_scale, best_zero = _range_to_scale(low, high, grid)
    if clip == "none":
        return best_scale, best_zero
    best_error = _error(groups, best_scale, best_zero, grid, importance)
    for ratio in _SHRINK[1:]:
        scale, zero = _range_to_scale(low * ratio, high * ratio, grid)
        error = _error(groups, scale, zero, grid, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _range_to_scale(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    scale = _to_scale((high - low) / (grid.levels - 1))
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.levels // 2, dtype=torch.uint8)
    zero = torch.round(-low / scale.to(low)).clamp(0, grid.levels - 1)
    return scale, zero.to(torch.uint8)


def _to_scale(step: Tensor) -> Tensor:
    scale = step.clamp(min=_SMALLEST_SCALE).to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"weight: a scale exceeds float16 (largest step {float(step.max()):g})")
    return scale


def _round(values: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    if grid.bits == 1:
        return torch.where(values < 0, 0.0, 2.0)
    return (torch.round(values / scale.to(values)) + zero.to(values)).clamp(0, grid.levels - 1)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    codes = _round(groups, scale[..., None], zero[..., None], grid)
    restored = (codes - zero[..., None].to(groups)) * scale[..., None].to(groups)
    return ((groups - restored).square() * importance).sum(-1)
