"""The packed linear layer."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmquant.core.grid import Grid, QuantizedWeight
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.buffers import FixedDtypeModule
from dllmquant.nn.packing import mixed_width, pack_mixed, unpack_mixed
from dllmquant.nn.transform import InputTransform, TransformStep


class QuantLinear(FixedDtypeModule):
    """A linear layer whose weight is stored as packed codes: y = x̂ Ŵᵀ + b with Ŵ = (codes − zero)·scale.

    x̂ is the input after its transform, if there is one, and its quantization, if there is one.

    The codes keep the key `weight`, so that a loader that knows nothing of dllmquant meets a shape that does not fit
    instead of leaving a float weight at random.

    Attributes:
        weight: uint8 [out · ceil(in·bits/8)], packed codes, row after row, as `dllmquant.nn.packing` draws them. One
            dimension, because at 8 bits a matrix of codes would have the float weight's shape.
        weight_scale: float16 [out, groups]; casting the module never changes its dtype.
        weight_zero_point: uint8 [out, ceil(groups·bits/8)], packed like codes; groups of one bit have none. None on
            symmetric grids, and where all groups have one bit.
        bias: [out] in the compute dtype, or None.
        input_transform: The transform the weight was solved for, or None.
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
        input_transform: Sequence[TransformStep] = (),
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
            input_transform: Steps of the input's transform; empty for none.

        Raises:
            ValueError: A group size does not divide `in_features`, or a scheme has widths for another number of groups.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid, self.activation = grid, activation
        if activation is not None:
            try:
                activation.width(in_features)
            except ValueError as error:
                raise ValueError(f"activation.{error}") from error
        bits = grid.bits_of_groups(in_features)
        zero_bits = [bits[group] for group in _with_zero_point(grid, bits)]

        def empty(columns: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(out_features, columns, dtype=kind, device=device)

        self.weight: Tensor
        self.weight_scale: Tensor
        self.weight_zero_point: Tensor | None
        self.register_buffer("weight", empty(mixed_width(in_features, bits), torch.uint8).flatten())
        self.register_buffer("weight_scale", empty(len(bits), torch.float16))
        zero = empty(mixed_width(len(zero_bits), zero_bits), torch.uint8) if zero_bits else None
        self.register_buffer("weight_zero_point", zero)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.input_transform = InputTransform(in_features, input_transform, device) if input_transform else None

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: ActivationScheme | None,
        dtype: torch.dtype,
        *,
        input_transform: InputTransform | None = None,
    ) -> Self:
        """Packs a quantized weight [out, in] and its bias [out] into a layer that computes in `dtype`.

        The layer gets a copy of the input transform, which the weight must have been solved for.

        Raises:
            ValueError: The bias has another shape, a zero point that is not stored is not the middle code, or a code is
                none of its group's.
        """
        out_features, in_features = weight.codes.shape
        bits = weight.grid.bits_of_groups(in_features)
        stored = _with_zero_point(weight.grid, bits)
        for group in sorted({*range(len(bits))} - {*stored}):
            if bool((weight.zero[:, group] != _middle(bits[group])).any()):
                raise ValueError(
                    f"weight.zero: not {_middle(bits[group])} everywhere in group {group}; valid on a symmetric grid "
                    f"with {bits[group]} bits: {_middle(bits[group])}"
                )
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
        layer.weight = pack_mixed(weight.codes, bits).flatten()
        layer.weight_scale = weight.scale.clone()
        if stored:
            layer.weight_zero_point = pack_mixed(weight.zero[:, stored], [bits[group] for group in stored])
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias)
        layer.input_transform = copy.deepcopy(input_transform)  # a checkpoint cannot share tensors between layers
        return layer

    def quantized_weight(self) -> QuantizedWeight:
        """Returns the unpacked weight."""
        bits = self.grid.bits_of_groups(self.in_features)
        codes = unpack_mixed(self.weight.view(self.out_features, -1), bits, self.in_features)
        return QuantizedWeight(self.grid, codes, self.weight_scale, self._zero_points(bits))

    def _zero_points(self, bits: tuple[int, ...]) -> Tensor:
        """Returns all zero points [out, groups], stored or not."""
        stored = _with_zero_point(self.grid, bits)
        if self.weight_zero_point is not None and len(stored) == len(bits):
            return unpack_mixed(self.weight_zero_point, bits, len(bits))
        zero = torch.full_like(self.weight_scale, _middle(bits[0]), dtype=torch.uint8)
        if self.grid.group_bits is not None:
            zero[:] = torch.tensor([_middle(width) for width in bits], dtype=torch.uint8, device=zero.device)
        if self.weight_zero_point is not None:
            widths = [bits[group] for group in stored]
            zero[:, stored] = unpack_mixed(self.weight_zero_point, widths, len(widths))
        return zero

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and input transform."""
        zero = 0 if self.weight_zero_point is None else self.weight_zero_point.nbytes
        transform = 0 if self.input_transform is None else self.input_transform.nbytes
        return self.weight.nbytes + self.weight_scale.nbytes + zero + transform

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in] to [..., out], in `x`'s dtype."""
        if self.input_transform is not None:
            x = self.input_transform(x)
        if self.activation is not None:
            x = quantize_activation(x, self.activation)
        return F.linear(x, self.quantized_weight().dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Describes the layer in one line."""
        bits = f"{self.grid.mean_bits(self.in_features):g}" + ("" if self.grid.group_bits is None else " (mixed)")
        return (
            f"{self.in_features} -> {self.out_features}, bits={bits}, group_size={self.grid.group_size}, "
            f"activation={self.activation}"
        )


def _with_zero_point(grid: Grid, bits: tuple[int, ...]) -> list[int]:
    """Returns the groups whose zero point is stored: none of one bit, and none at all of a symmetric grid."""
    return [] if grid.symmetric else [group for group, width in enumerate(bits) if width > 1]


def _middle(bits: int) -> int:
    """Returns the zero point of a group that stores none."""
    return 1 << (bits - 1)
