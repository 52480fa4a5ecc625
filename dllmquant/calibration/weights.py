"""Token weights of calibration states, as a recipe's `token_weights` has them."""

import torch
from torch import Tensor

from dllmquant.core.cgq import token_weights
from dllmquant.core.frontier import frontier_weights
from dllmquant.decoding import StateBatch
from dllmquant.settings import TokenWeightSettings


def weigh_tokens(
    batch: StateBatch, weighting: TokenWeightSettings, tail: Tensor | None = None, waiting: Tensor | None = None
) -> Tensor:
    """Returns float32 [states, length], at least 0 and exactly 0 on padding.

    Kinds that depend on more than the states ("interaction": on each block's attention) start from weights of 1.

    Args:
        batch: The states.
        weighting: How tokens are weighted.
        tail: bool [states, length], positions behind the end of the text; "cgq_text" takes them for unmasked ones.
        waiting: bool [states, length], masked positions of later blocks, for `waiting_confidence: zero`.

    Raises:
        ValueError: The weighting needs `tail` or `waiting`, and it is None.
    """
    if weighting.kind in ("cgq", "cgq_text"):
        masked, confidence = batch.mask, batch.confidence
        if weighting.waiting_confidence == "zero":
            if waiting is None:
                raise ValueError(
                    "token_weights.waiting_confidence: 'zero', but nothing says which tokens of the states "
                    "wait; valid: 'model', or states that were recorded"
                )
            confidence = confidence.masked_fill(waiting, 0.0)
        if weighting.kind == "cgq_text":
            if tail is None:
                raise ValueError(
                    "token_weights.kind: 'cgq_text', but nothing says where the text of the states ends; "
                    "valid: 'cgq', or states that were recorded"
                )
            masked = masked & ~tail
        weights = token_weights(
            masked,
            confidence,
            masked_base=weighting.masked_base,
            unmasked_base=weighting.unmasked_base,
            decoded_confidence=weighting.decoded_confidence,
        )
    elif weighting.kind == "frontier":
        weights = frontier_weights(
            batch.mask,
            batch.committed,
            batch.confidence,
            context=weighting.context,
            frontier=weighting.frontier,
            reliability=weighting.reliability,
        )
    else:
        weights = torch.ones(batch.ids.shape)
    return weights * batch.attention_mask
