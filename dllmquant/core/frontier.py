"""Frontier weights, after FAIR-Calib's prior (arXiv 2606.06547): the tokens whose next decision is at stake count more.

A denoising step turns into text only at the commit frontier, the masked positions that are committed at this very
step; an error there is frozen into every later state. Behind it stand the other masked positions, the more so the
surer the model already is of them. With f_j = 1 at the frontier, m_j = 1 where masked and confidence c_j

    w_j = w_context + w_frontier · f_j + w_reliability · m_j · c_j.

FAIR-Calib names the two ingredients, frontier hits and masked-stage reliability. Choices where we know no formula:
(1) reliability is the model's own probability of its candidate at this step; (2) the terms add, on top of a constant
for all tokens, without which the prompt and the decoded text, the keys and values of every decision, would not count;
(3) the defaults 0.25, 1, 0.5.
"""

import torch
from torch import Tensor


def frontier_weights(
    masked: Tensor,
    committed: Tensor,
    confidence: Tensor,
    *,
    context: float = 0.25,
    frontier: float = 1.0,
    reliability: float = 0.5,
) -> Tensor:
    """Returns w = context + frontier·f + reliability·m·c for every token.

    Args:
        masked: bool, any shape; True where the state holds the mask token.
        committed: bool of the same shape; True where this step replaces the mask token.
        confidence: Float of the same shape, in [0, 1]: the probability of the model's candidate.
        context: Weight every token has.
        frontier: Added to tokens that are about to be committed.
        reliability: Added to masked tokens, times their confidence.

    Returns:
        float32 weights of the same shape.

    Raises:
        ValueError: Shapes or dtypes differ from the above, a token is committed that is not masked, a confidence is
            outside [0, 1], a coefficient is negative, or all are zero.
    """
    for name, value in (("masked", masked), ("committed", committed)):
        if value.dtype != torch.bool:
            raise ValueError(f"{name}: dtype {value.dtype}, expected torch.bool")
    for name, value in (("committed", committed), ("confidence", confidence)):
        if value.shape != masked.shape:
            raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {tuple(masked.shape)}")
    if bool((committed & ~masked).any()):
        raise ValueError("committed: holds a token that is not masked; only masked tokens are committed")
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("confidence: valid values lie in [0, 1]")
    coefficients = (context, frontier, reliability)
    if min(coefficients) < 0 or max(coefficients) == 0:
        raise ValueError(f"context, frontier, reliability: {coefficients}; valid: not negative, not all zero")
    return context + frontier * committed.float() + reliability * masked.float() * confidence.float()
