"""Block diffusion: decoding with block-causal models, as SDAR (arXiv 2510.06303), LLaDA2 and Fast-dLLM v2 (2509.26328).

Blocks are counted from the first token of a prompt, as the model's attention counts them: the end of a prompt may be
the beginning of the first block that is decoded. A block attends to itself and to the blocks before it, so what the
model made of a finished block stays as it is: with a cached denoiser, a step shows the model the block it decodes and
what has been finished since the step before, and nothing else. The prompt is shown with its first block.

At every step of a block compete the masked positions of its first unfinished sub-block, or of the block if there are no
sub-blocks. "low_confidence_dynamic" commits all that are more confident than a threshold and at least the share a fixed
schedule would (SDAR, LLaDA2; with a step per token that is at least one, Fast-dLLM v2); "low_confidence_static" commits
that share, and "sequential" that share from the left (SDAR). Confidence is the candidate's probability under the
distribution it is drawn from: tempered, then cut by top-k, then by top-p.

Where logits predict the next token, the last token of a finished block predicts the first of the next, which
Fast-dLLM v2 commits as the argmax before it denoises the rest (``first_token_alone``).

Deviations from the published code, besides those that all samplers share (:mod:`dllmquant.decoding.sampler`):

1. Rows of a batch are at different blocks at the same time: each moves on as soon as its own block is complete and
   leaves the batch when it is finished. SDAR and LLaDA2 decode one prompt, Fast-dLLM v2's batches wait for each other.
2. A row is finished as soon as it holds an ending token with everything before it committed; what it has not decoded is
   filled with the EOS token. Fast-dLLM v2 stops there, too; SDAR and LLaDA2 finish the block first, which changes
   nothing before that token.
3. The generation ends after ``gen_length`` tokens; a last block that is cut off there is shown to the model as it is.
   The published code rounds up to whole blocks, so that the model sees masks behind the end.
4. Temperature 0 is the argmax, with its probability as confidence. SDAR divides by the temperature, LLaDA2 draws at 0
   as it does at 1.
5. A finished block's keys and values are made in the first step of the next block instead of in a pass of their own.
6. A step commits what is left where the schedule asks for more tokens than are masked, as in LLaDA2. SDAR then
   overwrites the end of the prompt in a first block that begins with it.
7. Fast-dLLM v2's second cache, of the other sub-blocks of a block, is an approximation and left out; so is SDAR's
   "entropy_bounded", whose published code cannot run.
8. Equal scores are committed in the order of their positions, first one first; ``torch.topk`` leaves that open.
9. Softmax is computed in float32, or in float64 for float64 logits, whatever the dtype of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dllmquant.decoding.canvas import Canvas, View
from dllmquant.decoding.config import BlockDiffusionSamplerConfig
from dllmquant.decoding.ranking import draw_tokens, restrict
from dllmquant.decoding.remasking import (
    Candidates,
    StepResult,
    check_step,
    commit_dynamic,
    commit_most_confident,
    probability,
    widen,
)
from dllmquant.decoding.schedule import transfer_counts


@dataclass(frozen=True, eq=False)
class Frontier:
    """Where rows are decoded next.

    Attributes:
        eligible: bool ``[n, L]``, what the next step may commit: masked positions of one sub-block.
        alone: bool ``[n]``, True where that is the first token of a block, which is committed alone.
        begin: int64 ``[n]``, the first column of the block.
        block: int64 ``[n]``, the block, 0 for the first one that is decoded.
        unit: int64 ``[n]``, the sub-block, or block where there are none, counted from the prompt's first token.
    """

    eligible: Tensor
    alone: Tensor
    begin: Tensor
    block: Tensor
    unit: Tensor


def frontier(mask: Tensor, attended: Tensor, config: BlockDiffusionSamplerConfig) -> Frontier:
    """Find where rows are decoded next.

    Args:
        mask: bool ``[n, L]``, True where the state holds the mask token; at least one in every row.
        attended: bool ``[n, L]``, False at left padding.
        config: The sampler.
    """
    position = attended.cumsum(dim=1) - 1  # from the prompt's first token; -1 at padding
    first = mask.to(torch.int8).argmax(dim=1, keepdim=True)
    place = position.gather(1, first)
    unit = place // config.unit_length
    eligible = mask & (position.div(config.unit_length, rounding_mode="floor") == unit)
    alone = torch.zeros_like(place, dtype=torch.bool)
    if config.first_token_alone:
        alone = place % config.block_length == 0
        eligible &= ~alone | (position == place)
    prompt_length = attended.sum(dim=1, keepdim=True) - config.gen_length
    block = place // config.block_length
    return Frontier(
        eligible=eligible,
        alone=alone.squeeze(1),
        begin=(first - place % config.block_length).squeeze(1),
        block=(block - prompt_length // config.block_length).squeeze(1),
        unit=unit.squeeze(1),
    )


def propose_in_block(
    logits: Tensor,
    eligible: Tensor,
    config: BlockDiffusionSamplerConfig,
    *,
    uniform: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Candidates:
    """Choose every position's candidate and score the positions that may be committed.

    Args:
        logits: Floating tensor ``[B, L, V]``.
        eligible: bool ``[B, L]``, what may be committed.
        config: The sampler.
        uniform: float64 ``[m]`` in [0, 1), the random numbers of the candidates that are drawn; None to take the
            argmax everywhere.
        drawn: bool ``[B]``, the rows whose candidates are drawn, with ``m`` eligible positions together; given with
            ``uniform``.

    Returns:
        The candidates. The confidence is the model's own at every position; only the score is measured on the
        distribution that candidates are drawn from.

    Raises:
        ValueError: If shapes or dtypes do not match.
    """
    check_step(logits, eligible=eligible)
    logits = widen(logits)
    tokens = logits.argmax(dim=-1)
    cut = restrict(logits[eligible], temperature=config.temperature, top_k=config.top_k)
    probabilities = restrict(cut, top_p=config.top_p).softmax(dim=-1)
    chosen = tokens[eligible]
    if uniform is not None:
        assert drawn is not None
        where = drawn.unsqueeze(1).expand_as(eligible)[eligible]
        chosen[where] = draw_tokens(probabilities[where], uniform)
        tokens[eligible] = chosen
    score = torch.full(tokens.shape, float("-inf"), dtype=logits.dtype, device=logits.device)
    if config.remasking == "sequential":
        order = -torch.arange(tokens.shape[1], dtype=logits.dtype, device=logits.device)
        score = torch.where(eligible, order, score)
    else:
        score[eligible] = probabilities.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return Candidates(tokens, probability(logits, tokens), score)


def commit_in_block(
    state: Tensor, candidates: Candidates, counts: Tensor, config: BlockDiffusionSamplerConfig
) -> StepResult:
    """Commit what a step commits, given each row's share of the schedule ``counts`` ``[B]``."""
    if config.remasking == "low_confidence_dynamic":
        return commit_dynamic(state, candidates, config.threshold, counts)
    return commit_most_confident(state, candidates, counts)


