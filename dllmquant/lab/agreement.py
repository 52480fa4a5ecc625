"""How closely a quantized model follows the original: where its own run diverges, and how it errs on the same states.

Two views. Free running: both models decode the same prompts, and the first step at which they commit something else is
where they part. Teacher forced: a model is shown the states the original passed through; it flips a state if it would
commit other positions or tokens there, and the KL divergence of its predictions says how far off they are. Only the
first view contains the consequences of an error, only the second tells the errors of the steps apart.

All functions but the last two take and return arrays; those two drive a model.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.decoding import (
    AnySamplerConfig,
    BlockDiffusionSamplerConfig,
    StateBatch,
    Trajectory,
    UniformNoiseSamplerConfig,
    commit_above_threshold,
    commit_in_block,
    commit_most_confident,
    forbid,
    frontier,
    greedy_candidates,
    guide,
)
from dllmquant.generation import generate_tokens
from dllmquant.models import adapter_for
from dllmquant.models.inference import inference

NOTHING = -1
"""Where a step commits no token, and the first diverging step of a run that never diverges."""
BUCKETS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""Ranges of the masked share of the generation region; each contains its upper end."""
# The original's predictions are kept, so with a vocabulary of 126,000 not all positions' can be.
_PREDICTION_BYTES = 2**30


@dataclass(frozen=True)
class FrontierFlips:
    """How often a model would not commit, at the original's states, what the original commits there.

    Attributes:
        states: Number of states.
        flips: States at which it commits another set of (position, token).
        position_flips: States at which it commits another set of positions, whatever the tokens.
        positions: Positions the original commits, over all states.
        token_flips: Those for which the model's most likely token is another one.
    """

    states: int
    flips: int
    position_flips: int
    positions: int
    token_flips: int


@dataclass(frozen=True)
class KLBucket:
    """KL divergence of the predictions in states of a range of mask ratios.

    Attributes:
        low: Mask ratio above which the range begins.
        high: Mask ratio with which it ends.
        positions: Masked positions measured.
        mean: Mean over them in nats; None where there are none.
    """

    low: float
    high: float
    positions: int
    mean: float | None


@dataclass(frozen=True)
class Agreement:
    """A model beside the original on the same prompts.

    Attributes:
        first_divergence: Per prompt, the first step, from 0, at which the model's own run commits something else than
            the original's; -1 for a run that never does.
        frontier: Flips at the original's states.
        kl: Divergence at the original's states, one entry for each of `BUCKETS`.
    """

    first_divergence: tuple[int, ...]
    frontier: FrontierFlips
    kl: tuple[KLBucket, ...]


def committed_tokens(trajectory: Trajectory, tokens: Tensor) -> Tensor:
    """Returns what every step committed.

    Args:
        trajectory: Of N prompts, S steps, L positions.
        tokens: int64 [N, gen_length], the finished generations.

    Returns:
        int64 [N, S, L], the token where the step committed one, -1 elsewhere.

    Raises:
        ValueError: `tokens` does not have the shape of the trajectory's generation regions.
    """
    if tuple(tokens.shape) != (trajectory.num_prompts, trajectory.gen_length):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; valid: ({trajectory.num_prompts}, {trajectory.gen_length}), "
            "the trajectory's generation regions"
        )
    # What is committed once stays, so the finished text tells the token of every step.
    final = torch.full((trajectory.num_prompts, trajectory.ids.shape[2]), NOTHING)
    final[:, -trajectory.gen_length :] = tokens
    return torch.where(trajectory.committed, final.unsqueeze(1), NOTHING)


def first_divergence(a: Tensor, b: Tensor) -> Tensor:
    """Returns the first step at which two runs of the same prompts commit another (position, token).

    Args:
        a: int64 [N, S, L] from `committed_tokens`.
        b: The same for the other run, [N, S', L].

    Returns:
        int64 [N], steps from 0; -1 where the runs commit the same at every step.

    Raises:
        ValueError: The runs have other numbers of prompts or positions.
    """
    if a.dim() != 3 or b.dim() != 3 or (a.shape[0], a.shape[2]) != (b.shape[0], b.shape[2]):
        raise ValueError(
            f"b has shape {tuple(b.shape)}; valid: three dimensions with the prompts and positions of a, "
            f"{tuple(a.shape)}"
        )
    steps = max(a.shape[1], b.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, 0, 0, steps - x.shape[1]), value=NOTHING) for x in (a, b))
    differs = (a != b).any(dim=2)
    return torch.where(differs.any(dim=1), differs.to(torch.int8).argmax(dim=1), NOTHING)


def divergence_summary(first: Sequence[int]) -> tuple[float | None, float]:
    """Returns the median of first diverging steps, counted from 1, and the share of runs that never diverge.

    A run that never diverges counts as one that diverges after all others, so the median is None when half of the runs
    or more never do.

    Raises:
        ValueError: There is no run.
    """
    if not first:
        raise ValueError("first is empty; valid: the first diverging step of at least one run")
    median = float(np.median([math.inf if step == NOTHING else step + 1 for step in first]))
    never = sum(step == NOTHING for step in first) / len(first)
    return (None if math.isinf(median) else median), never


