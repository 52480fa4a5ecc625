"""Invertible linear maps of a linear layer's input: y = x Wᵀ = (x T)(W T⁻ᵀ)ᵀ, with x T computed at every call.

T is a product of steps, x → x S₁ S₂ …; each is cheap to apply and to invert:

    block      block-diagonal, one stored matrix per `size` channels         S⁻ᵀ: solved block by block
    permute    x → x[..., permutation]                                       S⁻ᵀ = S
    hadamard   block-diagonal, the same orthonormal Hadamard matrix of       S⁻ᵀ = S
               order `size` in every block, after the signs of `seed` if there are any; nothing stored

Whatever is stored defines T. The weight is transformed with the inverse of exactly that, so the function is preserved
up to the rounding of the arithmetic, not of the storage. Blocks are stored in float32 all the same, not in float16:
those that are not rotations may have condition numbers in the thousands, and rounding their entries to 11 bits would
swamp their smallest singular values, and with these the moments they were fitted to balance. The price is 4·size bytes
per input channel and step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

import torch
from torch import Tensor

from dllmquant.core.hadamard import hadamard_factors, random_signs
from dllmquant.nn.buffers import FixedDtypeModule

Kind = Literal["block", "permute", "hadamard"]

_PROBE_ROWS = 8  # of inputs and of weights, on which a transform and its inverse must cancel
_LARGEST_CONDITION = 2.0**16  # of the 24 bits of a float32 forward pass it leaves the 8 that bfloat16 has


@dataclass(frozen=True)
class TransformStep:
    """One step. `dataclasses.asdict` makes it JSON, `TransformStep(**entry)` reads it back.

    Attributes:
        kind: "block", "permute" or "hadamard".
        size: Channels per block; None for "permute".
        seed: "hadamard" only: the seed of `random_signs`, one sign per input channel; None for no signs.

    Raises:
        ValueError: The kind is unknown, or a field does not go with it.
    """

    kind: Kind
    size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("block", "permute", "hadamard"):
            raise ValueError(f"kind: {self.kind!r} is unknown; valid: block, permute, hadamard")
        if self.kind == "permute":
            if self.size is not None:
                raise ValueError(f"size: {self.size!r}; valid for kind permute: None")
        elif type(self.size) is not int or self.size < 1:
            raise ValueError(f"size: {self.size!r}; valid for kind {self.kind}: a positive integer")
        if self.seed is not None and (self.kind != "hadamard" or type(self.seed) is not int):
            raise ValueError(f"seed: {self.seed!r}; valid: None, or an integer with kind hadamard")

    def width(self, in_features: int) -> int:
        """Returns the channels per block; a permutation is one block.

        Raises:
            ValueError: The size does not divide `in_features`.
        """
        size = in_features if self.size is None else self.size
        if in_features % size:
            raise ValueError(f"size: {size} of step {self.kind} does not divide the {in_features} input channels")
        return size


class InputTransform(FixedDtypeModule):
    """The map x → x T.

    Attributes:
        in_features: Width of the input.
        steps: The steps, first one first.
        step_0, step_1, ...: Buffers of the steps that have one: float32 [in/size, size, size] for "block", int32 [in]
            for "permute". Casting the module never changes their dtype.
    """

    def __init__(
        self, in_features: int, steps: Sequence[TransformStep], device: torch.device | str | None = None
    ) -> None:
        """Makes a transform whose buffers are still to be loaded.

        Args:
            in_features: Width of the input.
            steps: The steps.
            device: Where the buffers live; "meta" allocates nothing.

        Raises:
            ValueError: There is no step, a size does not divide `in_features`, or there is no Hadamard matrix of that
                size.
        """
        super().__init__()
        if not steps:
            raise ValueError("steps: empty; valid: at least one step")
        self.in_features, self.steps = in_features, tuple(steps)
        for index, step in enumerate(self.steps):
            size = step.width(in_features)
            if step.kind == "block":
                shape = (in_features // size, size, size)
                self.register_buffer(_name(index), torch.zeros(shape, dtype=torch.float32, device=device))
            elif step.kind == "permute":
                self.register_buffer(_name(index), torch.zeros(in_features, dtype=torch.int32, device=device))
            else:
                hadamard_factors(size)

    @classmethod
    def from_tensors(cls, in_features: int, steps: Sequence[TransformStep], tensors: Sequence[Tensor]) -> Self:
        """Makes a transform from the tensors of its steps.

        Args:
            in_features: Width of the input.
            steps: The steps.
            tensors: One tensor for each step that has a buffer, in order; blocks are rounded to float32.

        Raises:
            ValueError: See the constructor; or the number or the shape of the tensors is wrong, a permutation is none,
                or a block is not finite, or singular or almost so.
        """
        transform = cls(in_features, steps)
        names = [name for name, _ in transform.named_buffers()]
        if len(names) != len(tensors):
            raise ValueError(f"tensors: {len(tensors)}; valid: {len(names)}, one for each of {', '.join(names)}")
        for name, tensor in zip(names, tensors, strict=True):
            empty = transform.get_buffer(name)
            if tensor.shape != empty.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}; valid: {tuple(empty.shape)}")
            stored = tensor.detach().to(empty.dtype, copy=True)
            if empty.dtype == torch.int32:
                if not torch.equal(stored.long().sort().values.cpu(), torch.arange(in_features, device="cpu")):
                    raise ValueError(f"{name}: not a permutation of 0 ... {in_features - 1}")
            else:
                _check_blocks(name, stored)
            transform.register_buffer(name, stored)
        return transform

    def check(self) -> None:
        """Raises `ValueError` unless the stored steps are sound, as after a good load."""
        self.from_tensors(self.in_features, self.steps, list(self.buffers()))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in] to x T, in `x`'s dtype.

        Narrower inputs are widened to float32 once and rounded once, after the last step: a T rounded to bfloat16 would
        no longer be the one the weight was transformed for.
        """
        return self._apply_steps(x.to(_widened(x))).to(x.dtype)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns the whole T, [in, in], computed in float64."""
        buffers = list(self.buffers())
        device = buffers[0].device if buffers else None
        return self._apply_steps(torch.eye(self.in_features, dtype=torch.float64, device=device)).to(dtype)

    def inverse_transpose_weight(self, weight: Tensor) -> Tensor:
        """Returns W T⁻ᵀ of a weight [out, in], computed in float64, in the weight's dtype or float32 if that is wider.

        Raises:
            ValueError: The width is wrong, or a block is singular.
        """
        self._check_width("weight", weight)
        return self._apply_steps(weight.double(), dual=True).to(_widened(weight))

    def inverse_error(self) -> float:
        """Returns how far (x T)(w T⁻ᵀ)ᵀ is from x wᵀ on a few random rows x and w, in float64, relative to x wᵀ."""
        buffers = list(self.buffers())
        device = buffers[0].device if buffers else torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2, _PROBE_ROWS, self.in_features, generator=generator, dtype=torch.float64)
        x, w = rows.to(device)
        exact = x @ w.T
        return float((self(x) @ self.inverse_transpose_weight(w).T - exact).norm() / exact.norm())

    def transform_hessian(self, hessian: Tensor) -> Tensor:
        """Returns Tᵀ H T, the second moment of x T.

        Args:
            hessian: E[u vᵀ], float [in, in], of two inputs u and v of the layer; not necessarily symmetric, so a cross
                moment E[(x − x̃) x̃ᵀ] is transformed in the same way.

        Returns:
            [in, in], computed in float64, in the given dtype or float32 if that is wider.

        Raises:
            ValueError: The shape is wrong.
        """
        if hessian.shape != (self.in_features, self.in_features):
            shape = (self.in_features, self.in_features)
            raise ValueError(f"hessian: shape {tuple(hessian.shape)}; valid: {shape}")
        half = self._apply_steps(hessian.double())
        return self._apply_steps(half.T).T.contiguous().to(_widened(hessian))

    def _check_width(self, what: str, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{what}: {x.shape[-1]} input channels; valid: {self.in_features}")

    def _apply_steps(self, x: Tensor, *, dual: bool = False) -> Tensor:
        """Returns x T, or x T⁻ᵀ if `dual`, in `x`'s dtype; (S₁S₂…)⁻ᵀ = S₁⁻ᵀS₂⁻ᵀ…, so both take the steps in order."""
        self._check_width("x", x)
        for index, step in enumerate(self.steps):
            if step.kind == "hadamard":
                x = _apply_hadamard(x, step.width(self.in_features), step.seed)
            elif step.kind == "permute":
                x = x.index_select(-1, self.get_buffer(_name(index)).to(x.device))
            else:
                blocks = self.get_buffer(_name(index)).to(x)
                if dual:
                    blocks = _inverse_transpose(_name(index), blocks)
                x = torch.einsum("...gi,gij->...gj", x.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)
        return x

    def extra_repr(self) -> str:
        """Describes the transform in one line."""
        described = [step.kind if step.size is None else f"{step.kind} {step.size}" for step in self.steps]
        return f"{self.in_features}, " + " · ".join(described)