def decode_block_diffusion(canvas: Canvas, config: BlockDiffusionSamplerConfig) -> None:
    """Decode a batch to its end."""
    device = canvas.job.device
    shares = transfer_counts(torch.tensor([config.unit_length], device=device), config.unit_steps)[0]
    unit = torch.full_like(canvas.steps_used, -1)  # of each row's last step
    step = torch.zeros_like(unit)  # in that unit
    blocks = _Blocks(canvas, config) if canvas.job.cached is not None else None
    for _ in range(config.gen_length):  # every step commits at least one token of every prompt that is left
        view = canvas.view(canvas.mask.any(dim=1))
        if not view.rows.numel():
            break
        here = frontier(view.mask, view.attended, config)
        step[view.rows] = torch.where(here.unit == unit[view.rows], step[view.rows] + 1, 0)
        unit[view.rows] = torch.where(here.alone, -1, here.unit)  # the token that goes alone is no step of the schedule
        uniform, drawn = None, None
        if config.temperature > 0:
            drawn = ~here.alone
            uniform = canvas.uniform(view.rows, here.eligible.sum(dim=1) * drawn)
        counts = shares[step[view.rows]]
        if blocks is None:
            window = canvas.window
            candidates = propose_in_block(
                canvas.logits(view), here.eligible[:, window], config, uniform=uniform, drawn=drawn
            )
            result = commit_in_block(view.ids[:, window], candidates, counts, config)
        else:
            columns, logits = blocks.logits(view, here)
            eligible = here.eligible.gather(1, columns)
            eligible[:, 1:] &= columns.diff(dim=1) > 0  # a block that is cut off repeats its last column
            candidates = propose_in_block(logits, eligible, config, uniform=uniform, drawn=drawn)
            state = view.ids.gather(1, columns)
            result = blocks.spread(view, commit_in_block(state, candidates, counts, config), columns)
        canvas.commit(view, result, here.block)
        if canvas.job.ends:
            canvas.end_rows()


class _Blocks:
    """A batch as a cached denoiser is shown it: block by block, every finished block once more when it is complete."""

    def __init__(self, canvas: Canvas, config: BlockDiffusionSamplerConfig) -> None:
        everything = canvas.view(torch.ones_like(canvas.steps_used, dtype=torch.bool))
        self._canvas, self._block_length = canvas, config.block_length
        self._first = everything.attended.to(torch.int8).argmax(dim=1)
        self._kept = self._first.clone()  # columns before this one are finished, and were shown since

    def logits(self, view: View, here: Frontier) -> tuple[Tensor, Tensor]:
        """The columns of each row's block, int64 ``[n, block_length]``, and the logits at them.

        A block that is cut off at the end of the generation repeats its last column. All rows are shown equally many
        columns; those that need fewer are shown some finished ones again, or their first one several times.
        """
        assert self._canvas.job.cached is not None
        missing = max(int((here.begin - self._kept[view.rows]).max()), self._canvas.job.cached.shift)
        offsets = torch.arange(-missing, self._block_length, device=here.begin.device)
        columns = (here.begin.unsqueeze(1) + offsets).clamp(max=view.ids.shape[1] - 1)
        columns = torch.maximum(columns, self._first[view.rows].unsqueeze(1))
        logits = self._canvas.cached_logits(view, columns, self._block_length)
        self._kept[view.rows] = here.begin
        return columns[:, missing:], logits

    def spread(self, view: View, result: StepResult, columns: Tensor) -> StepResult:
        """The outcome of a step at some columns, as one of the canvas's window; confidences are 0 elsewhere."""
        state, committed = view.ids.clone(), torch.zeros_like(view.mask)
        confidence = torch.zeros(state.shape, dtype=result.confidence.dtype, device=state.device)
        confidence.scatter_(1, columns, result.confidence)
        row, place = result.committed.nonzero(as_tuple=True)
        where = (row, columns[row, place])
        state[where], committed[where] = result.state[row, place], True
        window = self._canvas.window
        return StepResult(state[:, window], committed[:, window], confidence[:, window])
