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

    Raises:
        ValueError: A field is out of range.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits!r}; valid: 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size!r}; valid: a positive integer or None")


def quantize_activation(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Rounds every token to its integer grid and back.

    Symmetric: scale = absmax / (2**(bits−1) − 1), codes −(2**(bits−1) − 1) to 2**(bits−1) − 1. Asymmetric: the range
    [min(x, 0), max(x, 0)] in 2**bits codes. Computed in float32 or wider.

    Args:
        x: Float [..., features].
        scheme: The scheme.

    Returns:
        The rounded tokens, of `x`'s shape and dtype; groups of zeros stay zero.

    Raises:
        ValueError: The group size does not divide the features.
    """
    size = x.shape[-1] if scheme.group_size is None else scheme.group_size
    if x.shape[-1] % size:
        raise ValueError(f"group_size: {size} does not divide the {x.shape[-1]} features")
    wide = x.double() if x.dtype == torch.float64 else x.float()
    groups: Tensor = wide.unflatten(-1, (-1, size))
    tiny = torch.finfo(torch.float32).tiny
    if scheme.symmetric:
        top = (1 << (scheme.bits - 1)) - 1
        scale = (groups.abs().amax(-1, keepdim=True) / top).clamp(min=tiny)
        codes = torch.round(groups / scale).clamp(-top, top)
        return (codes * scale).flatten(-2).to(x.dtype)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / ((1 << scheme.bits) - 1)).clamp(min=tiny)
    zero = torch.round(-low / scale)
    codes = (torch.round(groups / scale) + zero).clamp(0, (1 << scheme.bits) - 1)
    return ((codes - zero) * scale).flatten(-2).to(x.dtype)
