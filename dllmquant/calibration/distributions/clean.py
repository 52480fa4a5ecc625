"""Clean text: what quantizers for autoregressive models calibrate on, and a diffusion LLM sees at the very end only."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.distributions.base import Cost, Drawn, Request, left_padded, padding_id
from dllmquant.calibration.prompts import Prompt
from dllmquant.core.coverage import measure_coverage
from dllmquant.decoding import StateBatch
from dllmquant.generation import encode_prompts


def clean_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], request: Request
) -> Drawn:
    """Takes prompt and completion as one text without masks; the model is not run, confidences are 0.

    Coverage counts the states in the last segment at the lowest mask ratio; no note says that other cells are empty.

    Args:
        model: Not used.
        tokenizer: The model's tokenizer.
        prompts: Texts, or pairs of prompt and completion; one per state.
        request: How many states.

    Raises:
        ValueError: There are fewer prompts than states, or one is empty.
    """
    start = time.perf_counter()
    if len(prompts) < request.num_states:
        raise ValueError(f"prompts: {len(prompts)} given; valid: {request.num_states}, one for each state")
    chosen = prompts[: request.num_states]
    texts = [prompt if isinstance(prompt, str) else "".join(prompt) for prompt in chosen]
    ids, keep = left_padded(encode_prompts(tokenizer, texts), padding_id(tokenizer))
    nothing = torch.zeros(ids.shape, dtype=torch.bool)
    none = torch.zeros(len(texts))
    segments = len(request.quotas)
    coverage = measure_coverage(
        nothing,
        keep,
        none,
        torch.full((len(texts),), segments - 1),
        segments=segments,
        buckets=request.mask_ratio_buckets,
    )
    batch = StateBatch(ids, keep, nothing, torch.zeros(ids.shape), nothing, none.long(), none)
    return Drawn(batch, coverage, Cost(len(texts), 0, 0, 0, time.perf_counter() - start))
