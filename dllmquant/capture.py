"""Capturing what flows into modules: hooks that live inside a `with`, and a run that stops where it has seen enough."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllmquant.models.experts import mixtures, routed_to
from dllmquant.models.inference import inference


class StopForward(Exception):
    """Ends a forward pass early; raised by a hook and caught by whoever installed it."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """How a model calls its transformer blocks: everything but the hidden states, which change from block to block.

    Attributes:
        hidden: Residual stream [batch, length, width] that enters the block, the first positional argument.
        args: Further positional arguments.
        kwargs: Keyword arguments, such as rotary tables and attention masks.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """Runs a block on this call and returns the residual stream that leaves it."""
        with inference(block, [block]):
            output = block(self.hidden, *self.args, **self.kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def following(self, block: nn.Module) -> "BlockCall":
        """Returns the call of the next block."""
        return BlockCall(self.run(block), self.args, self.kwargs)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What some layers of a block read during one call.

    Attributes:
        tokens: Per layer, its input [..., in]; [0, in] for an expert that no token chose.
        weights: Per layer, the weights of these tokens [...].
        chosen: By the path of each mixture layer of the block, the experts its tokens chose, int64 [T, k].
    """

    tokens: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    chosen: dict[str, Tensor]


def inputs_of(
    block: nn.Module,
    linears: Sequence[nn.Module],
    call: BlockCall,
    weights: Tensor,
    *,
    chosen: Mapping[str, Tensor] | None = None,
) -> LayerInputs:
    """Runs a block once, as far as needed, and returns what layers of it read.

    Token weights follow the tokens: an expert's are those of the tokens that chose it.

    Args:
        block: The block.
        linears: The layers, or mixture layers, which read all tokens; all in one run, so they should not depend on one
            another's weights.
        call: How the block is called.
        weights: Token weights [batch, length].
        chosen: By path of a mixture layer, the experts its tokens are sent to, whatever its router says; for the run
            of a full-precision block that must see the tokens its quantized twin sees.

    Raises:
        ValueError: The block ran to its end without calling a layer that is no expert, or a layer's input does not
            hold one row per token.
    """
    seen: dict[nn.Module, Tensor] = {}
    routes: dict[str, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[module] = args[0]
        if len(seen) == len(linears):
            raise StopForward

    def route(name: str, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, own, scores = args
        routes[name] = own if chosen is None else chosen[name]
        return x, routes[name], scores

    layers = mixtures(block)
    with ExitStack() as stack:
        for name, mixture in layers.items():
            handle = mixture.register_forward_pre_hook(functools.partial(route, name))
            stack.callback(handle.remove)
        for linear in linears:
            stack.callback(linear.register_forward_pre_hook(watch).remove)
        with suppress(StopForward):
            call.run(block)
    owners = {
        module: (name, index)
        for name, mixture in layers.items()
        for index, expert in enumerate(mixture)
        for module in expert.modules()
    }
    for idle in [linear for linear in linears if linear in owners and linear not in seen]:
        width = int(idle.in_features)  # type: ignore[arg-type] # nn.Linear or QuantLinear
        seen[idle] = call.hidden.new_zeros(0, width)  # no token chose the expert
    if any(linear not in seen for linear in linears):
        raise ValueError("a block ran without calling a layer its adapter lists; is the execution order right?")
    own_weights = []
    for linear in linears:
        rows = weights
        if linear in owners:
            name, index = owners[linear]
            rows = weights.flatten()[routed_to(routes[name], index).to(weights.device)]
        own_weights.append(_per_token(rows, seen[linear]))
    return LayerInputs(tuple(seen[linear] for linear in linears), tuple(own_weights), routes)


def _per_token(weights: Tensor, x: Tensor) -> Tensor:
    """Returns weights in the shape of the tokens [..., in] they belong to."""
    if x.shape[:-1].numel() != weights.numel():
        raise ValueError(
            f"a layer of a block reads {tuple(x.shape)} where {weights.numel()} tokens were given; valid: one row each"
        )
    return weights.reshape(x.shape[:-1])


def output_of(block: nn.Module, module: nn.Module, call: BlockCall) -> Tensor:
    """Runs a block as far as one of its modules and returns the module's output [..., out].

    Raises:
        ValueError: The block ran to its end without calling the module.
    """
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)
        raise StopForward

    handle = module.register_forward_hook(hook)
    try:
        call.run(block)
    except StopForward:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError("a block ran without calling a layer its adapter lists; is the execution order right?")


def first_calls(
    model: nn.Module,
    blocks: Sequence[nn.Module] | nn.ModuleList,
    denoise: Callable[[Tensor, Tensor], object],
    ids: Tensor,
    attention_mask: Tensor,
    batch_size: int,
) -> list[BlockCall]:
    """Runs the model up to its first block, batch by batch.

    Args:
        model: The model.
        blocks: Its transformer blocks.
        denoise: Runs the model on ids and attention mask.
        ids: int64 [states, length].
        attention_mask: bool [states, length].
        batch_size: States per call.

    Returns:
        One call per batch.
    """
    return [
        capture_block_call(
            model,
            blocks,
            functools.partial(denoise, ids[start : start + batch_size], attention_mask[start : start + batch_size]),
        )
        for start in range(0, len(ids), batch_size)
    ]


def capture_block_call(
    model: nn.Module, blocks: Sequence[nn.Module] | nn.ModuleList, run: Callable[[], object]
) -> BlockCall:
    """Runs the model up to its first block and returns how that block was called.

    A model may run its blocks to find out what enters them (self-conditioning). It gives them `preliminary=True` then;
    these calls go through.

    Args:
        model: The model.
        blocks: Its transformer blocks.
        run: Runs the model on one batch.

    Raises:
        ValueError: The run never reached the block, or called it without a positional tensor.
    """
    calls: list[BlockCall] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("preliminary"):
            return
        if not args or not isinstance(args[0], torch.Tensor):
            raise ValueError(
                f"{type(model).__name__} calls its blocks without a positional hidden state; dllmquant needs one"
            )
        calls.append(BlockCall(args[0].detach(), tuple(args[1:]), dict(kwargs)))
        raise StopForward

    handle = blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with inference(model, blocks):
            run()
    except StopForward:
        return calls[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} never called its first block; is the adapter's `blocks` path right?")
