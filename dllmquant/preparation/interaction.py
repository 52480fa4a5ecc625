"""The attention each token receives, block by block, and the token weights that follow from it."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.calibration import CalibrationStates
from dllmquant.capture import BlockCall, first_calls
from dllmquant.models import ModelAdapter
from dllmquant.nn.sdpa import capture_attention
from dllmquant.recipe import Recipe


@torch.no_grad()
def block_token_weights(
    model: PreTrainedModel, adapter: ModelAdapter, recipe: Recipe, states: CalibrationStates, *, measures: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Decides how much each token counts in each block.

    Args:
        model: The model.
        adapter: Its adapter.
        recipe: The recipe; with token weights "interaction" a token counts by the attention it receives in the block.
        states: The states.
        measures: Whether the interaction is wanted whatever the weights are.

    Returns:
        Per block the attention received (empty when nothing asks for it) and the token weights, [states, length].

    Raises:
        ValueError: The interaction is needed, but a block does not call scaled-dot-product attention.
    """
    blocks, interacts = adapter.block_list(model), recipe.token_weights.kind == "interaction"
    if not (interacts or measures):
        return [], [states.weights] * len(blocks)
    assert recipe.calibration is not None
    size, device = recipe.calibration.batch_size, model.device
    ids, keep = states.batch.ids.to(device), states.batch.attention_mask.to(device)
    calls = first_calls(model, blocks, adapter.denoiser(model), ids, keep, size)
    queries, real = states.weights.to(device).split(size), keep.split(size)
    received = []
    for block in blocks:
        parts = [attention_received(block, *part) for part in zip(calls, queries, real, strict=True)]
        received.append(torch.cat(parts).cpu())
        calls = [call.following(block) for call in calls]
    return received, received if interacts else [states.weights] * len(blocks)


def attention_received(block: nn.Module, call: BlockCall, weights: Tensor, real: Tensor) -> Tensor:
    """Returns the attention each token receives in a block, [batch, length], relative to its sequence's mean.

    Args:
        block: The block.
        call: How it is called.
        weights: Weights of the queries [batch, length]; 0 on padding.
        real: bool [batch, length], False on padding.

    Raises:
        ValueError: The block does not call scaled-dot-product attention exactly once.
    """
    return capture_attention(block, lambda: call.run(block)).interaction(weights, real).float()
