"""GPTQ (arXiv 2210.17323): rounding one column at a time, pushing each error into the columns still to come.

It minimises Tr(ΔW H ΔWᵀ), H = Σ_j w_j x_j x_jᵀ. With U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), column q is
rounded, its error e = (w_q − ŵ_q) / U_qq is formed, and every later column k becomes w_k − e·U_qk. That equals the
textbook OBS recursion, which inverts H again after each column.

    columns   0 ... | block: rounded one by one | later blocks: updated once per block, by one matmul
    groups    |-- scale 0 --|-- scale 1 --| ...   one scale and zero point per row and group
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dllmquant.core.grid import Clip, Grid, QuantizedWeight, fit_scale, quantize_to_grid


@dataclass(frozen=True, eq=False)
class GPTQResult:
    """What the solver found.

    Attributes:
        weight: The quantized weight.
        damping: Relative damping the factorization succeeded with.
        attempts: Factorizations tried; more than 1 means the damping was escalated.
        loss: Tr(ΔW H ΔWᵀ) with the undamped Hessian.
        dead: Input channels whose Hessian diagonal is zero; their weights are set to zero before they are rounded.
    """

    weight: QuantizedWeight
    damping: float
    attempts: int
    loss: float
    dead: int


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    act_order: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    clip: Clip = "none",
) -> GPTQResult:
    """Quantizes a weight against a Hessian.

    Args:
        weight: Float [out, in].
        hessian: Float [in, in], symmetric; float64 makes the whole solve run in float64.
        grid: The grid.
        act_order: Solve columns in order of decreasing Hessian diagonal. Groups stay those of the original order, their
            scales fitted to the original weights up front, so no permutation has to be stored.
        damping: λ, added as λ·mean(diag H) to the diagonal. If the Hessian is still not positive definite, λ is
            multiplied by 10 until it is or exceeds 1.
        block_size: Columns per lazy update; does not change the result beyond rounding.
        clip: How group ranges are fitted, weighted by diag(H); see `fit_scale`.

    Raises:
        ValueError: A shape does not fit, an input is not finite, the group size does not divide the columns, or no
            damping up to 1 makes the Hessian positive definite.
    """
    rows, columns = weight.shape
    _check_problem(weight, hessian)
    if block_size < 1:
        raise ValueError(f"block_size: {block_size}; valid: at least 1")
    width = grid.width(columns)
    dtype = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    original = weight.to(dtype)
    hessian = hessian.to(dtype)

    importance = hessian.diagonal().clamp(min=0)
    dead = hessian.diagonal() == 0
    w = torch.where(dead, 0.0, original)
    order, (upper, used_damping, attempts) = _ordered_factor(hessian, dead, act_order, damping)

    scale, zero = fit_scale(w, grid, clip=clip, importance=importance)  # refitted below unless act_order
    w = w[:, order]
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=w.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.zeros(rows, end - start, dtype=dtype, device=w.device)
        for q in range(start, end):
            group = int(order[q]) // width
            if not act_order and q % width == 0:
                ready = _up_to_date(w, errors, upper, start, q, end, q + width)
                fitted = fit_scale(ready, grid.of_group(group), clip=clip, importance=importance[q : q + width])
                scale[:, group], zero[:, group] = fitted[0][:, 0], fitted[1][:, 0]
            s, z = scale[:, group : group + 1], zero[:, group : group + 1]
            code = quantize_to_grid(w[:, q : q + 1], s, z, grid.of_group(group))
            codes[:, q] = code[:, 0]
            rounded = (code.to(dtype) - z.to(dtype)) * s.to(dtype)
            error = (w[:, q] - rounded[:, 0]) / upper[q, q]
            w[:, q + 1 : end] -= torch.outer(error, upper[q, q + 1 : end])
            errors[:, q - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    codes = codes[:, torch.argsort(order)]
    quantized = QuantizedWeight(grid, codes, scale, zero)
    delta = quantized.dequantize(dtype) - original
    loss = float(((delta @ hessian) * delta).sum())
    return GPTQResult(quantized, used_damping, attempts, loss, int(dead.sum()))


def _check_problem(weight: Tensor, hessian: Tensor) -> None:
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian: shape {tuple(hessian.shape)}, expected ({columns}, {columns})")
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(hessian).all()):
        raise ValueError("weight and hessian must be finite; one holds NaN or infinity")


def _up_to_date(w: Tensor, errors: Tensor, upper: Tensor, start: int, q: int, end: int, stop: int) -> Tensor:
    """Returns columns q..stop of w with all errors so far applied, also beyond the current block."""
    inside = w[:, q : min(end, stop)]
    if stop <= end:
        return inside
    beyond = w[:, end:stop] - errors[:, : q - start] @ upper[start:q, end:stop]
    return torch.cat((inside, beyond), dim=1)


def _ordered_factor(
    hessian: Tensor, dead: Tensor, act_order: bool, damping: float
) -> tuple[Tensor, tuple[Tensor, float, int]]:
    """Returns the order columns are solved in, and `_inverse_factor` of the Hessian in that order."""
    # a dead channel's stand-in is the mean of the others, so that the damping does not depend on how many are dead
    mean = hessian.trace() / (len(hessian) - int(dead.sum())) if not bool(dead.all()) else 1.0
    h = hessian + torch.diag(dead.to(hessian.dtype) * mean)
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(hessian))
    order = order.to(hessian.device)
    return order, _inverse_factor(h[order][:, order], damping)


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """Returns U with (H + λ mean(diag H) I)⁻¹ = UᵀU, upper triangular, the λ used and the attempts made."""
    if not 0 < damping <= 1:
        raise ValueError(f"damping: {damping}; valid: above 0 and at most 1")
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    attempts = 0
    relative = damping
    while True:
        attempts += 1
        lower, info = torch.linalg.cholesky_ex(hessian + relative * mean * identity)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                return upper, relative, attempts
        if relative >= 1:
            raise ValueError(f"hessian: not positive definite even with damping {relative:g}")
        relative = min(relative * 10, 1.0)
