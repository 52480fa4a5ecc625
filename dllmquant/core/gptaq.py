"""GPTAQ (arXiv 2504.02692): GPTQ that also makes up for what the quantized layers before this one did to its input.

x is a token's input in the full-precision path, x̃ in the quantized path. GPTAQ minimises E‖W x − Ŵ x̃‖², E the weighted
mean over tokens; its data are H = E x̃ x̃ᵀ and C = E (x − x̃) x̃ᵀ. Rounding column q, with the columns F still to come,
leaves two errors on the output, (w_q − ŵ_q) x̃_q and w_q (x_q − x̃_q), the second being all that column q's own input
deviates. Both go into the columns F by least squares,

    min_δ E‖δ x̃_F − (w_q − ŵ_q) x̃_q − w_q (x_q − x̃_q)‖²
    δ = [(w_q − ŵ_q) H_qF + w_q C_qF] H_FF⁻¹
      = −(w_q − ŵ_q) U_qF / U_qq + w_q P_qF,        H⁻¹ = UᵀU,  H_FF⁻¹ = U_FFᵀ U_FF,  P = triu(C Uᵀ, 1) U,

w_q being the weight as the columns before have left it. Earlier columns are fixed and the mismatch of later ones waits
for its turn ("neuron decomposition", which makes P one matrix for all rows). With C = 0 it is GPTQ.

1. The authors' code applies w_q P inside a block but ŵ_q P beyond it, so its result depends on the block size. Here it
   is w_q everywhere, which is what the least squares says.
2. Their code scales P by α = 0.25; the least squares has α = 1. The codes depend on α C alone, so `0.25 * cross` gives
   theirs (`loss` then is that of the scaled cross statistic).
3. A dead channel (x̃_q = 0 on every token) is zero before it is rounded, so its own mismatch is not made up for, as in
   their code.
4. Damping adds λ·mean(diag H) to H and nothing to C: as if x and x̃ carried the same white noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dllmquant.core.gptq import GPTQResult, _ordered_factor
from dllmquant.core.grid import Clip, Grid, QuantizedWeight, fit_scale, quantize_to_grid


def gptaq(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    grid: Grid,
    *,
    act_order: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    clip: Clip = "none",
) -> GPTQResult:
    """Quantizes a weight against the inputs of two paths.

    Args:
        weight: Float [out, in].
        hessian: Float [in, in], E x̃ x̃ᵀ; float64 makes the whole solve run in float64.
        cross: Float [in, in], E (x − x̃) x̃ᵀ, rows x − x̃.
        grid: The grid.
        act_order: Solve columns in order of decreasing Hessian diagonal; groups and scales stay those of the original
            weights, as in `gptq`.
        damping: As in `gptq`, with the same escalation.
        block_size: Columns per lazy update; does not change the result beyond rounding.
        clip: How group ranges are fitted, weighted by diag(H); see `fit_scale`.

    Returns:
        What `gptq` returns, but `loss` is `asymmetric_loss`.

    Raises:
        ValueError: A shape does not fit, an input is not finite, the group size does not divide the columns, or no
            damping up to 1 makes the Hessian positive definite.
    """
    rows, columns = weight.shape
    width = grid.width(columns)
    if block_size < 1:
        raise ValueError(f"block_size: {block_size}; valid: at least 1")
    problem = prepare(weight, hessian, cross, act_order=act_order, damping=damping)
    order, upper = problem.order, problem.upper
    feedback = (problem.cross[order][:, order] @ upper.T).triu(1) @ upper  # P

    importance = problem.hessian.diagonal().clamp(min=0)
    w = torch.where(problem.dead, 0.0, problem.weight)
    scale, zero = fit_scale(w, grid, clip=clip, importance=importance)  # refitted below unless act_order
    w = w[:, order]
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=w.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.zeros(rows, end - start, dtype=w.dtype, device=w.device)  # (w_q − ŵ_q) / U_qq
        sources = torch.zeros_like(errors)  # w_q
        for q in range(start, end):
            group = int(order[q]) // width
            if not act_order and q % width == 0:
                done, beyond = q - start, slice(end, max(end, q + width))  # beyond: the group's part outside the block
                due = errors[:, :done] @ upper[start:q, beyond] - sources[:, :done] @ feedback[start:q, beyond]
                ready = torch.cat((w[:, q : min(end, q + width)], w[:, beyond] - due), dim=1)
                fitted = fit_scale(ready, grid.of_group(group), clip=clip, importance=importance[q : q + width])
                scale[:, group], zero[:, group] = fitted[0][:, 0], fitted[1][:, 0]
            s, z = scale[:, group : group + 1], zero[:, group : group + 1]
            code = quantize_to_grid(w[:, q : q + 1], s, z, grid.of_group(group))
            codes[:, q] = code[:, 0]
            rounded = (code.to(w.dtype) - z.to(w.dtype)) * s.to(w.dtype)
            source = w[:, q].clone()
            error = (source - rounded[:, 0]) / upper[q, q]
            w[:, q + 1 : end] -= torch.outer(error, upper[q, q + 1 : end])
            w[:, q + 1 : end] += torch.outer(source, feedback[q, q + 1 : end])
            errors[:, q - start], sources[:, q - start] = error, source
        w[:, end:] -= errors @ upper[start:end, end:] - sources @ feedback[start:end, end:]
    quantized = QuantizedWeight(grid, codes[:, torch.argsort(order)], scale, zero)
    loss = asymmetric_loss(problem, quantized)
    return GPTQResult(quantized, problem.damping, problem.attempts, loss, int(problem.dead.sum()))


@dataclass(frozen=True, eq=False)
class TwoPathProblem:
    """Checked and factored arguments of a solver of two paths, all in the type it computes in.

    Attributes:
        weight: [out, in].
        hessian: [in, in], undamped.
        cross: [in, in]; zero in the columns of dead channels.
        dead: [in], input channels whose Hessian diagonal is zero.
        order: [in], the columns in the order of solving.
        upper: [in, in], upper triangular U with UᵀU = (H + ridge·I)⁻¹, columns in that order; the diagonal of a dead
            channel here is the mean of the others.
        ridge: damping · mean(diag H), over the channels that are not dead.
        damping: Relative damping the factorization succeeded with.
        attempts: Factorizations tried.
    """

    weight: Tensor
    hessian: Tensor
    cross: Tensor
    dead: Tensor
    order: Tensor
    upper: Tensor
    ridge: float
    damping: float
    attempts: int


def prepare(weight: Tensor, hessian: Tensor, cross: Tensor, *, act_order: bool, damping: float) -> TwoPathProblem:
    """Checks, orders and factors; see `gptaq` for the arguments and errors."""
    columns = weight.shape[1]
    for name, matrix in (("hessian", hessian), ("cross", cross)):
        if matrix.shape != (columns, columns):
            raise ValueError(f"{name}: shape {tuple(matrix.shape)}, expected ({columns}, {columns})")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (weight, hessian, cross)):
        raise ValueError("weight, hessian and cross must be finite; one holds NaN or infinity")
    if not 0 < damping <= 1:
        raise ValueError(f"damping: {damping}; valid: in (0, 1]")
    dtype = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    hessian = hessian.to(dtype)
    dead = hessian.diagonal() == 0
    order, (upper, used, attempts) = _ordered_factor(hessian, dead, act_order, damping)
    live = columns - int(dead.sum())
    ridge = used * (float(hessian.trace()) / live if live else 1.0)
    cross = torch.where(dead, 0.0, cross.to(dtype))
    return TwoPathProblem(weight.to(dtype), hessian, cross, dead, order, upper, ridge, used, attempts)


def asymmetric_loss(problem: TwoPathProblem, quantized: QuantizedWeight) -> float:
    """Returns Tr(ΔW H ΔWᵀ) − 2 Tr(W C ΔWᵀ), ΔW = Ŵ − W.

    That is E‖W x − Ŵ x̃‖² − E‖W x − W x̃‖²: the objective of GPTAQ and Qronos, less what not rounding at all would leave,
    which does not depend on Ŵ and which H and C do not tell. So it is negative where Ŵ does better than W itself, and
    with C = 0 it is GPTQ's loss.
    """
    delta = quantized.dequantize(problem.weight.dtype) - problem.weight
    return float(((delta @ problem.hessian - 2 * problem.weight @ problem.cross) * delta).sum())
