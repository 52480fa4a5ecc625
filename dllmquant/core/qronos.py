"""Qronos (arXiv 2505.11695): every column targets the full-precision output; past errors first, then the future.

With x a token's input in the full-precision path and x̃ in the quantized one it minimises E‖W x − Ŵ x̃‖², E the weighted
mean over tokens, by two steps per column t (w its current weights, F the columns after t):

    correct   ŵ_t = round(argmin_p E‖W x − Σ_{j<t} ŵ_j x̃_j − p x̃_t − w_F x̃_F‖²)
    diffuse   w_F = argmin_v E‖W x − Σ_{j≤t} ŵ_j x̃_j − v x̃_F‖²

From the second column on, w already is the joint minimiser over all columns not yet rounded, so "correct" rounds w_t as
it stands and "diffuse" is GPTQ's update. Only the first column is another matter: it is rounded from

    v_1 = w_1 + (W C)_1 / H_11,        H = E x̃ x̃ᵀ,  C = E (x − x̃) x̃ᵀ,

its best value beside the *original* other columns, and not from the first column of W* = W (H + C) H⁻¹, which minimises
E‖W x − W* x̃‖² over all columns at once. So Qronos *is* GPTQ on H, started not from W but from V = (v_1, v_F), with the
others at their least-squares answer to v_1,

    v_F = w*_F − (w*_1 − v_1) U_1F / U_11,        H⁻¹ = UᵀU.

That is how it is computed here; the tests hold it against the two steps taken literally. GPTQ from W* would be the same
but for what the first column is rounded from. With C = 0 both are GPTQ.

1. Groups and their scales belong to V, the weights that get rounded: fitted when a group's first column is reached, or
   up front with `act_order`. The paper takes the grid as given.
2. Damping adds λ·mean(diag H) to H and nothing to C, as if x and x̃ carried the same white noise, and does so
   everywhere; the authors' code leaves the H_11 above undamped. W* = W + W C H⁻¹ thus goes back to W as λ grows.
3. The first column is the first that is not dead (x̃ = 0 on every token). Dead ones are set to zero, and what they gave
   the full-precision output is left for the others to make up.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dllmquant.core.gptaq import TwoPathProblem, asymmetric_loss, prepare
from dllmquant.core.gptq import GPTQResult, gptq
from dllmquant.core.grid import Clip, Grid


def qronos(
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
        act_order: Solve columns in order of decreasing Hessian diagonal, as in `gptq`.
        damping: As in `gptq`, with the same escalation.
        block_size: Columns per lazy update; does not change the result beyond rounding.
        clip: How group ranges are fitted, weighted by diag(H); see `fit_scale`.

    Returns:
        What `gptq` returns, but `loss` is `asymmetric_loss`.

    Raises:
        ValueError: A shape does not fit, an input is not finite, the group size does not divide the columns, or no
            damping up to 1 makes the Hessian positive definite.
    """
    problem = prepare(weight, hessian, cross, act_order=act_order, damping=damping)
    result = gptq(
        _corrected(problem),
        problem.hessian,
        grid,
        act_order=act_order,
        damping=damping,
        block_size=block_size,
        clip=clip,
    )
    return replace(result, loss=asymmetric_loss(problem, result.weight))


def _corrected(problem: TwoPathProblem) -> Tensor:
    """Returns V, the weights GPTQ starts from."""
    order, upper = problem.order, problem.upper
    gain = (problem.weight @ problem.cross)[:, order]  # W C
    start = problem.weight[:, order] + gain @ upper.T @ upper  # W*
    first = int((~problem.dead[order]).to(torch.uint8).argmax())
    column = order[first]
    alone = problem.weight[:, column] + gain[:, first] / (problem.hessian[column, column] + problem.ridge)
    excess = (start[:, first] - alone) / upper[first, first]
    start[:, first + 1 :] -= torch.outer(excess, upper[first, first + 1 :])
    start[:, first] = alone
    return start[:, torch.argsort(order)]
