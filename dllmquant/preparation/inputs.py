"""What flows into a layer on the full-precision path: its second moments, its magnitudes, a sample of its tokens."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dllmquant.capture import BlockCall, inputs_of
from dllmquant.core.stats import HessianAccumulator, InputMagnitudes, input_magnitudes
from dllmquant.models.experts import is_expert


def second_moments(
    block: nn.Module, linear: nn.Linear, calls: Sequence[BlockCall], weights: Sequence[Tensor]
) -> Tensor | None:
    """Returns the weighted second moments of a layer's input over all calls, float32 [in, in].

    None if the layer is an expert's that no token was routed to.
    """
    accumulator = HessianAccumulator(linear.in_features, device=linear.weight.device)
    for call, token_weights in zip(calls, weights, strict=True):
        seen = inputs_of(block, [linear], call, token_weights)
        accumulator.add(seen.tokens[0], seen.weights[0])
    return None if accumulator.tokens == 0 and is_expert(block, linear) else accumulator.hessian()


def magnitudes(
    block: nn.Module, linear: nn.Module, calls: Sequence[BlockCall], weights: Sequence[Tensor]
) -> InputMagnitudes | None:
    """Returns how large the channels of a layer's input are over all calls.

    None if the layer is an expert's that no token was routed to.
    """
    seen = (inputs_of(block, [linear], call, w) for call, w in zip(calls, weights, strict=True))
    batches: Iterable[tuple[Tensor, Tensor]] = ((part.tokens[0], part.weights[0]) for part in seen)
    if is_expert(block, linear):
        batches = list(batches)  # few tokens, if any
        if not any(bool((own > 0).any()) for _, own in batches):
            return None
    return input_magnitudes(batches)


def sample_tokens(
    block: nn.Module, linear: nn.Module, calls: Sequence[BlockCall], weights: Sequence[Tensor], count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draws inputs of a layer among the tokens of positive weight: float32 [count, in], and their weights [count]."""
    generator = torch.Generator().manual_seed(seed)
    per_call = -(-count // len(calls))
    rows, drawn = [], []
    for call, token_weights in zip(calls, weights, strict=True):
        seen = inputs_of(block, [linear], call, token_weights)
        used = seen.weights[0] > 0
        x, w = seen.tokens[0][used], seen.weights[0][used]
        chosen = torch.randperm(len(x), generator=generator)[:per_call].to(x.device)
        rows.append(x[chosen])
        drawn.append(w[chosen])
    return torch.cat(rows)[:count].float(), torch.cat(drawn)[:count]
