"""Dynamic activation quantization: scales are taken from the tokens at hand, so nothing is calibrated or stored."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActivationScheme:
    """How a linear layer's input is quantized.

    Attributes:
        bits: 2 to 8.
        group_size: Consecutive channels of a token that share a scale; None means the whole token.
        symmetric: Whether codes are symmetric about zero (absmax scale) or span [min, max].
        group_bits: A width per group, 2 to 8 each, which then counts instead of `bits`; needs a group_size. Where a
            group is a head's channels, heads have widths of their own.
        full_range: Symmetric grids: whether the lowest code is used as well, so that there are 2**bits of them.

    Raises:
        ValueError: A field is out of range, there are `group_bits` but no `group_size`, or an asymmetric grid, whose
            range is always full, is asked for it.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    group_bits: tuple[int, ...] | None = None
    full_range: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits!r}; valid: 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size!r}; valid: a positive integer or None")
        if self.full_range and not self.symmetric:
            raise ValueError("full_range: True on an asymmetric grid, which has no other; valid: False")
        if self.group_bits is None:
            return
        if self.group_size is None:
            raise ValueError(
                "group_bits: given without a group_size; valid: one width per group of group_size channels"
            )
        object.__setattr__(self, "group_bits", tuple(self.group_bits))  # JSON has lists
        for bits in self.group_bits:
            if type(bits) is not int or not 2 <= bits <= 8:
                raise ValueError(f"group_bits: {bits!r}; valid: 2 to 8")

    def width(self, features: int) -> int:
        """Returns the channels per group.

        Raises:
            ValueError: The group size does not divide `features`, or `group_bits` has another number of groups.
        """
        size = features if self.group_size is None else self.group_size
        if features % size:
            raise ValueError(f"group_size: {size} does not divide the {features} features")
        if self.group_bits is not None and len(self.group_bits) * size != features:
            raise ValueError(f"group_bits: {len(self.group_bits)} widths; valid: {features // size}, one per group")
        return size


def quantize_activation(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Rounds every token to its integer grid and back.

    Symmetric: scale = absmax / (2**(bits−1) − 1), codes −(2**(bits−1) − 1) to 2**(bits−1) − 1; with the full range,
    scale = absmax / (2**(bits−1) − ½) and codes from −2**(bits−1). Asymmetric: the range [min(x, 0), max(x, 0)] in
    2**bits codes. Computed in float32 or wider.

    Args:
        x: Float [..., features].
        scheme: The scheme.

    Returns:
        The rounded tokens, of `x`'s shape and dtype; groups of zeros stay zero.

    Raises:
        ValueError: The group size does not divide the features, or `group_bits` has another number of groups.
    """
    size = scheme.width(x.shape[-1])
    wide = x.double() if x.dtype == torch.float64 else x.float()
    groups: Tensor = wide.unflatten(-1, (-1, size))
    tiny = torch.finfo(torch.float32).tiny
    top = _largest_code(scheme, groups)
    if scheme.symmetric:
        largest = groups.abs().amax(-1, keepdim=True)
        if scheme.full_range:
            scale = (largest / (top + 0.5)).clamp(min=tiny)
            codes = torch.round(groups / scale).clamp(max=top)
        else:
            scale = (largest / top).clamp(min=tiny)
            codes = torch.round(groups / scale)  # absmax / scale rounds to the largest code: nothing needs clamping
        return (codes * scale).flatten(-2).to(x.dtype)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp(min=tiny)
    zero = torch.round(-low / scale)
    codes = (torch.round(groups / scale) + zero).clamp(min=0).clamp(max=top)
    return ((codes - zero) * scale).flatten(-2).to(x.dtype)


def _largest_code(scheme: ActivationScheme, groups: Tensor) -> int | Tensor:
    """Returns the largest code, or that of every group, [groups, 1]."""
    sign = int(scheme.symmetric)
    if scheme.group_bits is None:
        return (1 << (scheme.bits - sign)) - 1
    codes = [(1 << (bits - sign)) - 1 for bits in scheme.group_bits]
    return torch.tensor(codes, dtype=groups.dtype, device=groups.device)[:, None]
