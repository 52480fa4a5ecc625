"""The packed linear layer."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmquant.core.grid import Grid, QuantizedWeight
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.packing import pack, packed_width, unpack


class QuantLinear(nn.Module):
    """A linear layer whose weight is stored as packed codes: y = x̂ Ŵᵀ + b with Ŵ = (codes − zero)·scale.

    The codes keep the key `weight`, so that a loader that knows nothing of dllmquant meets a shape that does not fit
    instead of leaving a float weight at random.

    Attributes:
        weight: uint8 [out · ceil(in·bits/8)], packed codes, row after row. One dimension, because at 8 bits a matrix of
            codes would have the float weight's shape.
        weight_scale: float16 [out, groups]; casting the module never changes its dtype.
        weight_zero_point: uint8 [out, ceil(groups·bits/8)], packed; None on symmetric grids.
        bias: [out] in the compute dtype, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        activation: ActivationScheme | None,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an empty layer to load into.

        Args:
            in_features: Input channels.
            out_features: Output channels.
            grid: The weight's grid.
            activation: How inputs are quantized, or None.
            bias: Whether there is a bias.
            device: Where the buffers live; "meta" allocates nothing.
            dtype: dtype of the bias.

        Raises:
            ValueError: A group size does not divide `in_features`.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid, self.activation = grid, activation
        if activation is not None and activation.group_size is not None and in_features % activation.group_size:
            raise ValueError(f"activation.group_size: {activation.group_size} does not divide {in_features} channels")
        groups = grid.num_groups(in_features)

        def empty(columns: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(out_features, columns, dtype=kind, device=device)

        self.weight: Tensor
        self.weight_scale: Tensor
        self.weight_zero_point: Tensor | None
        self.register_buffer("weight", empty(packed_width(in_features, grid.bits), torch.uint8).flatten())
        self.register_buffer("weight_scale", empty(groups, torch.float16))
        zero = None if grid.symmetric else empty(packed_width(groups, grid.bits), torch.uint8)
        self.register_buffer("weight_zero_point", zero)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None, activation: ActivationScheme | None, dtype: torch.dtype
    ) -> Self:
        """Packs a quantized weight [out, in] and its bias [out] into a layer that computes in `dtype`.

        Raises:
            ValueError: The bias has another shape, or a symmetric weight a zero point that is not the middle code.
        """
        out_features, in_features = weight.codes.shape
        middle = weight.grid.levels // 2
        if weight.grid.symmetric and bool((weight.zero != middle).any()):
            raise ValueError(f"weight.zero: not {middle} everywhere; valid on a symmetric grid: {middle}")
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias: shape {tuple(bias.shape)}; valid: ({out_features},)")
        layer = cls(
            in_features,
            out_features,
            weight.grid,
            activation,
            bias=bias is not None,
            device=weight.codes.device,
            dtype=dtype,
        )
        layer.weight = pack(weight.codes, weight.grid.bits).flatten()
        layer.weight_scale = weight.scale.clone()
        if not weight.grid.symmetric:
            layer.weight_zero_point = pack(weight.zero, weight.grid.bits)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    def quantized_weight(self) -> QuantizedWeight:
        """Returns the unpacked weight."""
        grid, groups = self.grid, self.weight_scale.shape[1]
        codes = unpack(self.weight.view(self.out_features, -1), grid.bits, self.in_features)
        if self.weight_zero_point is None:
            zero = torch.full_like(self.weight_scale, grid.levels // 2, dtype=torch.uint8)
        else:
            zero = unpack(self.weight_zero_point, grid.bits, groups)
        return QuantizedWeight(grid, codes, self.weight_scale, zero)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        zero = 0 if self.weight_zero_point is None else self.weight_zero_point.nbytes
        return self.weight.nbytes + self.weight_scale.nbytes + zero

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in] to [..., out], in `x`'s dtype."""
        if self.activation is not None:
            x = quantize_activation(x, self.activation)
        return F.linear(x, self.quantized_weight().dequantize(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Describes the layer in one line."""
        grid: dict[str, Any] = {"bits": self.grid.bits, "group_size": self.grid.group_size}
        described = ", ".join(f"{key}={value}" for key, value in grid.items())
        return f"{self.in_features} -> {self.out_features}, {described}, activation={self.activation}"