def _name(index: int) -> str:
    return f"step_{index}"


def _widened(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_blocks(name: str, blocks: Tensor) -> None:
    if not bool(torch.isfinite(blocks).all()):
        raise ValueError(f"{name}: a block holds NaN or infinity (in float32)")
    condition = torch.linalg.cond(blocks.double())
    if bool((condition > _LARGEST_CONDITION).any()):
        worst = int(condition.argmax())
        raise ValueError(
            f"{name}: block {worst} is singular or almost so, condition number {float(condition[worst]):.3g}; "
            f"valid: at most {_LARGEST_CONDITION:.0f}"
        )


def _inverse_transpose(name: str, blocks: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(blocks)
    if bool(info.any()):
        raise ValueError(f"{name}: block {int(info.argmax())} is singular")
    result: Tensor = inverse.mT
    return result


def _apply_hadamard(x: Tensor, size: int, seed: int | None) -> Tensor:
    """Returns x times diag(signs) and the block-diagonal Hadamard matrix, one Kronecker factor at a time."""
    scale = _signs(x.shape[-1], seed, x.dtype, x.device) if seed is not None else 1.0
    x = x * (scale * size**-0.5)
    right = size
    for factor in _factors(size, x.dtype, x.device):
        right //= len(factor)
        x = torch.einsum("...lir,ij->...ljr", x.unflatten(-1, (-1, len(factor), right)), factor).flatten(-3)
    return x


# Constants, made outside inference mode because tensors made within it could never be used with gradients.
@cache
@torch.inference_mode(mode=False)
def _factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(factor.to(device, dtype) for factor in hadamard_factors(size))


@cache
@torch.inference_mode(mode=False)
def _signs(length: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return random_signs(length, seed).to(device, dtype)
