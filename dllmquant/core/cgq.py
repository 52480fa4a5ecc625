"""CGQ, Certainty-Guided Quantization (DLLMQuant, arXiv 2508.14090): how much each calibration token counts.

The Hessian of GPTQ becomes H = Σ_j w_j x_j x_jᵀ with w_j = (m_j + √c_j)², where m_j is 1 for masked and 0.7 for
unmasked tokens and c_j is the model's confidence in the token it would commit at j. Since tokens only enter through
√w_j x_j, the same weights serve every solver and search.

Choice where the paper is silent: c_j of tokens that are not masked. The paper argues that confident masked tokens
dominate the next step; that holds only if decoded tokens count with c = 0 (the sampler sets theirs to −∞), the default
here. With the model's own probability ("model"), a decoded token at c = 1 weighs 2.89 and outweighs a masked one at
c = 0.3 (2.40).

A masked token of a later block is where a decoded one is in that argument: the next step cannot commit it, and samplers
set its confidence to −∞ too. It keeps the model's here; with `waiting_confidence: zero` in a recipe it has c = 0.
"""

from typing import Literal

import torch
from torch import Tensor


def token_weights(
    masked: Tensor,
    confidence: Tensor,
    *,
    masked_base: float = 1.0,
    unmasked_base: float = 0.7,
    decoded_confidence: Literal["zero", "model"] = "zero",
) -> Tensor:
    """Returns w = (m + √c)² for every token.

    Args:
        masked: bool, any shape; True where the state holds the mask token.
        confidence: Float of the same shape, in [0, 1]: the probability of the model's candidate.
        masked_base: m of masked tokens.
        unmasked_base: m of the others.
        decoded_confidence: c of tokens that are not masked: "zero", or "model" for their given confidence.

    Returns:
        float32 weights of the same shape.

    Raises:
        ValueError: Shapes differ, `masked` is not bool, a confidence is outside [0, 1], a base is negative, or
            `decoded_confidence` is unknown.
    """
    if masked.dtype != torch.bool:
        raise ValueError(f"masked: dtype {masked.dtype}, expected torch.bool")
    if masked.shape != confidence.shape:
        raise ValueError(f"confidence: shape {tuple(confidence.shape)}, expected {tuple(masked.shape)}")
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("confidence: valid values lie in [0, 1]")
    if masked_base < 0 or unmasked_base < 0:
        raise ValueError(f"masked_base, unmasked_base: {masked_base}, {unmasked_base}; valid: not negative")
    if decoded_confidence not in ("zero", "model"):
        raise ValueError(f"decoded_confidence: {decoded_confidence!r} is unknown; valid: zero, model")
    c = confidence.float()
    if decoded_confidence == "zero":
        c = torch.where(masked, c, 0.0)
    # Not where(masked, masked_base, unmasked_base): two scalars would be rounded to torch's default dtype first.
    m = torch.where(masked, torch.full_like(c, masked_base), torch.full_like(c, unmasked_base))
    return (m + c.sqrt()).square()
