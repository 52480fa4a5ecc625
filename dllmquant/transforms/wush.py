"""WUSH (arXiv 2512.00956): the block transform that balances weights and activations, in closed form.

Within a block of b input channels let S_x = E[x xᵀ] and S_w = mean of w wᵀ over all rows w of the weights that read x,
with factors S_x = L_x L_xᵀ and S_w = L_w L_wᵀ. For any invertible T, x' = Tᵀ x has the moment Tᵀ S_x T, and w' = T⁻¹ w
the moment T⁻¹ S_w T⁻ᵀ. Rounding x' to one grid, as wide as its values, errs in every channel in proportion to
tr(Tᵀ S_x T); the error reaches the output multiplied by w', and the other way round. So the model of its energy is

    J(T) = tr(Tᵀ S_x T) · tr(T⁻¹ S_w T⁻ᵀ) = ‖Tᵀ L_x‖² · ‖T⁻¹ L_w‖²  ≥  ‖(T⁻¹ L_w)ᵀ Tᵀ L_x‖∗² = ‖L_wᵀ L_x‖∗² = (tr Σ)²,

the inequality being Cauchy's for singular values, and L_wᵀ L_x = U Σ Vᵀ. The bound does not depend on T. It is attained
by T = L_w U Σ^(−1/2) Q for any orthogonal Q, since then

    Tᵀ S_x T = Qᵀ Σ^(−1/2) Uᵀ (L_wᵀ S_x L_w) U Σ^(−1/2) Q = Qᵀ Σ Q,        because L_wᵀ S_x L_w = U Σ² Uᵀ,
    T⁻¹ S_w T⁻ᵀ = Qᵀ Σ^(1/2) Uᵀ L_w⁻¹ S_w L_w⁻ᵀ U Σ^(1/2) Q = Qᵀ Σ Q.

Both moments are the same. Q is free, and is chosen as a Hadamard matrix: then Qᵀ Σ Q has a constant diagonal, tr Σ/b,
no channel's values being larger than another's. For columns, as in the paper, Tᵀ = Qᵀ Σ^(−1/2) Uᵀ L_wᵀ.

Notes:
    1. The formula agrees with the authors' published code, with its normalization "balanced" (x' and w' have the same
       energy). The derivation is ours. The paper minimises the error of blocks scaled by their absmax, of which J is
       only the part that second moments determine; that the Hadamard matrix is near-optimal there is the paper's
       theorem, not shown here.
    2. It presumes that scales are shared within a block: `block_size` should divide the group sizes, best be equal to
       them. With one scale per token the balance holds within the blocks, not between them.
    3. Several weights that share the input share the transform; every row of each counts once.
    4. Moments are damped by `damping` · (mean diagonal of the block). That bounds the condition number of T by
       b / damping + 1, 3201 by default. A block without any energy takes the identity for its moment, so that T depends
       on the other side alone.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from dllmquant.core.hadamard import hadamard_matrix
from dllmquant.nn.transform import InputTransform, TransformStep


def fit_wush(
    hessian: Tensor, weights: Sequence[Tensor], *, block_size: int = 32, damping: float = 0.01
) -> InputTransform:
    """Fits the transform, in float64.

    Args:
        hessian: Float [in, in], the second moment of the input.
        weights: Float [out, in] each, of all linears that read the input.
        block_size: Channels per block; a Hadamard matrix of this order must exist.
        damping: Added to both moments' diagonals, relative to the mean diagonal of the block.

    Returns:
        The transform, with one block step.

    Raises:
        ValueError: A shape does not fit, there is no weight, an input is not finite, the block size does not divide the
            channels or has no Hadamard matrix, the damping is negative, or a block's moment is not positive definite
            even with it.
    """
    channels = hessian.shape[-1]
    if hessian.shape != (channels, channels):
        raise ValueError(f"hessian: shape {tuple(hessian.shape)}; valid: a square matrix")
    if not weights:
        raise ValueError("weights: empty; valid: at least one weight")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != channels:
            raise ValueError(f"weights: shape {tuple(weight.shape)}; valid: (out, {channels})")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (hessian, *weights)):
        raise ValueError("hessian and weights must be finite; one holds NaN or infinity")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping: {damping}; valid: not negative")
    step = TransformStep("block", block_size)
    blocks = channels // step.width(channels)
    q = hadamard_matrix(block_size).to(hessian.device)

    tiles = rearrange(hessian.double(), "(g i) (k j) -> g k i j", g=blocks, k=blocks)
    input_moment = tiles[torch.arange(blocks), torch.arange(blocks)]
    rows = torch.cat([weight.to(hessian.device).double() for weight in weights])
    grouped = rearrange(rows, "out (g i) -> g out i", g=blocks)
    weight_moment = grouped.mT @ grouped / len(rows)

    lower_x = _factor("hessian", input_moment, damping)
    lower_w = _factor("weights", weight_moment, damping)
    u, sigma, _ = torch.linalg.svd(lower_w.mT @ lower_x)
    transform = (lower_w @ u) * sigma.rsqrt()[:, None, :] @ q
    return InputTransform.from_tensors(channels, (step,), (transform,))


def _factor(name: str, moment: Tensor, damping: float) -> Tensor:
    """Returns the lower Cholesky factors of damped moments [blocks, b, b]."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    empty = (mean == 0).to(moment)
    damped = moment + (damping * mean + empty)[:, None, None] * identity
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(damped)
    if bool((info != 0).any()):
        raise ValueError(f"{name}: the moment of block {int(info.argmax())} is not positive definite with {damping=}")
    return lower
