"""SmoothQuant (arXiv 2211.10438, eq. 4): moving the difficulty of large activation channels into the weights.

s_i = max|x_i|^α / max|W_:i|^(1−α). The input becomes x / s and the weight W diag(s) (`fold.apply_scales`), so at
α = 0.5 both sides have the same largest magnitude in every channel, the geometric mean of what they had.

Choices where the paper is silent:
    1. The maximum of |W| runs over all layers that share the input, since they share s.
    2. A channel whose activations or weights are all zero keeps s = 1: there is nothing to move.
    3. Other maxima count as at least 1e-4 of the largest channel's, so that a channel the calibration hardly used
       cannot get a scale that overflows. (The paper's code clamps at 1e-5, which depends on the activations' unit.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dllmquant.transforms.fold import at_least


def smooth_scales(absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """Returns the channel scales s of one input.

    Args:
        absmax: Float [in]: the largest |x| of each channel over the calibration tokens.
        weights: The weights [out, in] of all layers that read the input.
        alpha: How much of the difficulty moves: 0 equalises the weights, 1 the activations.

    Returns:
        float64 [in], positive.

    Raises:
        ValueError: `alpha` is outside [0, 1], a shape does not fit, or an input is negative or not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha}; valid: 0 to 1")
    if absmax.ndim != 1 or not bool((torch.isfinite(absmax) & (absmax >= 0)).all()):
        raise ValueError(f"absmax: shape {tuple(absmax.shape)}; valid: one finite number per channel, none negative")
    if not weights or any(weight.ndim != 2 or weight.shape[1] != len(absmax) for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights: shapes {shapes}; valid: at least one, each [out, {len(absmax)}]")
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).double()
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weights: one holds NaN or infinity")
    x = absmax.double()
    alive = (x > 0) & (largest > 0)
    return torch.where(alive, at_least(x) ** alpha / at_least(largest) ** (1 - alpha), 1.0)
