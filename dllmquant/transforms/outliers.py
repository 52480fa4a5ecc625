"""Planted outliers: a stress test that makes a model hard to quantize without changing what it computes.

QDLM (arXiv 2508.14896) finds the activations of large diffusion LLMs to have outliers on many tokens: in fixed
channels of the residual stream, and at the input of the second feed-forward linear. Small models have milder ones.
This transform moves a gain g between a producer and its consumers: output channel c of the producer is multiplied by
g, input channel c of every consumer is divided by g. The products, and so the function, stay the same; the activation
in between is g times larger in that channel, on every token. With g a power of two even the rounding stays the same in
any floating type, short of overflow and underflow.
"""

import math

import torch
from torch import Tensor, nn

from dllmquant.models import ModelAdapter


@torch.no_grad()
def plant_outliers(
    model: nn.Module, adapter: ModelAdapter, *, channels: int = 1, gain: float = 8.0, seed: int = 0
) -> None:
    """Plants outlier channels in place, in every block and between every pair of the adapter's `scale_pairs`.

    Normalized residual channels are the same in all blocks, as they are in real models; other channels are drawn anew
    for each block.

    Args:
        model: The model.
        adapter: Its adapter.
        channels: Outlier channels per activation.
        gain: How much larger they become; a power of two.
        seed: Seed of the choice of channels.

    Raises:
        ValueError: The adapter names no `scale_pairs`, `gain` is not a power of two above 1, or there are fewer
            channels than asked for.
    """
    if not adapter.scale_pairs:
        raise ValueError(f"adapter {adapter.model_type!r}: scale_pairs is empty; outliers cannot be planted")
    if gain <= 1 or math.frexp(gain)[0] != 0.5:
        raise ValueError(f"gain: {gain}; valid: a power of two above 1, so that floating point stays exact")
    generator = torch.Generator().manual_seed(seed)
    residual: Tensor | None = None
    for block in adapter.block_list(model):
        for producer_name, consumer_names in adapter.pairs(block):
            producer = block.get_submodule(producer_name)
            width = producer.get_parameter("weight").shape[0]
            if not 1 <= channels <= width:
                raise ValueError(f"channels: {channels}; valid: 1 to {width}, the width of {producer_name}")
            if isinstance(producer, nn.Linear):
                chosen = torch.randperm(width, generator=generator)[:channels]
            else:
                residual = torch.randperm(width, generator=generator)[:channels] if residual is None else residual
                chosen = residual
            for parameter in producer.parameters(recurse=False):
                parameter[chosen] *= gain
            for consumer_name in consumer_names:
                block.get_submodule(consumer_name).get_parameter("weight")[:, chosen] /= gain
