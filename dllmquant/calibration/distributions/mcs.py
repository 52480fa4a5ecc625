"""MCS, Masked Calibration Simulation (Quant-dLLM, arXiv 2510.03274): visible prefix, stratified mask ratios.

Of N sequences, the i-th (from 0) keeps its first 25% visible, and every later token is masked with probability
t_i = (i + 1)/N. Choices where the paper is silent: the sequence is prompt and completion together, so the prefix may
end inside either; its length is rounded down; times go to the sequences in their order; see also `masked_text`.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.distributions.base import Drawn, Request
from dllmquant.calibration.distributions.masked_text import draw_masked_text, encode_pairs
from dllmquant.calibration.prompts import Prompt


def mcs_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], request: Request
) -> Drawn:
    """Masks what follows each sequence's visible prefix, at times (i + 1)/N.

    Args:
        model: Run once over the states, for its confidences.
        tokenizer: Its tokenizer.
        prompts: Pairs of prompt and completion, one per state.
        request: How many states, and the share of the visible prefix.

    Raises:
        ValueError: A prompt has no completion or holds the mask token, there are fewer pairs than states, or the
            visible prefix is not a share in [0, 1).
    """
    if not 0 <= request.visible_prefix < 1:
        raise ValueError(f"visible_prefix: {request.visible_prefix}; valid: a share in [0, 1)")
    pairs = encode_pairs(model, tokenizer, prompts, request.num_states, "mcs")
    sequences = [prompt + completion for prompt, completion in pairs]
    rows = [(sequence, int(request.visible_prefix * len(sequence))) for sequence in sequences]
    times = (torch.arange(len(rows), dtype=torch.float64) + 1) / len(rows)
    return draw_masked_text(model, tokenizer, rows, times, torch.Generator().manual_seed(request.seed), request)
