"""Routing held still while a model is compared with itself.

Rounding a weight once more sends tokens whose experts are nearly tied elsewhere, which moves logits far more than the
rounding does. What a transform preserves is seen when both runs send every token to the same experts. Each counts with
the weight its run gives it; one that the run would not have chosen, with the weight of what took its place.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dllmquant.models.experts import mixtures


@contextmanager
def recording_routes(model: nn.Module) -> Iterator[list[Tensor]]:
    """While the context lasts, collects the experts that tokens choose, int64 [T, k], call by call."""
    routes: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
        routes.append(args[1])

    with ExitStack() as stack:
        for layer in mixtures(model).values():
            stack.callback(layer.register_forward_pre_hook(record).remove)
        yield routes


@contextmanager
def holding_routes(model: nn.Module, routes: Sequence[Tensor]) -> Iterator[None]:
    """While the context lasts, sends tokens to the experts of the same calls as recorded."""
    remaining = iter(routes)

    def hold(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, own, weights = args
        held = next(remaining)
        size = (len(own), int(torch.maximum(own.max(), held.max())) + 1)
        by_expert = weights.new_zeros(size).scatter_(1, own, weights)
        known = torch.zeros(size, dtype=torch.bool, device=own.device).scatter_(1, own, True)
        return x, held, torch.where(known.gather(1, held), by_expert.gather(1, held), weights)

    with ExitStack() as stack:
        for layer in mixtures(model).values():
            stack.callback(layer.register_forward_pre_hook(hold).remove)
        yield