def frontier_flips(expected: Tensor, committed: Tensor, candidates: Tensor) -> FrontierFlips:
    """Counts the states at which a model commits something else than the original.

    Args:
        expected: int64 [states, L], the tokens the original commits, -1 elsewhere.
        committed: int64 [states, L], the same for the model.
        candidates: int64 [states, L], the model's most likely token everywhere.
    """
    there = expected != NOTHING
    return FrontierFlips(
        states=expected.shape[0],
        flips=int((expected != committed).any(dim=1).sum()),
        position_flips=int((there != (committed != NOTHING)).any(dim=1).sum()),
        positions=int(there.sum()),
        token_flips=int((there & (candidates != expected)).sum()),
    )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) in nats, [n], of log-probabilities [n, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def kl_by_mask_ratio(kl: Tensor, mask_ratio: Tensor) -> tuple[KLBucket, ...]:
    """Averages divergences over ranges of the mask ratio.

    Args:
        kl: [positions], nats.
        mask_ratio: [positions], in (0, 1], of the state each position lies in.

    Returns:
        One entry for each of `BUCKETS`.
    """
    found = []
    for low, high in BUCKETS:
        chosen = kl[(mask_ratio > low) & (mask_ratio <= high)].double()
        found.append(KLBucket(low, high, len(chosen), float(chosen.mean()) if len(chosen) else None))
    return tuple(found)


def chosen_positions(count: int, limit: int, seed: int) -> Tensor:
    """Returns which of `count` positions are measured when at most `limit` may be: bool [count], drawn evenly."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]] = True
    return chosen


@dataclass(frozen=True, eq=False)
class AgreementReference:
    """What the original did with some prompts.

    Attributes:
        prompts: The prompts.
        sampler: How they were decoded; without random numbers.
        committed: int64 [prompts, steps, L], what every step committed, -1 elsewhere.
        batches: The states it passed through.
        expected: Per batch, int64 [states, gen_length], what it commits there, -1 elsewhere. Computed on these very
            batches: in 16 bits rounding depends on the batch, and that is not the quantized model's error.
        measured: Per batch, bool [states, gen_length], the masked positions whose predictions are kept.
        log_probs: Per batch, float32 [measured positions, tokens that may be generated].
    """

    prompts: tuple[str, ...]
    sampler: AnySamplerConfig
    committed: Tensor
    batches: tuple[StateBatch, ...]
    expected: tuple[Tensor, ...]
    measured: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...]


def record_agreement(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    prediction_bytes: int = _PREDICTION_BYTES,
    **sampler: Any,
) -> AgreementReference:
    """Decodes prompts with the original and keeps what `measure_agreement` compares with.

    Args:
        model: The original.
        tokenizer: Its tokenizer.
        prompts: At least one.
        batch_size: Sequences per forward pass.
        prediction_bytes: Memory for the original's predictions; positions are drawn at random beyond it.
        **sampler: Settings of the family's sampler that override the checkpoint's defaults.

    Raises:
        ValueError: The sampler draws random numbers, or as `dllmquant.generation.generate_tokens`.
    """
    adapter = adapter_for(model)
    config = adapter.sampler_config(model.config, **sampler)
    if isinstance(config, UniformNoiseSamplerConfig):
        raise ValueError(
            f"sampler of {adapter.model_type!r} draws random numbers at every step; valid: one that does not"
        )
    if config.stochastic:
        raise ValueError(
            f"sampler draws random numbers (temperature {config.temperature}, remasking {config.remasking!r}); "
            "valid: temperature 0 and 'low_confidence', so that a difference is the model's"
        )
    generation = generate_tokens(model, tokenizer, prompts, batch_size=batch_size, record=True, **sampler)
    trajectory = generation.trajectory
    assert trajectory is not None
    committed = committed_tokens(trajectory, generation.tokens)
    where = [(prompt, step) for prompt, step in trajectory.valid.nonzero().tolist()]
    parts = [where[start : start + batch_size] for start in range(0, len(where), batch_size)]
    batches = tuple(trajectory.states(part) for part in parts)
    region = slice(-config.gen_length, None)
    masks = [batch.mask[:, region] for batch in batches]
    vocabulary = model.get_submodule(adapter.embedding).get_parameter("weight").shape[0]
    positions = sum(int(mask.sum()) for mask in masks)
    chosen = chosen_positions(positions, max(1, prediction_bytes // (4 * vocabulary)), seed=0)
    shares = chosen.split([int(mask.sum()) for mask in masks])
    measured = [mask.masked_scatter(mask, share) for mask, share in zip(masks, shares, strict=True)]
    never, deferred = _never(model, tokenizer, config), _deferred(model, tokenizer, config)
    expected, log_probs = [], []
    for batch, here, logits in zip(batches, measured, _logits(model, batches, config), strict=True):
        expected.append(_decisions(forbid(logits, never), batch, config, deferred)[0])
        log_probs.append(_log_probs(logits, here, never))
    return AgreementReference(
        tuple(prompts), config, committed, batches, tuple(expected), tuple(measured), tuple(log_probs)
    )


def measure_agreement(
    reference: AgreementReference,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
) -> Agreement:
    """Holds a model against the original on the same prompts and on the original's states.

    Args:
        reference: Of the original, with the same tokenizer.
        model: The quantized model; the original itself gives what rounding alone does.
        tokenizer: Its tokenizer.
        batch_size: Sequences per forward pass.
    """
    config = reference.sampler
    generation = generate_tokens(
        model, tokenizer, reference.prompts, batch_size=batch_size, record=True, **vars(config)
    )
    assert generation.trajectory is not None
    own = committed_tokens(generation.trajectory, generation.tokens)
    never, deferred = _never(model, tokenizer, config), _deferred(model, tokenizer, config)
    committed, candidates, kl, ratios = [], [], [], []
    predictions = zip(reference.batches, _logits(model, reference.batches, config), strict=True)
    for index, (batch, logits) in enumerate(predictions):
        measured = reference.measured[index]
        chosen, likeliest = _decisions(forbid(logits, never), batch, config, deferred)
        committed.append(chosen)
        candidates.append(likeliest)
        kl.append(kl_divergence(reference.log_probs[index], _log_probs(logits, measured, never)))
        ratios.append(batch.mask_ratio.unsqueeze(1).expand(measured.shape)[measured])
    return Agreement(
        first_divergence=tuple(first_divergence(reference.committed, own).tolist()),
        frontier=frontier_flips(torch.cat(reference.expected), torch.cat(committed), torch.cat(candidates)),
        kl=kl_by_mask_ratio(torch.cat(kl), torch.cat(ratios)),
    )


def _never(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AnySamplerConfig) -> tuple[int, ...]:
    """Tokens the sampler never generates."""
    mask_id = adapter_for(model).mask_id(model.config)
    return (mask_id, *((tokenizer.eos_token_id,) if config.logits_eos_inf else ()))


def _deferred(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AnySamplerConfig) -> tuple[int, ...]:
    """Tokens the sampler commits last."""
    if not config.confidence_eos_eot_inf:
        return ()
    name = adapter_for(model).eot_token
    eot = None if name is None else tokenizer.get_vocab().get(name)
    return (tokenizer.eos_token_id, *(() if eot is None else (eot,)))


@torch.no_grad()
def _logits(model: PreTrainedModel, batches: Sequence[StateBatch], config: AnySamplerConfig) -> Iterator[Tensor]:
    """Per batch, what the sampler would decide on: guided logits of the generation region, [states, gen_length, V]."""
    adapter = adapter_for(model)
    denoise, mask_id = adapter.denoiser(model), adapter.mask_id(model.config)
    region = slice(-config.gen_length, None)
    with inference(model, adapter.block_list(model)):
        for batch in batches:
            ids, attended = batch.ids.to(model.device), batch.attention_mask.to(model.device)
            logits = denoise(ids, attended)[:, region]
            if config.cfg_scale > 0:
                prompt = attended.clone()
                prompt[:, region] = False
                free = denoise(ids.masked_fill(prompt, mask_id), attended)[:, region]
                logits = guide(logits, free, config.cfg_scale)
            yield logits


def _decisions(
    logits: Tensor, batch: StateBatch, config: AnySamplerConfig, deferred: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """What the sampler commits at each state (-1 elsewhere), and the most likely tokens; [states, gen_length], CPU."""
    region = slice(-config.gen_length, None)
    mask, ids, recorded = (tensor[:, region].to(logits.device) for tensor in (batch.mask, batch.ids, batch.committed))
    if isinstance(config, BlockDiffusionSamplerConfig):
        active = frontier(batch.mask, batch.attention_mask, config).eligible[:, region].to(logits.device)
    else:
        block_of_position = torch.arange(config.gen_length, device=logits.device) // config.block_length
        active = block_of_position == batch.block.to(logits.device).unsqueeze(1)
    candidates = greedy_candidates(logits, mask, active, config, deferred=deferred)
    counts = recorded.sum(dim=1)  # where the schedule, not the model, says how many: as many as the original's run
    if isinstance(config, BlockDiffusionSamplerConfig):
        least = torch.full_like(counts, config.unit_length // config.unit_steps)
        counts = least if config.remasking == "low_confidence_dynamic" else counts
        result = commit_in_block(ids, candidates, counts, config)
    elif config.threshold is None:
        result = commit_most_confident(ids, candidates, counts)
    else:
        result = commit_above_threshold(ids, candidates, config.threshold)
    return torch.where(result.committed, candidates.tokens, NOTHING).cpu(), candidates.tokens.cpu()


def _log_probs(logits: Tensor, where: Tensor, never: Sequence[int]) -> Tensor:
    """Log-probabilities over the tokens that may be generated, float32 [positions of `where`, tokens], on the CPU."""
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[list(never)] = False
    return logits[where.to(logits.device)].float()[:, allowed].log_softmax(dim=-1).cpu()
