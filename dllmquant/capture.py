"""Capturing what flows into modules: hooks that live inside a `with`, and a run that stops where it has seen enough."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
        output = block(self.hidden, *self.args, **self.kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def following(self, block: nn.Module) -> "BlockCall":
        """Returns the call of the next block."""
        return BlockCall(self.run(block), self.args, self.kwargs)


@contextmanager
def watching_input(module: nn.Module, watch: Callable[[Tensor], None]) -> Iterator[None]:
    """While the context lasts, `watch` sees the module's first positional input and the forward pass stops there.

    Forward passes inside the context end in `StopForward`, which the context does not swallow.
    """

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        watch(args[0])
        raise StopForward

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def input_of(block: nn.Module, linear: nn.Module, call: BlockCall) -> Tensor:
    """Runs a block as far as one of its layers and returns the layer's input [..., in].

    Raises:
        ValueError: The block ran to its end without calling the layer.
    """
    seen: list[Tensor] = []
    with watching_input(linear, seen.append):
        try:
            call.run(block)
        except StopForward:
            return seen[0]
    raise ValueError("a block ran without calling a layer its adapter lists; is the execution order right?")


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
    first_block: nn.Module,
    denoise: Callable[[Tensor, Tensor], object],
    ids: Tensor,
    attention_mask: Tensor,
    batch_size: int,
) -> list[BlockCall]:
    """Runs the model up to its first block, batch by batch.

    Args:
        model: The model; used in the error message only.
        first_block: Its first transformer block.
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
            first_block,
            functools.partial(denoise, ids[start : start + batch_size], attention_mask[start : start + batch_size]),
        )
        for start in range(0, len(ids), batch_size)
    ]


def capture_block_call(model: nn.Module, first_block: nn.Module, run: Callable[[], object]) -> BlockCall:
    """Runs the model up to its first block and returns how that block was called.

    Args:
        model: The model; used in the error message only.
        first_block: Its first transformer block.
        run: Runs the model on one batch.

    Raises:
        ValueError: The run never reached the block, or called it without a positional tensor.
    """
    calls: list[BlockCall] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], torch.Tensor):
            raise ValueError(
                f"{type(model).__name__} calls its blocks without a positional hidden state; dllmquant needs one"
            )
        calls.append(BlockCall(args[0].detach(), tuple(args[1:]), dict(kwargs)))
        raise StopForward

    handle = first_block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except StopForward:
        return calls[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} never called its first block; is the adapter's `blocks` path right?")
