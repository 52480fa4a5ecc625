"""Token weights of calibration states, as a recipe's `token_weights` has them."""

import torch
from torch import Tensor

from dllmquant.core.cgq import token_weights
from dllmquant.core.frontier import frontier_weights
from dllmquant.decoding import StateBatch
from dllmquant.settings import TokenWeightSettings


def weigh_tokens(batch: StateBatch, weighting: TokenWeightSettings, tail: Tensor | None = None) -> Tensor:
    """Returns float32 [states, length], at least 0 and exactly 0 on padding.

    Kinds that depend on more than the states ("interaction": on each block's attention) start from weights of 1.

    Args:
        batch: The states.
        weighting: How tokens are weighted.
        tail: bool [states, length], positions behind the end of the text; "cgq_text" takes them for unmasked ones.
    """
    if weighting.kind in ("cgq", "cgq_text"):
        masked = batch.mask & ~tail if weighting.kind == "cgq_text" and tail is not None else batch.mask
        weights = token_weights(
            masked,
            batch.confidence,
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
