"""Random time: completions masked as LLaDA masks them in fine-tuning (arXiv 2502.09992), t ~ U(0, 1) per sequence.

Choices: plain uniform times, not stratified; every response token is masked with probability t independently of the
others, also when none or all of them end up masked; LLaDA's floor of 1e-3 under t, there for its 1/t loss weight, is
left out; see also `masked_text`.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.distributions.base import Drawn, Request
from dllmquant.calibration.distributions.masked_text import draw_masked_text, encode_pairs
from dllmquant.calibration.prompts import Prompt


def random_t_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], request: Request
) -> Drawn:
    """Masks the completion of each pair at a uniformly random time; the prompt stays visible.

    Args:
        model: Run once over the states, for its confidences.
        tokenizer: Its tokenizer.
        prompts: Pairs of prompt and completion, one per state.
        request: How many states.

    Raises:
        ValueError: A prompt has no completion or holds the mask token, or there are fewer pairs than states.
    """
    pairs = encode_pairs(model, tokenizer, prompts, request.num_states, "random_t")
    generator = torch.Generator().manual_seed(request.seed)
    times = torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    rows = [(prompt + completion, len(prompt)) for prompt, completion in pairs]
    return draw_masked_text(model, tokenizer, rows, times, generator, request)
