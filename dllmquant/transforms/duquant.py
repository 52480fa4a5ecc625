"""DuQuant (arXiv 2406.01721): rotations fitted to outliers, and a permutation between them.

T = R₁ P R₂. R₁ and R₂ are block-diagonal rotations that shrink the largest entry of every block; P deals the channels
to the blocks so that all get their share of what is still large.

    R of a block, greedily: take the channel of the largest |x|, swap it to the front, rotate by a random orthogonal
    matrix whose first row is uniform, 1/√b everywhere, so that this channel is spread over all b, swap back; repeat,
    and keep the product up to the step with the smallest largest |x|.

    P, zigzag: channels in order of decreasing max |x| are dealt to blocks 0, 1, …, K−1, then K−1, …, 1, 0, and so on.

Choices:
    1. Every block finds its own rotation, as the paper's R is a block diagonal of different ones. The authors' code
       searches one for all blocks.
    2. The random orthogonal matrix is drawn anew at each step, uniformly among those with the uniform first row, and is
       the same for all blocks. The authors' code repeats one fixed matrix.
    3. The best step may be none at all: a block that no product improves is left alone, as in the authors' code.
    4. The peak is max |x| over the sample tokens of the block, as in the paper; the code takes max − min.
    5. The smoothing by per-channel scales that the paper applies before is a transform of its own, `smoothquant` with
       alpha 0.6 and `producers: all` (the code smooths every input, the down projection's too); the built-in recipes
       have both. The code's fixed clipping ratios, 0.9 for activations and 0.8 for weights of whole channels, are left
       out.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from dllmquant.nn.transform import InputTransform, TransformStep


def fit_duquant(samples: Tensor, *, block_size: int = 128, steps: int = 256, seed: int = 0) -> InputTransform:
    """Fits the rotations and the permutation to sample tokens.

    A rotation cannot be judged by the channels' maxima alone, because it mixes channels token by token; hence samples.

    Args:
        samples: Float [tokens, in]; a few hundred calibration tokens.
        block_size: Channels per block.
        steps: Greedy steps per rotation.
        seed: Seed of the random orthogonal matrices.

    Returns:
        The transform, with steps block, permute, block; orthogonal up to float32.

    Raises:
        ValueError: The samples are no finite, non-empty matrix, the block size does not divide their width, or `steps`
            is not positive.
    """
    if samples.ndim != 2 or len(samples) == 0 or not bool(torch.isfinite(samples).all()):
        raise ValueError(f"samples: shape {tuple(samples.shape)}; valid: a non-empty matrix of finite numbers")
    if steps < 1:
        raise ValueError(f"steps: {steps}; valid: at least 1")
    block = TransformStep("block", block_size)
    blocks = samples.shape[1] // block.width(samples.shape[1])
    generator = torch.Generator().manual_seed(seed)
    x = samples.to(torch.promote_types(samples.dtype, torch.float32))
    first = greedy_rotation(x, block_size, steps, generator)
    x = _rotate(x, first)
    permutation = zigzag(x.abs().amax(0), blocks)
    second = greedy_rotation(x[:, permutation], block_size, steps, generator)
    plan = (block, TransformStep("permute"), block)
    return InputTransform.from_tensors(samples.shape[1], plan, (first, permutation, second))


def greedy_rotation(x: Tensor, block_size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Finds one rotation per block; x' = x R.

    Args:
        x: float32 or float64 [tokens, in].
        block_size: Channels per block; divides the width.
        steps: Greedy steps.
        generator: Draws the random orthogonal matrices, on the CPU.

    Returns:
        float64 [in/block_size, block_size, block_size], orthogonal; max |x R| of no block exceeds max |x|.
    """
    current = rearrange(x, "n (g i) -> g n i", i=block_size)
    blocks = len(current)
    rotation = torch.eye(block_size, dtype=torch.float64, device=x.device).repeat(blocks, 1, 1)
    best, best_peak = rotation, current.abs().amax((1, 2))
    places = torch.arange(block_size, device=x.device).repeat(blocks, 1)
    rows = torch.arange(blocks, device=x.device)
    for _ in range(steps):
        outlier = current.abs().amax(1).argmax(1)
        swap = places.clone()
        swap[rows, outlier], swap[:, 0] = 0, outlier
        spread = uniform_first_row(block_size, generator).to(x.device)
        step = spread[swap[:, :, None], swap[:, None, :]]
        rotation = rotation @ step
        current = current @ step.to(current)
        peak = current.abs().amax((1, 2))
        better = peak < best_peak
        best = torch.where(better[:, None, None], rotation, best)
        best_peak = torch.minimum(peak, best_peak)
    return best


def uniform_first_row(size: int, generator: torch.Generator) -> Tensor:
    """Draws an orthogonal matrix, float64 [size, size], whose first row is 1/√size everywhere."""
    columns = torch.randn(size, size, dtype=torch.float64, generator=generator)
    columns[:, 0] = 1 / math.sqrt(size)
    q, r = torch.linalg.qr(columns)
    drawn: Tensor = q * r.diagonal().sign()  # the signs make it unique, and uniformly distributed
    return drawn.T.contiguous()


def zigzag(magnitude: Tensor, blocks: int) -> Tensor:
    """Deals channels to blocks in zigzag order of decreasing magnitude; of equals, the earlier comes first.

    Args:
        magnitude: Float [in].
        blocks: Number of blocks; divides the channels.

    Returns:
        int64 [in]: the channels of block 0, largest first, then those of block 1, and so on.
    """
    rounds = magnitude.argsort(descending=True, stable=True).view(-1, blocks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    rotated: Tensor = torch.einsum("ngi,gij->ngj", x.unflatten(1, rotation.shape[:2]), rotation.to(x))
    return rotated.flatten(1)
