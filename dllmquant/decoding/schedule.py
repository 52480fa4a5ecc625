"""How many masked tokens each denoising step commits."""

import torch
from torch import Tensor


def transfer_counts(mask_counts: Tensor, steps: int) -> Tensor:
    """Spread each row's masked tokens over the steps of a block.

    LLaDA (arXiv 2502.09992) discretises its linear noise schedule uniformly, so the expected number of tokens that
    become visible is the same at every step. With ``n`` masked tokens, step ``i`` commits ``n // steps`` of them, and
    one more while ``i < n % steps``: for ``n = 11`` and ``steps = 4`` that is ``3, 3, 3, 2``.

    Args:
        mask_counts: Integer tensor ``[B]``, the masked tokens of each row's block, all at least 0.
        steps: The number of denoising steps of the block, at least 1.

    Returns:
        int64 tensor ``[B, steps]`` on the device of ``mask_counts``; every row sums to its count, never increases from
        one step to the next, and contains zeros only if the row has fewer masked tokens than steps.

    Raises:
        ValueError: If ``steps`` is below 1, or ``mask_counts`` is not a one-dimensional integer tensor or has a
            negative entry.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; valid: an integer of at least 1")
    if mask_counts.dim() != 1 or mask_counts.dtype.is_floating_point or mask_counts.dtype == torch.bool:
        raise ValueError(
            f"mask_counts has shape {tuple(mask_counts.shape)} and dtype {mask_counts.dtype}; "
            "valid: a one-dimensional integer tensor"
        )
    if bool((mask_counts < 0).any()):
        raise ValueError(f"mask_counts has minimum {int(mask_counts.min())}; valid: counts of at least 0")
    counts = mask_counts.to(torch.int64).unsqueeze(1)
    step = torch.arange(steps, device=mask_counts.device)
    return counts // steps + (step < counts % steps).to(torch.int64)


def transfer_fractions(steps: int, eps: float) -> Tensor:
    """The share of the masked tokens that each step along Dream's timesteps commits.

    Time runs from 1 to ``eps`` in equal steps, ``t = 1 - i (1 - eps) / steps``. A token that is masked at ``t`` is
    still masked at ``s`` with probability ``s / t``, so a step commits the share ``1 - s / t``, and the last step
    everything. Computed in float32 as Dream's published code does: where share times count is an integer but for
    rounding, it decides which.

    Args:
        steps: The number of steps, at least 1.
        eps: The last time, in (0, 1).

    Returns:
        float32 ``[steps]`` on the CPU, increasing; the last entry is 1.

    Raises:
        ValueError: If ``steps`` is below 1 or ``eps`` lies outside (0, 1).
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; valid: an integer of at least 1")
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps is {eps}; valid: a number between 0 and 1")
    times = torch.linspace(1.0, eps, steps + 1, dtype=torch.float32)
    fractions = 1 - times[1:] / times[:-1]
    fractions[-1] = 1.0
    return fractions
