"""What flows into a layer on the full-precision path: its second moments, its magnitudes, a sample of its tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dllmquant.capture import BlockCall, input_of
from dllmquant.core.stats import HessianAccumulator, InputMagnitudes, input_magnitudes


def second_moments(
    block: nn.Module, linear: nn.Linear, calls: Sequence[BlockCall], weights: Sequence[Tensor]
) -> Tensor:
    """Returns the weighted second moments of a layer's input over all calls, float32 [in, in]."""
    accumulator = HessianAccumulator(linear.in_features, device=linear.weight.device)
    for call, token_weights in zip(calls, weights, strict=True):
        accumulator.add(input_of(block, linear, call), token_weights)
    return accumulator.hessian()


def magnitudes(
    block: nn.Module, linear: nn.Linear, calls: Sequence[BlockCall], weights: Sequence[Tensor]
) -> InputMagnitudes:
    """Returns how large the channels of a layer's input are over all calls."""
    return input_magnitudes(
        (input_of(block, linear, call), token_weights) for call, token_weights in zip(calls, weights, strict=True)
    )


def sample_tokens(
    block: nn.Module, linear: nn.Module, calls: Sequence[BlockCall], weights: Sequence[Tensor], count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draws inputs of a layer among the tokens of positive weight: float32 [count, in], and their weights [count]."""
    generator = torch.Generator().manual_seed(seed)
    per_call = -(-count // len(calls))
    rows, drawn = [], []
    for call, token_weights in zip(calls, weights, strict=True):
        used = token_weights > 0
        x, w = input_of(block, linear, call)[used], token_weights[used]
        chosen = torch.randperm(len(x), generator=generator)[:per_call].to(x.device)
        rows.append(x[chosen])
        drawn.append(w[chosen])
    return torch.cat(rows)[:count].float(), torch.cat(drawn)[:count]
