"""TMAS, Temporal-Mask Adaptive Sampling (DLLMQuant, arXiv 2508.14090): which recorded states calibrate the model.

The denoising trajectory is cut into equal segments; each gives a fixed share of the states, [0.3, 0.2, 0.2, 0.3] for
four quarters in the paper. Choices where the paper is silent: the segments have equal numbers of steps; inside a
segment the states are stratified by mask ratio (sorted by it and cut into as many equal strata as states are wanted,
one drawn from each, equal ratios in the order of their blocks); of a stratum's states, one of the prompt that has given
the fewest so far is drawn at random; nothing is drawn twice; if buckets of mask ratios are asked for, a segment that
holds states of a bucket but gave none exchanges one of its fullest bucket; a segment of quota 0 gives states only when
the others hold no more.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dllmquant.core.coverage import Table, bucket_of, tabulate


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
        recorded: States each segment and mask-ratio bucket held to select from.
        notes: What differs from the request, in words; empty when nothing does.
    """

    states: tuple[StateIndex, ...]
    counts: tuple[int, ...]
    requested: tuple[int, ...]
    recorded: Table
    notes: tuple[str, ...]

    @property
    def segments(self) -> tuple[int, ...]:
        """The segment of each state."""
        return tuple(segment for segment, count in enumerate(self.counts) for _ in range(count))


def select_states(
    mask_ratio: Tensor,
    valid: Tensor,
    block: Tensor,
    *,
    num_states: int,
    quotas: Sequence[float] = (0.3, 0.2, 0.2, 0.3),
    mask_ratio_buckets: int = 1,
    generator: torch.Generator,
) -> Selection:
    """Selects calibration states by trajectory segment and mask ratio.

    Args:
        mask_ratio: Float [prompts, steps], the share of the generation that is masked.
        valid: bool [prompts, steps], which steps exist; segments are parts of a prompt's existing steps.
        block: int64 [prompts, steps] or [steps], the decoding block of each step.
        num_states: How many states to select.
        quotas: Share of the states per segment, first to last; non-negative, summing to 1.
        mask_ratio_buckets: Equal intervals of the mask ratio (`core.coverage`) that each segment must give states of
            where it holds some, as far as its states go round; 1 asks for nothing.
        generator: Randomness; equal generators give equal selections.

    Raises:
        ValueError: Shapes differ, quotas or buckets are invalid, or there are fewer valid states than `num_states`.
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
    counts, notes = _redistribute(requested, capacity, quotas)
    bucket = bucket_of(mask_ratio, mask_ratio_buckets)
    states: list[StateIndex] = []
    for index, count in enumerate(counts):
        states += _stratified(segment == index, mask_ratio, block, bucket, count, generator)
    recorded = tabulate(segment[valid], bucket[valid], segments=len(quotas), buckets=mask_ratio_buckets)
    return Selection(tuple(states), tuple(counts), tuple(requested), recorded, tuple(notes))


def _largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Integers closest to `total`·shares that sum to `total`; ties go to the earlier segment."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _redistribute(
    requested: Sequence[int], capacity: Sequence[int], quotas: Sequence[float]
) -> tuple[list[int], list[str]]:
    """Caps each segment at what it holds and gives the rest to the others, one by one, to the least filled first.

    Segments of quota 0 are given states only when the others have no more.
    """
    counts = [min(want, have) for want, have in zip(requested, capacity, strict=True)]
    notes = [
        f"segment {index + 1} of {len(requested)} holds {have} states, its quota asks for {want}; "
        f"{want - have} redistributed"
        for index, (want, have) in enumerate(zip(requested, capacity, strict=True))
        if have < want
    ]
    for _ in range(sum(requested) - sum(counts)):
        open_segments = [index for index, have in enumerate(capacity) if counts[index] < have]
        wanted = [index for index in open_segments if quotas[index] > 0] or open_segments
        counts[min(wanted, key=lambda index: (counts[index] / capacity[index], index))] += 1
    notes += [
        f"segment {index + 1} of {len(requested)} has quota 0 but gives {count} states: the others hold no more"
        for index, count in enumerate(counts)
        if count and not quotas[index]
    ]
    return counts, notes


def _stratified(
    candidates: Tensor, mask_ratio: Tensor, block: Tensor, bucket: Tensor, count: int, generator: torch.Generator
) -> list[StateIndex]:
    """Draws `count` candidates, one from each equal stratum of the order by mask ratio; then sees to the buckets."""
    where = candidates.nonzero()
    where = where[torch.randperm(len(where), generator=generator)]
    ratio, blocks = mask_ratio[where[:, 0], where[:, 1]], block[where[:, 0], where[:, 1]]
    order = sorted(range(len(where)), key=lambda i: (float(ratio[i]), int(blocks[i])))
    edges = [len(order) * i // count for i in range(count + 1)] if count else [0]
    used = torch.zeros(candidates.shape[0], dtype=torch.long)
    picks = []
    for low, high in pairwise(edges):
        stratum = [order[position] for position in range(low, high)]
        pick = min(stratum, key=lambda i: (int(used[where[i, 0]]), i))  # i is a place in the shuffle: ties are random
        used[where[pick, 0]] += 1
        picks.append(pick)
    picks = _covered(picks, bucket[where[:, 0], where[:, 1]].tolist(), where[:, 0].tolist())
    return [StateIndex(int(where[pick, 0]), int(where[pick, 1])) for pick in picks]


def _covered(picks: Sequence[int], bucket: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """Exchanges picks until every bucket with a candidate has one, or no bucket has two; the commonest buckets first.

    `bucket` and `prompt` are those of every candidate, in random order; a pick is a place in them. The pick that goes
    is of the fullest bucket and the prompt that gave the most, the one that comes of the prompt that gave the fewest.
    """
    picks = list(picks)
    if not picks:
        return picks
    held, given = Counter(bucket[i] for i in picks), Counter(prompt[i] for i in picks)
    for missing, _ in Counter(b for b in sorted(bucket) if not held[b]).most_common():
        fullest, most = held.most_common(1)[0]
        if most < 2:
            break
        spare = max((i for i in picks if bucket[i] == fullest), key=lambda i: (given[prompt[i]], i))
        given[prompt[spare]] -= 1
        gain = min((i for i in range(len(bucket)) if bucket[i] == missing), key=lambda i: (given[prompt[i]], i))
        given[prompt[gain]] += 1
        held[fullest] -= 1
        held[missing] += 1
        picks[picks.index(spare)] = gain
    return picks
