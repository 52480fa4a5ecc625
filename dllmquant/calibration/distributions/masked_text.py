"""What `random_t` and `mcs` have in common: given texts, masked at given times, seen once by the model.

Choices: prompt and completion are tokenized apart, as they meet in decoding, the completion without special tokens; no
EOS is appended, so that the states differ from "clean" ones by their masks only; there is one block; a state's mask
ratio is the masked share of what may be masked.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.confidence import with_confidence
from dllmquant.calibration.distributions.base import Cost, Drawn, Request, left_padded, padding_id
from dllmquant.calibration.prompts import Prompt
from dllmquant.core.coverage import measure_coverage, segment_of
from dllmquant.decoding import StateBatch
from dllmquant.generation import encode_prompts
from dllmquant.models import adapter_for


def encode_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    count: int,
    states: str,
) -> list[tuple[list[int], list[int]]]:
    """Tokenizes the first `count` pairs of prompt and completion.

    Args:
        model: The model, for its mask token.
        tokenizer: Its tokenizer.
        prompts: Pairs of prompt and completion.
        count: How many are needed.
        states: Name of the distribution, for messages.

    Raises:
        ValueError: There are fewer, one has no completion, or one holds the mask token.
    """
    if len(prompts) < count:
        raise ValueError(f"prompts: {len(prompts)} given; valid: {count}, one for each state of states {states!r}")
    pairs: list[tuple[str, str]] = []
    for index, prompt in enumerate(prompts[:count]):
        if isinstance(prompt, str) or len(prompt) != 2 or not prompt[1]:
            raise ValueError(
                f"prompts[{index}]: no completion; states {states!r} masks completions, so give "
                "(prompt, completion) pairs, or use states 'trajectory'"
            )
        pairs.append(prompt)
    starts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    ends: list[list[int]] = tokenizer([end for _, end in pairs], add_special_tokens=False).input_ids
    mask_id = adapter_for(model).mask_id(model.config)
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if mask_id in start + end:
            raise ValueError(f"prompts[{index}]: holds the mask token {mask_id}; valid: text without it")
        if not end:
            raise ValueError(f"prompts[{index}]: the completion {pairs[index][1]!r} has no tokens")
    return list(zip(starts, ends, strict=True))


def draw_masked_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], int]],
    times: Tensor,
    generator: torch.Generator,
    request: Request,
) -> Drawn:
    """Masks every row at its time and lets the model say how sure it is.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Per state, token ids and how many of them, from the front, stay visible; fewer than all.
        times: float64 [states] in [0, 1], the probability of a mask.
        generator: Source of the masks, drawn row by row; padding takes no part.
        request: Batch size, segments and buckets.
    """
    start = time.perf_counter()
    adapter = adapter_for(model)
    ids, keep = left_padded([row for row, _ in rows], padding_id(tokenizer))
    mask, ratio = random_masks([(len(row), visible) for row, visible in rows], times, generator)
    batch = StateBatch(
        ids=ids.masked_fill(mask, adapter.mask_id(model.config)),
        attention_mask=keep,
        mask=mask,
        confidence=torch.zeros(ids.shape),
        committed=torch.zeros_like(mask),
        block=torch.zeros(len(rows), dtype=torch.int64),
        mask_ratio=ratio,
    )
    batch, passes = with_confidence(model, adapter, batch, batch_size=request.batch_size, progress=request.progress)
    segments = len(request.quotas)
    coverage = measure_coverage(
        batch.mask,
        batch.attention_mask,
        batch.mask_ratio,
        segment_of(times, segments),
        segments=segments,
        buckets=request.mask_ratio_buckets,
    )
    cost = Cost(len(rows), passes, len(batch), int(keep.sum()), time.perf_counter() - start)
    return Drawn(batch, coverage, cost, coverage.notes())


def random_masks(
    lengths: Sequence[tuple[int, int]], times: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks each row's tokens behind its visible ones independently with the probability of its time.

    Args:
        lengths: Per row, its length and its visible tokens, fewer than that.
        times: float64 [rows] in [0, 1].
        generator: A stream of numbers, as many as there are tokens that may be masked.

    Returns:
        bool [rows, longest], rows aligned on the right, and float32 [rows], the masked share of what may be masked.
    """
    mask = torch.zeros(len(lengths), max(length for length, _ in lengths), dtype=torch.bool)
    for row, (length, visible), t in zip(mask, lengths, times.tolist(), strict=True):
        row[row.numel() - length + visible :] = (
            torch.rand(length - visible, generator=generator, dtype=torch.float64) < t
        )
    maskable = torch.tensor([length - visible for length, visible in lengths])
    return mask, mask.sum(1).float() / maskable
