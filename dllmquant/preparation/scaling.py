"""Scales between producers and consumers of a block (SmoothQuant, AWQ, IA-AQ), found and folded into the weights."""

import functools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from dllmquant.capture import BlockCall, output_of
from dllmquant.core.iaaq import input_scales
from dllmquant.models import ModelAdapter
from dllmquant.models.experts import is_expert, mixtures
from dllmquant.nn.transform import InputTransform
from dllmquant.plan import Plan
from dllmquant.preparation.inputs import magnitudes, sample_tokens
from dllmquant.settings import AWQ, IAAQ, Hadamard, SmoothQuant
from dllmquant.transforms.awq import linear_objective, mean_magnitude, search_scales, sub_block_objective
from dllmquant.transforms.fold import apply_scales, linear_at
from dllmquant.transforms.smoothquant import smooth_scales

_SAMPLES = 512  # tokens on which AWQ's "layer" objective is measured


def scale_block(
    block: nn.Module,
    prefix: str,
    adapter: ModelAdapter,
    plan: Plan,
    calls: Sequence[BlockCall],
    weights: Sequence[Tensor],
    transform: SmoothQuant | AWQ | IAAQ,
    *,
    transforms: Mapping[str, InputTransform],
    search: tuple[Sequence[BlockCall], Sequence[Tensor]],
    seed: int,
) -> None:
    """Moves channel scales between producers and consumers of one block, in place.

    Args:
        block: The block.
        prefix: Its path in the model, with the dot.
        adapter: The model's adapter.
        plan: What is quantized; pairs whose consumers all stay in 16 bits are left alone, by IA-AQ also those whose
            consumers' input is not rotated.
        calls: How the block is called, one call per batch of states.
        weights: Per call, the token weights [batch, length]; for IA-AQ times the attention received.
        transform: The method.
        transforms: Transforms of inputs behind the scales that are known before, by the full path of a group's first
            layer: those that need no data. AWQ's objectives round what they give out.
        search: The calls and weights on which AWQ's "sub_block" objective is measured: fewer, since it is measured
            often.
        seed: Seed of the tokens on which AWQ's "layer" objective is measured.
    """
    quantized = _rotated(plan) if isinstance(transform, IAAQ) else set(plan.modules)
    for producer, consumers in _scale_pairs(block, adapter, transform):
        rounded = [consumer for consumer in consumers if prefix + consumer in quantized]
        if not rounded:
            continue
        linears = [linear_at(block, consumer) for consumer in consumers]
        reader = _reader(block, linears)
        expert = is_expert(block, reader)
        size = magnitudes(block, reader, calls, weights)
        if size is None:
            continue  # starved: it keeps its scales
        own = [linear_at(block, consumer).weight.detach() for consumer in rounded]
        if isinstance(transform, SmoothQuant):
            scales = smooth_scales(size.absmax, own, transform.alpha)
        elif isinstance(transform, IAAQ):
            scales = input_scales(size.mean_square, own)
        else:
            behind = _behind(plan, transforms, prefix + rounded[0])
            if transform.objective == "layer" or expert:
                x, token_weights = sample_tokens(block, reader, calls, weights, _SAMPLES, seed)
                matrices = [linear_at(block, consumer).weight.detach() for consumer in rounded]
                evaluate = linear_objective(matrices, x, token_weights, plan.grid, plan.activation, behind)
            else:
                end = block.get_submodule(_sub_block_end(adapter, block, rounded))
                run = functools.partial(_outputs, block, end, search[0])
                evaluate = sub_block_objective(block, rounded, run, search[1], plan.grid, plan.activation, behind)
            mean = mean_magnitude(own, plan.grid) if transform.duo_scaling else None
            points = transform.grid_points
            scales = search_scales(size.mean_abs, evaluate, grid_points=points, weight_mean=mean).scales
        apply_scales(block, producer, consumers, scales)


def _rotated(plan: Plan) -> set[str]:
    """Returns the layers whose input a Hadamard matrix rotates."""
    groups = (group for group in plan.groups if isinstance(plan.input_transforms.get(group[0]), Hadamard))
    return {name for group in groups for name in group}


def _behind(plan: Plan, transforms: Mapping[str, InputTransform], name: str) -> InputTransform | None:
    """Returns the transform of a layer's input, if it is known."""
    return next((transforms.get(group[0]) for group in plan.groups if name in group), None)


def _reader(block: nn.Module, linears: Sequence[nn.Module]) -> nn.Module:
    """Returns what reads all that the linear layers together read, of them or of the mixtures they are experts of."""
    for linear in linears:
        if not is_expert(block, linear):
            return linear
    for mixture in mixtures(block).values():
        inside = [{*expert.modules()} for expert in mixture]
        if sum(any(linear in modules for linear in linears) for modules in inside) > 1:
            return mixture
    return linears[0]


def _outputs(block: nn.Module, end: nn.Module, calls: Sequence[BlockCall]) -> Iterator[Tensor]:
    """Yields what a module gives out per call, [batch, length, out]; a mixture has its tokens in one row."""
    return (output_of(block, end, call).view(*call.hidden.shape[:2], -1) for call in calls)


def _sub_block_end(adapter: ModelAdapter, block: nn.Module, consumers: Sequence[str]) -> str:
    """Returns the module that writes the output of the sub-block (attention or feed-forward) the consumers are in.

    That is the layer that writes to the residual stream; where experts do, what adds them up.
    """
    order = [leaf for _, group in adapter.sites(block) for leaf in group]
    outputs = adapter.outputs(block)
    last = next(leaf for leaf in order[order.index(consumers[0]) :] if leaf in outputs)
    for path in mixtures(block):
        feed_forward = path.rpartition(".")[0] or path  # with what is added to the experts, such as shared ones
        if last.startswith(feed_forward + "."):
            return feed_forward
    return last


def _scale_pairs(
    block: nn.Module, adapter: ModelAdapter, transform: SmoothQuant | AWQ | IAAQ
) -> list[tuple[str, tuple[str, ...]]]:
    """Lists (producer, consumers) a method scales: SmoothQuant as published norms only, others linear ones as well."""
    if isinstance(transform, SmoothQuant) and transform.producers == "norms":
        return [pair for pair in adapter.pairs(block) if not isinstance(block.get_submodule(pair[0]), nn.Linear)]
    return adapter.scalable(block)
