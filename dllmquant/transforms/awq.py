"""AWQ (arXiv 2306.00978): channel scales, then clipped ranges, that protect the weights large activations meet.

Scaling (eq. 4 and 5): with input x / s and weight W diag(s), the rounding error of a weight meets x_i / s_i.
s = (mean |x_i|)^β, β searched in [0, 1], divided by √(max s · min s); the loss is the error of what is computed from
the quantized layers. Clipping: per row and group, the shrunken range with the least error of the group's output.

Choices where the paper is silent, or its code (llm-awq) differs:
    1. Losses weigh tokens: Σ_j w_j ‖error_j‖² / Σ_j w_j. Padding has weight 0.
    2. The grid is k / n for k = 0 … n; llm-awq leaves out β = 1. Scales of 1 are always tried, and win ties.
    3. Channels with mean |x| = 0 keep s = 1. Other means count as at least 1e-4 of the largest; llm-awq clamps s to
       1e-4, which depends on the activations' unit.
    4. Clipping shrinks both ends of an asymmetric range by one ratio; llm-awq clamps to ±max|w| · ratio. The ratios go
       down to 0.5 in 20 steps, the loss is Δ_g H_gg Δ_gᵀ, which is llm-awq's over all tokens instead of a sample.
       llm-awq does not clip the query and key projections; whom to clip is the caller's choice.
    5. Where a Hadamard matrix T rotates the input behind the scales, what is rounded is rotated: A((x / s) T) and
       Q(W diag(s) T⁻ᵀ). Transforms that are fitted to data are fitted later; the search does not know them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dllmquant.core.grid import Grid, QuantizedWeight, fit_scale, quantize_to_grid
from dllmquant.core.rtn import rtn
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.transform import InputTransform
from dllmquant.transforms.fold import at_least, linear_at

Objective = Callable[[Tensor], float]
"""The loss of channel scales [in]."""


@dataclass(frozen=True, eq=False)
class ScaleSearch:
    """What the scale search found.

    Attributes:
        scales: float64 [in], positive; for `apply_scales`.
        beta: The exponent; None if scales of 1 were best.
        loss: The loss with these scales, at most `unscaled_loss`.
        unscaled_loss: The loss with scales of 1.
    """

    scales: Tensor
    beta: float | None
    loss: float
    unscaled_loss: float


def search_scales(
    mean_abs: Tensor, evaluate: Objective, *, grid_points: int = 20, weight_mean: Tensor | None = None
) -> ScaleSearch:
    """Searches the exponent β of s = mean_abs^β, normalised by √(max s · min s).

    Args:
        mean_abs: Float [in], not negative: the weighted mean of |x| per channel.
        evaluate: The loss of scales [in].
        grid_points: n of the grid β = k / n, k = 0 … n.
        weight_mean: Float [in], not negative, such as `mean_magnitude`: with it, s = mean_abs^β / weight_mean^(1−β), as
            in AutoAWQ's duo scaling.

    Returns:
        The scales with the least loss. Channels with a mean of 0 keep scale 1.

    Raises:
        ValueError: `grid_points` is below 1, a mean is negative, not finite or of a wrong shape, or the loss of
            scales of 1 is not finite.
    """
    if grid_points < 1:
        raise ValueError(f"grid_points: {grid_points}; valid: at least 1")
    for name, mean in (("mean_abs", mean_abs), ("weight_mean", weight_mean)):
        if mean is not None and (
            mean.ndim != 1 or mean.shape != mean_abs.shape or not bool((torch.isfinite(mean) & (mean >= 0)).all())
        ):
            raise ValueError(f"{name}: shape {tuple(mean.shape)}; valid: one finite number per channel, none negative")
    w = torch.ones_like(mean_abs) if weight_mean is None else weight_mean
    alive = (mean_abs > 0) & (w > 0)
    unscaled = torch.ones_like(mean_abs, dtype=torch.float64)
    unscaled_loss = evaluate(unscaled)
    best = ScaleSearch(unscaled, None, unscaled_loss, unscaled_loss)
    if not unscaled_loss < float("inf"):
        raise ValueError(f"evaluate: scales of 1 have the loss {unscaled_loss}; valid: a finite number")
    if not bool(alive.any()):
        return best
    x, w = at_least(mean_abs[alive].double()), at_least(w[alive].double())
    for step in range(grid_points + 1):
        beta = step / grid_points
        scales = x**beta / w ** (1 - beta)
        candidate = unscaled.clone()
        candidate[alive] = scales / (scales.max() * scales.min()).sqrt()
        loss = evaluate(candidate)
        if loss < best.loss:
            best = ScaleSearch(candidate, beta, loss, unscaled_loss)
    return best


def mean_magnitude(weights: Sequence[Tensor], grid: Grid) -> Tensor:
    """Returns the mean of |w| / max|w of its group| over all rows of the weights [out, in], float64 [in]."""
    width = grid.width(weights[0].shape[1])
    groups = rearrange(torch.cat(tuple(weights)).double().abs(), "out (g i) -> out g i", i=width)
    largest = groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return (groups / largest).flatten(1).mean(0)


def linear_objective(
    weights: Sequence[Tensor],
    x: Tensor,
    token_weights: Tensor,
    grid: Grid,
    activation: ActivationScheme | None = None,
    transform: InputTransform | None = None,
) -> Objective:
    """Returns the loss of scales at the outputs of the layers that share an input.

    L(s) = Σ_j w_j Σ_l ‖x_j W_lᵀ − A((x_j / s) T) Q(W_l diag(s) T⁻ᵀ)ᵀ‖² / Σ_j w_j, with Q round-to-nearest on `grid` and
    A the activation's rounding. Computed in float32, or float64 if `x` is.

    Args:
        weights: The layers' weights [out, in].
        x: Tokens [n, in].
        token_weights: Float [n], not negative; tokens of weight 0 are dropped.
        grid: The weights' grid.
        activation: The activations' scheme, or None where they stay in 16 bits.
        transform: T, of the scaled input; None for none.

    Raises:
        ValueError: Shapes do not fit, a token weight is negative or not finite, or no token has a positive one.
    """
    if x.ndim != 2 or token_weights.shape != x.shape[:1]:
        raise ValueError(f"token_weights: shape {tuple(token_weights.shape)}, tokens {tuple(x.shape)}; valid: one each")
    _check_token_weights(token_weights)
    if any(weight.ndim != 2 or weight.shape[1] != x.shape[1] for weight in weights):
        raise ValueError(f"weights: shapes {[tuple(w.shape) for w in weights]}; valid: [out, {x.shape[1]}]")
    used = token_weights > 0
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens, share = x[used].to(dtype), token_weights[used].to(dtype)
    share = share / share.sum()
    stacked = torch.cat([weight.to(dtype) for weight in weights])  # rows are rounded independently
    reference = tokens @ stacked.T

    def evaluate(scales: Tensor) -> float:
        scales = scales.to(tokens)
        scaled, scaled_weights = tokens / scales, stacked * scales
        if transform is not None:
            scaled, scaled_weights = transform(scaled), transform.inverse_transpose_weight(scaled_weights)
        if activation is not None:
            scaled = quantize_activation(scaled, activation)
        error = scaled @ rtn(scaled_weights, grid).dequantize(dtype).T - reference
        return float((error.square().sum(-1) * share).sum())

    return evaluate


def sub_block_objective(
    block: nn.Module,
    consumers: Sequence[str],
    run: Callable[[], Iterable[Tensor]],
    token_weights: Sequence[Tensor],
    grid: Grid,
    activation: ActivationScheme | None = None,
    transform: InputTransform | None = None,
) -> Objective:
    """Returns the loss of scales at the output of a sub-block (attention, feed-forward), through its nonlinearities.

    L(s) = Σ_j w_j ‖y_j − ŷ_j(s)‖² / Σ_j w_j with y the sub-block's output as it is now and ŷ that with the consumers'
    weights Q(W diag(s) T⁻ᵀ) and inputs A((x / s) T). The scales stay inside the consumers while the block runs, so the
    producer is not touched, and the block is as before after every evaluation.

    Args:
        block: The transformer block.
        consumers: Paths of all linear layers that read the scaled input, relative to the block.
        run: Runs the block on every batch and yields the sub-block's outputs [batch, length, width]; with `BlockCall`s,
            `lambda: (output_of(block, block.attn_out, call) for call in calls)`.
        token_weights: Per batch, float [batch, length], not negative; tokens of weight 0 are left out.
        grid: The weights' grid.
        activation: The activations' scheme, or None where they stay in 16 bits.
        transform: T, of the scaled input; None for none.

    Raises:
        ValueError: A consumer is not `nn.Linear`, a token weight is negative or not finite, or no token has a positive
            one. When evaluated: as `rtn`, or `run` yields not one output per batch.
    """
    linears = [linear_at(block, consumer) for consumer in consumers]
    total = _check_token_weights(torch.cat([weights.flatten() for weights in token_weights]))

    def outputs() -> Iterator[Tensor]:
        """The tokens that count, in at least float32, each times √w."""
        for output, weights in zip(run(), token_weights, strict=True):
            used = weights > 0
            wide = output[used].to(torch.promote_types(output.dtype, torch.float32))
            yield wide * weights[used].to(wide).sqrt()[:, None]

    with torch.no_grad():
        reference = list(outputs())

    @torch.no_grad()
    def evaluate(scales: Tensor) -> float:
        with _fake_quantized(linears, scales, grid, activation, transform):
            pairs = zip(outputs(), reference, strict=True)
            return sum(float((output - target).square().sum()) for output, target in pairs) / total

    return evaluate


@contextmanager
def _fake_quantized(
    linears: Sequence[nn.Linear],
    scales: Tensor,
    grid: Grid,
    activation: ActivationScheme | None,
    transform: InputTransform | None,
) -> Iterator[None]:
    """While the context lasts, the layers compute A((x / s) T) Q(W diag(s) T⁻ᵀ)ᵀ + b."""

    def round_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if transform is None:  # the layers hold Q(W diag(s)) diag(1/s): what is not rounded stays exactly as it is
            factors = scales.to(x)
            return (x if activation is None else quantize_activation(x / factors, activation) * factors, *args[1:])
        seen = transform(x / scales.to(x))
        return (seen if activation is None else quantize_activation(seen, activation), *args[1:])

    originals = [linear.weight.data for linear in linears]
    handles = [linear.register_forward_pre_hook(round_input) for linear in linears]
    try:
        for linear, original in zip(linears, originals, strict=True):
            factors = scales.to(original.device, torch.promote_types(original.dtype, torch.float32))
            scaled = original.to(factors) * factors
            if transform is None:
                linear.weight.data = (rtn(scaled, grid).dequantize(factors.dtype) / factors).to(original.dtype)
            else:
                rotated = rtn(transform.inverse_transpose_weight(scaled), grid)
                linear.weight.data = rotated.dequantize(factors.dtype).to(original.dtype)
        yield
    finally:
        for handle, linear, original in zip(handles, linears, originals, strict=True):
            handle.remove()
            linear.weight.data = original


def search_clip(
    weight: Tensor, hessian: Tensor, grid: Grid, *, steps: int = 20, smallest: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Fits the ranges of a weight's groups to the error of each group's output.

    Per row and group the range is shrunk to r = 1 … `smallest` and the first with the least Δ_g H_gg Δ_gᵀ is kept, Δ_g
    the error of rounding the group's weights and H_gg the group's block of the Hessian: the exact weighted mean square
    of the group's contribution to the output's error. The full range is tried, so no group is worse than without.

    Args:
        weight: Float [out, in].
        hessian: Float [in, in]; float64 makes the losses float64.
        grid: The grid.
        steps: Ratios tried below 1.
        smallest: The last of them.

    Returns:
        scale, float16 [out, groups], and zero, uint8 [out, groups], as `fit_scale`; for round-to-nearest.

    Raises:
        ValueError: As `fit_scale`; or the Hessian does not fit or is not finite, `steps` is below 1, or `smallest` is
            outside (0, 1).
    """
    if steps < 1 or not 0 < smallest < 1:
        raise ValueError(f"steps: {steps}, smallest: {smallest}; valid: at least 1, and in (0, 1)")
    columns = weight.shape[-1]
    if hessian.shape != (columns, columns) or not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"hessian: shape {tuple(hessian.shape)}; valid: finite numbers, ({columns}, {columns})")
    dtype = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    wide, width = weight.to(dtype), grid.width(columns)
    best_scale, best_zero = fit_scale(wide, grid)
    groups = rearrange(wide, "out (g i) -> g out i", i=width)
    blocks = torch.stack([hessian[i : i + width, i : i + width] for i in range(0, columns, width)]).to(dtype)

    def loss(scale: Tensor, zero: Tensor) -> Tensor:
        restored = QuantizedWeight(grid, quantize_to_grid(wide, scale, zero, grid), scale, zero).dequantize(dtype)
        delta = groups - rearrange(restored, "out (g i) -> g out i", i=width)
        return ((delta @ blocks) * delta).sum(-1).T

    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best_loss = loss(best_scale, best_zero)
    for step in range(1, steps + 1):
        ratio = 1 - (1 - smallest) * step / steps
        clipped = groups.clamp(low * ratio, high * ratio)
        scale, zero = fit_scale(rearrange(clipped, "g out i -> out (g i)"), grid)
        found = loss(scale, zero)
        better = found < best_loss
        best_loss = torch.where(better, found, best_loss)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _check_token_weights(weights: Tensor) -> float:
    """Returns the sum of token weights after checking them."""
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool((weights > 0).any()):
        raise ValueError("token_weights: valid weights are finite and not negative, and one at least is positive")
    return float(weights.sum(dtype=torch.float64))
