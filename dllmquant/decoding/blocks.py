"""Semi-autoregressive block decoding: LLaDA's sampler (arXiv 2502.09992), or Fast-dLLM's (2505.22618) with a threshold.

The generation region starts as mask tokens and is decoded block by block from left to right. Within a block, every
denoising step runs the model on the whole sequence and commits some of the block's masked positions: a fixed number of
the most confident (or random) ones as in LLaDA, or all that reach a confidence threshold as in Fast-dLLM.

Deviations from LLaDA's published sampler, besides those of :mod:`dllmquant.decoding.remasking` and those that all
samplers share (:mod:`dllmquant.decoding.sampler`):

1. Guidance runs the unconditional pass as a second call of the denoiser rather than in a doubled batch, and leaves
   padding tokens as they are (they are hidden from both passes).
2. Under threshold decoding every prompt moves to its next block as soon as its own block is complete, and leaves the
   batch as soon as it is finished; it does not wait for the slowest prompt of the batch.
3. ``steps`` above ``gen_length`` is an error: some of the steps would commit nothing.
"""

import torch
from torch import Tensor

from dllmquant.decoding.canvas import Canvas
from dllmquant.decoding.config import SamplerConfig
from dllmquant.decoding.remasking import (
    Candidates,
    StepResult,
    commit_above_threshold,
    commit_most_confident,
    propose,
)
from dllmquant.decoding.schedule import transfer_counts


def decode_blocks(canvas: Canvas, config: SamplerConfig) -> None:
    """Decode a batch to its end."""
    window = canvas.window
    block_of_position = canvas.position.div(config.block_length, rounding_mode="floor")  # negative in the prompt
    for _ in range(config.gen_length):  # every step commits at least one token of every prompt that is left
        view = canvas.view(canvas.mask.any(dim=1))
        if not view.rows.numel():
            break
        block = block_of_position[view.mask.to(torch.int8).argmax(dim=1)]  # of each row's first mask token
        mask, active = view.mask[:, window], (block_of_position == block.unsqueeze(1))[:, window]
        logits = canvas.logits(view, config.cfg_scale)
        eligible = (mask & active).sum(dim=1)
        candidates = propose(
            logits,
            mask,
            active,
            temperature=config.temperature,
            uniform=canvas.uniform(view.rows, eligible, logits.shape[-1]) if config.temperature > 0 else None,
            random_score=canvas.uniform(view.rows, eligible) if config.remasking == "random" else None,
            deferred=canvas.job.deferred,
        )
        result = _commit(view.ids[:, window], candidates, canvas.steps_used[view.rows], config)
        canvas.commit(view, result, block)


def _commit(state: Tensor, candidates: Candidates, steps_used: Tensor, config: SamplerConfig) -> StepResult:
    if config.threshold is not None:
        return commit_above_threshold(state, candidates, config.threshold)
    # Every block starts fully masked and takes the same number of steps, so one schedule serves all.
    per_block = config.steps // config.num_blocks
    schedule = transfer_counts(torch.tensor([config.block_length], device=state.device), per_block)[0]
    return commit_most_confident(state, candidates, schedule[steps_used % per_block])
