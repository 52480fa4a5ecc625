"""TMAS, Temporal-Mask Adaptive Sampling (DLLMQuant, arXiv 2508.14090): which recorded states calibrate the model.

The denoising trajectory is cut into equal segments; each gives a fixed share of the states, [0.3, 0.2, 0.2, 0.3] for
four quarters in the paper. Choices where the paper is silent: the segments have equal numbers of steps; inside a
segment the states are stratified by mask ratio (sorted by it and cut into as many equal strata as states are wanted,
one drawn from each, equal ratios in the order of their blocks); of a stratum's states, one of the prompt that has given
the fewest so far is drawn at random; nothing is drawn twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateIndex:
    """A recorded state: the step `step` of trajectory (prompt) `trajectory`."""

    trajectory: int
    step: int


@dataclass(frozen=True)
class Selection:
    """The chosen states.

    Attributes:
        states: The states, segment by segment.
        counts: States taken from each segment.
        requested: States each segment's quota asked for.
        notes: What differs from the request, in words; empty when nothing does.
    """

    states: tuple[StateIndex, ...]
    counts: tuple[int, ...]
    requested: tuple[int, ...]
    notes: tuple[str, ...]


def select_states(
    mask_ratio: Tensor,
    valid: Tensor,
    block: Tensor,
    *,
    num_states: int,
    quotas: Sequence[float] = (0.3, 0.2, 0.2, 0.3),
    generator: torch.Generator,
) -> Selection:
    """Selects calibration states by trajectory segment and mask ratio.

    Args:
        mask_ratio: Float [prompts, steps], the share of the generation that is masked.
        valid: bool [prompts, steps], which steps exist; segments are parts of a prompt's existing steps.
        block: int64 [prompts, steps] or [steps], the decoding block of each step.
        num_states: How many states to select.
        quotas: Share of the states per segment, first to last; non-negative, summing to 1.
        generator: Randomness; equal generators give equal selections.

    Raises:
        ValueError: Shapes differ, quotas are invalid, or there are fewer valid states than `num_states`.
    """
    if valid.ndim == 2 and block.shape == valid.shape[1:]:
        block = block.expand(valid.shape)
    if not mask_ratio.shape == valid.shape == block.shape or valid.ndim != 2:
        raise ValueError(
            f"mask_ratio, valid, block: shapes {tuple(mask_ratio.shape)}, {tuple(valid.shape)}, {tuple(block.shape)}; "
            "valid: one common [prompts, steps]"
        )
    if not quotas or min(quotas) < 0 or abs(sum(quotas) - 1) > 1e-6:
        raise ValueError(f"quotas: {tuple(quotas)}; valid: non-negative and summing to 1")
    available = int(valid.sum())
    if not 1 <= num_states <= available:
        raise ValueError(f"num_states: {num_states}; valid: 1 to {available}, the recorded states")
    steps = valid.sum(1, keepdim=True).clamp(min=1)
    segment = torch.where(valid, (valid.cumsum(1) - 1) * len(quotas) // steps, -1)
    capacity = [int((segment == index).sum()) for index in range(len(quotas))]
    requested = _largest_remainder(num_states, quotas)
    counts, notes = _redistribute(requested, capacity)
    states: list[StateIndex] = []
    for index, count in enumerate(counts):
        states += _stratified(segment == index, mask_ratio, block, count, generator)
    return Selection(tuple(states), tuple(counts), tuple(requested), tuple(notes))


def _largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Integers closest to `total`·shares that sum to `total`; ties go to the earlier segment."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _redistribute(requested: Sequence[int], capacity: Sequence[int]) -> tuple[list[int], list[str]]:
    """Caps each segment at what it holds and gives the rest to the others, one by one, to the least filled first."""
    counts = [min(want, have) for want, have in zip(requested, capacity, strict=True)]
    notes = [
        f"segment {index + 1} of {len(requested)} holds {have} states, its quota asks for {want}; "
        f"{want - have} redistributed"
        for index, (want, have) in enumerate(zip(requested, capacity, strict=True))
        if have < want
    ]
    for _ in range(sum(requested) - sum(counts)):
        open_segments = [index for index, have in enumerate(capacity) if counts[index] < have]
        counts[min(open_segments, key=lambda index: (counts[index] / capacity[index], index))] += 1
    return counts, notes


def _stratified(
    candidates: Tensor, mask_ratio: Tensor, block: Tensor, count: int, generator: torch.Generator
) -> list[StateIndex]:
    """Draws `count` candidates, one from each equal stratum of the order by mask ratio."""
    where = candidates.nonzero()
    where = where[torch.randperm(len(where), generator=generator)]
    ratio, blocks = mask_ratio[where[:, 0], where[:, 1]], block[where[:, 0], where[:, 1]]
    order = sorted(range(len(where)), key=lambda i: (float(ratio[i]), int(blocks[i])))
    edges = [len(order) * i // count for i in range(count + 1)] if count else [0]
    used = torch.zeros(candidates.shape[0], dtype=torch.long)
    chosen = []
    for low, high in pairwise(edges):
        stratum = [order[position] for position in range(low, high)]
        pick = min(stratum, key=lambda i: (int(used[where[i, 0]]), i))  # i is a place in the shuffle: ties are random
        used[where[pick, 0]] += 1
        chosen.append(StateIndex(int(where[pick, 0]), int(where[pick, 1])))
    return chosen
