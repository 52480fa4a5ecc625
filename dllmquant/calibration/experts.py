"""How many calibration tokens each expert of a mixture model reads."""

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.calibration.collect import CalibrationStates
from dllmquant.models import ModelAdapter
from dllmquant.models.experts import mixtures

ExpertTokens = dict[str, list[int]]
"""By full path of a mixture layer, the tokens of positive weight that were routed to each expert."""


@torch.no_grad()
def tokens_per_expert(
    model: PreTrainedModel, adapter: ModelAdapter, states: CalibrationStates, batch_size: int
) -> ExpertTokens:
    """Counts which experts the states' tokens are routed to.

    Args:
        model: The model as it is: the full-precision one, or a quantized one.
        adapter: Its adapter.
        states: The states; tokens of weight 0 (padding) do not count.
        batch_size: States per forward pass.

    Returns:
        The counts; empty for models without mixture layers.
    """
    layers = mixtures(model)
    if not layers:
        return {}
    totals = {name: torch.zeros(len(layer), dtype=torch.int64) for name, layer in layers.items()}
    counted = torch.zeros(0, dtype=torch.bool)
    latest: dict[str, Tensor] = {}

    def count(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        chosen: Tensor = args[1]
        used = chosen[counted.to(chosen.device)].flatten()
        latest[name] = torch.bincount(used, minlength=len(totals[name])).cpu()

    denoise = adapter.denoiser(model)
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(functools.partial(count, name)).remove)
        for start in range(0, len(states.batch), batch_size):
            rows = slice(start, start + batch_size)
            counted = states.weights[rows].flatten() > 0
            denoise(states.batch.ids[rows].to(model.device), states.batch.attention_mask[rows].to(model.device))
            for name, count_of_batch in latest.items():  # of the last pass, where the model makes several
                totals[name] += count_of_batch
    return {name: total.tolist() for name, total in totals.items()}


def starved(tokens: ExpertTokens, needed: int) -> int:
    """Returns how many experts read fewer than `needed` tokens."""
    return sum(count < needed for counts in tokens.values() for count in counts)


def experts_summary(tokens: ExpertTokens, needed: int) -> str:
    """Says in one sentence how many tokens experts read; for models that have experts."""
    counts = sorted(count for layer in tokens.values() for count in layer)
    said = (
        f"{len(counts)} experts in {len(tokens)} layers read {counts[0]:,} to {counts[-1]:,} calibration tokens each, "
        f"{counts[len(counts) // 2]:,} in the median"
    )
    hungry = starved(tokens, needed)
    return said + (f"; {hungry} read fewer than {needed}" if hungry else "")
