"""Quantized attention: queries, keys, probabilities and values rounded to integer grids, in any model that uses SDPA.

    O = Ã V̂,   Ã = Deq(Q(softmax(scale · Q̂ K̂ᵀ + mask)))

Choices: queries, keys and per-token values are quantized dynamically, per token and head, on asymmetric grids; masked
keys keep probability exactly 0; the softmax runs in float32 (float64 for float64 inputs).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dllmquant.core.attention import PROBS_GRIDS, ProbsGrid, quantize_probabilities, quantize_values
from dllmquant.core.hadamard import hadamard_matrix
from dllmquant.core.iaaq import ValueScales
from dllmquant.core.softmax_search import PROBS_RANGES, ProbsRange, SoftmaxScales, row_ends
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.buffers import FixedDtypeModule
from dllmquant.nn.sdpa import AttentionInputs, Interception

ValueGranularity = Literal["token", "head", "channel"]


@dataclass(frozen=True)
class AttentionScheme:
    """How a block's attention is quantized.

    Attributes:
        probs_bits: Bits of the softmax probabilities, 2 to 8; None leaves them alone.
        probs_grid: "uniform", "log2" for powers of two, or "log_sqrt2" for powers of their root.
        probs_range: Where the grid ends: at a "fixed" probability per head, searched by IA-AQ or 1, or at the largest
            of every "row" (dynamic).
        value_bits: Bits of the values, 2 to 8; None leaves them alone.
        value_granularity: What shares a scale: "token" (dynamic, per token and head), or over all tokens "head" or
            "channel" (static, searched by IA-AQ).
        query_key_bits: Bits of queries and keys, 2 to 8 (dynamic, per token and head); None leaves them alone.
        rotate_query_key: Whether a Hadamard matrix rotates queries and keys of every head first (QuaRot's R3). Their
            products, and so the attention, stay the same but for the rounding.

    Raises:
        ValueError: A field is out of range, or has no meaning with the others.
    """

    probs_bits: int | None = None
    probs_grid: ProbsGrid = "uniform"
    probs_range: ProbsRange = "fixed"
    value_bits: int | None = None
    value_granularity: ValueGranularity = "token"
    query_key_bits: int | None = None
    rotate_query_key: bool = False

    def __post_init__(self) -> None:
        for name in ("probs_bits", "value_bits", "query_key_bits"):
            bits = getattr(self, name)
            if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
                raise ValueError(f"{name}: {bits!r}; valid: 2 to 8, or None")
        if self.probs_grid not in PROBS_GRIDS:
            raise ValueError(f"probs_grid: {self.probs_grid!r} is unknown; valid: {', '.join(PROBS_GRIDS)}")
        if self.probs_range not in PROBS_RANGES:
            raise ValueError(f"probs_range: {self.probs_range!r} is unknown; valid: {', '.join(PROBS_RANGES)}")
        if self.value_granularity not in ("token", "head", "channel"):
            raise ValueError(f"value_granularity: {self.value_granularity!r}; valid: token, head, channel")
        if self.rotate_query_key and self.query_key_bits is None:
            raise ValueError("rotate_query_key: True has no effect without query_key_bits; valid: False")

    @property
    def has_static_values(self) -> bool:
        """Whether value scales are calibrated and stored."""
        return self.value_bits is not None and self.value_granularity != "token"


class AttentionQuantizer(FixedDtypeModule):
    """Computes attention quantized by a scheme.

    Casting the module never changes the dtype of its buffers.

    Attributes:
        value_scale: float32 [value heads, 1 or channels], of static values; else None.
        value_zero: float32 of the same shape, integers; else None.
        probs_scale: float32 [heads], the upper ends of the probabilities' grids; None if they are not quantized, or
            end at the largest of every row.
    """

    def __init__(
        self,
        scheme: AttentionScheme,
        heads: int,
        value_heads: int,
        channels: int,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a quantizer to calibrate or to load into. Upper ends start at 1, value scales at 0, which is invalid.

        Args:
            scheme: The scheme.
            heads: Query heads.
            value_heads: Value heads; calls may repeat each of them several times in a row.
            channels: Width of a value head.
            device: Where the buffers live; "meta" allocates nothing.
        """
        super().__init__()
        self.scheme, self.heads, self.value_heads, self.channels = scheme, heads, value_heads, channels
        shape = (value_heads, channels if scheme.value_granularity == "channel" else 1)
        static = scheme.has_static_values
        self.value_scale: Tensor | None
        self.value_zero: Tensor | None
        self.probs_scale: Tensor | None
        self.register_buffer("value_scale", torch.zeros(shape, device=device, dtype=torch.float32) if static else None)
        self.register_buffer("value_zero", torch.zeros(shape, device=device, dtype=torch.float32) if static else None)
        quantizes = scheme.probs_bits is not None and scheme.probs_range == "fixed"
        self.register_buffer(
            "probs_scale", torch.ones(heads, device=device, dtype=torch.float32) if quantizes else None
        )

    @torch.no_grad()
    def calibrate(self, *, values: ValueScales | None = None, softmax: SoftmaxScales | None = None) -> None:
        """Sets what IA-AQ found.

        Args:
            values: Scales of static values; needed by schemes that have them, and by no other.
            softmax: Upper ends of the probabilities' grid; None keeps them at 1.

        Raises:
            ValueError: Something is missing, has no place in the scheme, or does not fit it.
        """
        if (values is not None) != self.scheme.has_static_values:
            raise ValueError(f"values: {'missing' if values is None else 'given'}, which does not fit {self.scheme}")
        own = (self.scheme.probs_grid, self.scheme.probs_range)
        if softmax is not None and (self.scheme.probs_bits is None or (softmax.grid, softmax.range) != own):
            raise ValueError(f"softmax: on the {softmax.grid} grid ({softmax.range}), which does not fit {self.scheme}")
        found = {} if values is None else {"value_scale": values.scale, "value_zero": values.zero}
        if softmax is not None and softmax.range == "fixed":
            found["probs_scale"] = softmax.upper
        for name, tensor in found.items():
            buffer = self.get_buffer(name)
            if tensor.shape != buffer.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(buffer.shape)}")
            buffer.copy_(tensor)
        self.check_scales()

    def check_scales(self) -> None:
        """Raises `ValueError` unless every stored scale is a positive finite number, as after a sound load."""
        for name in ("value_scale", "probs_scale"):
            scale = self._buffers[name]
            if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ValueError(f"{name} holds values that are not positive finite numbers")

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Computes what `F.scaled_dot_product_attention` would of the same arguments, quantized.

        Probabilities exist chunk by chunk only.

        Returns:
            [batch, heads, q, channels] in the query's dtype.

        Raises:
            ValueError: See `AttentionInputs.of_call`; or the call has other heads than the quantizer.
        """
        inputs = AttentionInputs.of_call(*args, **kwargs)
        scheme, dtype = self.scheme, inputs.query.dtype
        heads = inputs.query.shape[1]
        if self.probs_scale is not None and len(self.probs_scale) != heads:
            raise ValueError(f"query: {heads} heads; valid: {len(self.probs_scale)}, as calibrated")
        outputs = []
        rounded = round_query_key(inputs, scheme.query_key_bits, rotate=scheme.rotate_query_key)
        for chunk in replace(rounded, value=self._rounded_values(inputs.value)).probabilities():
            probabilities = chunk.probabilities
            if scheme.probs_bits is not None:
                if self.probs_scale is None:
                    upper = row_ends(probabilities)
                else:
                    upper = self.probs_scale[chunk.head][:, None, None]
                probabilities = quantize_probabilities(probabilities, upper, scheme.probs_bits, scheme.probs_grid)
            outputs.append((probabilities @ chunk.values).to(dtype))
        output: Tensor = torch.cat(outputs).unflatten(0, inputs.query.shape[:2])
        return output

    def _rounded_values(self, value: Tensor) -> Tensor:
        """Rounds V [batch, value heads, k, channels]; float32 or wider if it is rounded at all."""
        bits = self.scheme.value_bits
        if bits is None:
            return value
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.value_scale is None or self.value_zero is None:
            return quantize_activation(value, ActivationScheme(bits, None, symmetric=False))
        known, heads = len(self.value_scale), value.shape[1]
        if heads % known or self.value_scale.shape[1] not in (1, value.shape[3]):
            raise ValueError(f"value: {heads} heads of {value.shape[3]} channels do not fit {known} calibrated ones")
        scale, zero = (
            part.repeat_interleave(heads // known, 0)[:, None] for part in (self.value_scale, self.value_zero)
        )
        return quantize_values(value, scale, zero, bits)

    def extra_repr(self) -> str:
        """Describes the quantizer in one line."""
        return str(self.scheme)


def round_query_key(inputs: AttentionInputs, bits: int | None, *, rotate: bool) -> AttentionInputs:
    """Returns a call's inputs with queries and keys as quantized attention has them: rotated if asked for, rounded.

    Args:
        inputs: The inputs.
        bits: Bits of queries and keys; None leaves them alone.
        rotate: Whether a Hadamard matrix rotates them first.
    """
    if bits is None:
        return inputs
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    query, key = inputs.query.to(wide), inputs.key.to(wide)
    if rotate:
        rotation = _rotation(query.shape[-1]).to(query)
        query, key = query @ rotation, key @ rotation
    dynamic = ActivationScheme(bits, None, symmetric=False)
    query, key = quantize_activation(query, dynamic), quantize_activation(key, dynamic)
    return replace(inputs, query=query, key=key)


@functools.cache
def _rotation(head_dim: int) -> Tensor:
    return hadamard_matrix(head_dim)


def install(block: nn.Module, quantizer: AttentionQuantizer) -> None:
    """Makes a block compute its attention with a quantizer, its submodule `attention_quantizer` from now on.

    The block's forward is wrapped in a `with`, not bracketed by hooks: PyTorch skips `always_call` hooks on
    KeyboardInterrupt, and the interception would outlive the forward pass. Copies and pickles of the block are wrapped
    around their own quantizers.

    Raises:
        ValueError: The block has a quantizer already.
    """
    if hasattr(block, "attention_quantizer"):
        raise ValueError(f"{type(block).__name__} has an attention_quantizer already; uninstall it first")
    block.add_module("attention_quantizer", quantizer)
    block.__dict__["forward"] = functools.partial(_quantized_forward, block, block.forward)


def installed(block: nn.Module) -> AttentionQuantizer | None:
    """Returns the quantizer a block computes its attention with, or None."""
    found = getattr(block, "attention_quantizer", None)
    return found if isinstance(found, AttentionQuantizer) else None


def uninstall(block: nn.Module) -> AttentionQuantizer:
    """Undoes `install` and returns the quantizer.

    Raises:
        ValueError: The block has none.
    """
    wrapped = block.__dict__.get("forward")
    if not isinstance(wrapped, functools.partial) or wrapped.func is not _quantized_forward:
        raise ValueError(
            f"{type(block).__name__} has no attention_quantizer installed, or one wrapped by something else"
        )
    quantizer, original = block.get_submodule("attention_quantizer"), wrapped.args[1]
    assert isinstance(quantizer, AttentionQuantizer)
    del block.attention_quantizer, block.__dict__["forward"]
    if original != block.forward:  # somebody had wrapped it before
        block.__dict__["forward"] = original
    return quantizer


def _quantized_forward(block: nn.Module, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    quantizer = block.get_submodule("attention_quantizer")
    assert isinstance(quantizer, AttentionQuantizer)
    with Interception(quantizer.attend) as interception:
        output = original(*args, **kwargs)
    if not interception.calls:
        raise RuntimeError(
            f"{type(block).__name__} ran without calling scaled_dot_product_attention, so its attention was not "
            "quantized; load the model with attn_implementation='sdpa'"
        )
    return output
