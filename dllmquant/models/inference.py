"""How a model is run: in evaluation mode, and in float32 where it is to be exact or where 16 bits are slow."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_NATIVE = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@contextmanager
def inference(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the context lasts, the model is in evaluation mode, and in `in_float32` where that is quicker.

    That is the case for a 16-bit model on a processor without 16-bit matrix arithmetic, where torch is slower than in
    float32 by far (the bundled model eight times). Results there differ from those of other processors by the
    rounding of the 16-bit type.

    Args:
        model: The model; with no weights on the CPU it computes as ever.
        blocks: Its transformer blocks.
    """
    was_training = model.training
    narrow = {p.dtype for p in model.parameters() if p.device.type == "cpu" and p.dtype in _NATIVE}
    model.eval()
    try:
        with ExitStack() as stack:
            if any(not _is_native(dtype) for dtype in narrow):
                stack.enter_context(in_float32(model, blocks))
            yield
    finally:
        model.train(was_training)


def _is_native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a 16-bit type itself."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _NATIVE[dtype])())


@contextmanager
def in_float32(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the context lasts, a float16 or bfloat16 model computes in float32 with the weights it has.

    That leaves the rounding of weights as the only rounding to speak of: of a model in bfloat16, the logits deviate a
    third as much after a rotation. Blocks are widened while they run, so a copy of one block is all the memory it takes
    beside that of what lies outside the blocks. Nothing outside the blocks may be changed inside the context.

    Args:
        model: The model; its parameters are afterwards the very tensors they were.
        blocks: Its transformer blocks.
    """
    narrow = {p: p.data for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}

    def widen(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter in narrow:
                parameter.data = narrow[parameter].float()

    def restore(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter in narrow:
                parameter.data = narrow[parameter]

    def enter(block: nn.Module, _args: tuple[Any, ...]) -> None:
        widen(block.parameters())

    def leave(block: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        restore(block.parameters())

    blocks = list(blocks)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    handles = [
        handle for b in blocks for handle in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))
    ]
    try:
        widen(parameter for parameter in narrow if parameter not in inside)
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore(narrow)
