"""What transforms of weights share: moving channel scales between layers, and the check that nothing else changed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MASK_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def at_least(magnitudes: Tensor, share: float = 1e-4) -> Tensor:
    """Raises channel magnitudes [in] to at least `share` of the largest, so that ratios of them stay moderate."""
    return magnitudes.clamp(min=float(magnitudes.max()) * share)


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    """Returns the linear layer at `path`.

    Raises:
        ValueError: The module there is not an `nn.Linear`.
    """
    found = module.get_submodule(path)
    if not isinstance(found, nn.Linear):
        raise ValueError(f"{path}: a {type(found).__name__}; valid: nn.Linear, not yet quantized")
    return found


@torch.no_grad()
def apply_scales(block: nn.Module, producer: str, consumers: Sequence[str], scales: Tensor) -> None:
    """Divides a producer's output channels by `scales` and multiplies its consumers' input channels by them, in place.

    The activation in between becomes x / s, each consumer's weight W diag(s); their products, and so the function,
    stay the same up to rounding. Computed in float64, stored in the parameters' own dtype. Nothing is written unless
    everything can be.

    Args:
        block: The transformer block.
        producer: Path of a norm (its gain and, if any, bias are divided) or of a linear layer (rows of its weight, and
            bias).
        consumers: Paths of all linear layers that read the producer's output.
        scales: Float [channels], positive and finite.

    Raises:
        ValueError: A scale is not positive and finite, a shape does not fit, a consumer is not `nn.Linear`, or a result
            overflows the dtype it is stored in; the message names the layer.
    """
    if scales.ndim != 1 or not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"scales of {producer}: valid: one finite positive number per channel")
    wide = scales.double()
    changes: list[tuple[Tensor, Tensor]] = []

    def plan(name: str, parameter: Tensor, axis: int, factors: Tensor) -> None:
        if parameter.shape[axis] != len(factors):
            raise ValueError(f"scales: {len(factors)} channels; {name} has {parameter.shape[axis]}")
        factors = factors.to(parameter.device)
        factors = factors[:, None] if axis == 0 and parameter.ndim == 2 else factors
        scaled = (parameter.double() * factors).to(parameter.dtype)
        if not bool(torch.isfinite(scaled).all()):
            raise ValueError(f"{name}: overflows {parameter.dtype} when scaled (largest scale {float(scales.max()):g})")
        changes.append((parameter, scaled))

    for parameter in block.get_submodule(producer).parameters(recurse=False):
        plan(producer, parameter, 0, 1 / wide)
    for consumer in consumers:
        plan(consumer, linear_at(block, consumer).weight, 1, wide)
    for target, scaled in changes:
        target.copy_(scaled)


@torch.no_grad()
def probe_logits(
    denoise: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    attention_mask: Tensor,
    mask_id: int | Tensor,
    *,
    ratios: Sequence[float] = MASK_RATIOS,
    seed: int = 0,
) -> Tensor:
    """Returns a model's logits on texts masked to several degrees, for `assert_same_function`.

    Args:
        denoise: (ids, attention mask) -> logits, as `ModelAdapter.denoiser` returns it.
        ids: Token ids [batch, length].
        attention_mask: [batch, length], nonzero on real tokens; only these are masked.
        mask_id: The mask token; or what stands at masked positions, int64 [batch, length].
        ratios: Shares of each row's real tokens to mask.
        seed: Seed of which tokens.

    Returns:
        Logits [ratios, batch, length, vocabulary], on the CPU.
    """
    keep = attention_mask.bool()
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).to(ids.device)
    rank = order.masked_fill(~keep, torch.inf).argsort(-1).argsort(-1)  # padding ranks last
    count = keep.sum(-1, keepdim=True)
    # the CPU has room for them
    return torch.stack([denoise(ids.where(rank >= ratio * count, mask_id), attention_mask).cpu() for ratio in ratios])


def rounding_tolerance(model: nn.Module) -> float:
    """Returns √ε of the coarsest floating type among the parameters: what `assert_same_function` may blame on rounding.

    To be asked outside `in_float32`, of the type the weights are stored in. A transform that preserves the function
    rounds every weight once more, which moves logits by a small multiple of ε that grows like the square root of the
    depth; one that does not moves them by the size of what was forgotten, such as the spread of a norm's gains. √ε lies
    between the two in every type: 1.5e-8 (float64), 3e-4 (float32), 0.03 (float16), 0.09 (bfloat16). Measured on the
    bundled five-block model in `in_float32`, both rotations: 1e-14, 3e-6, 1.2e-3, 0.011.
    """
    return float(max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()) ** 0.5)


def assert_same_function(
    before: Tensor, after: Tensor, attention_mask: Tensor, *, transform: str, tolerance: float
) -> float:
    """Checks that a transform left a model's logits as they were.

    The deviation is ‖after − before‖ / ‖before − its mean over the vocabulary‖ (Frobenius, real tokens only), the
    largest over mask ratios. The mean is subtracted because an offset common to all tokens says nothing.

    Args:
        before: `probe_logits` of the model before, [ratios, batch, length, vocabulary].
        after: The same of the model after.
        attention_mask: [batch, length], nonzero on real tokens.
        transform: The transform's name, for the message.
        tolerance: Largest deviation accepted; see `rounding_tolerance`.

    Returns:
        The deviation.

    Raises:
        ValueError: The deviation exceeds the tolerance, or a logit is not finite.
    """
    keep = attention_mask.bool().to(before.device)
    deviations = []
    for old, new in zip(before, after, strict=True):
        reference = old[keep].to(torch.promote_types(old.dtype, torch.float32))
        centred = reference - reference.mean(-1, keepdim=True)
        difference = new[keep].to(reference) - reference
        deviations.append(float(difference.norm() / centred.norm().clamp(min=torch.finfo(reference.dtype).tiny)))
    for deviation in deviations:
        if not deviation <= tolerance:  # also when it is NaN
            raise ValueError(
                f"{transform}: changes what the model computes: its logits deviate by {deviation:.2g} "
                f"(valid: at most {tolerance:.2g}); do the adapter's paths name everything it touches?"
            )
    return max(deviations)
