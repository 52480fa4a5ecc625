"""The model's confidence at states that no decoding run has recorded."""

import dataclasses

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dllmquant.decoding import StateBatch, commit_most_confident, forbid, propose
from dllmquant.models import ModelAdapter
from dllmquant.models.inference import inference


@torch.no_grad()
def with_confidence(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    batch: StateBatch,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> tuple[StateBatch, int]:
    """Fills in what decoding would have recorded, with one forward pass over each state.

    As in the sampler at temperature 0 (`decoding.propose`), the candidate of a position is the argmax of its logits,
    the mask token left out, and its confidence the softmax probability of the candidate with the mask token left out of
    the softmax too; at every position that is not padding. `committed` is the one masked position that low-confidence
    remasking would commit next: the most confident, the first of equals; none in a state without masks. These states
    have no blocks, so all masked positions compete. Guidance and the sampler's EOS options play no part.

    Args:
        model: The model; its mode is restored.
        adapter: Its adapter.
        batch: States; their confidence and committed tokens are not read.
        batch_size: States per forward pass.
        progress: Whether to show a progress bar.

    Returns:
        The states on the CPU with `confidence`, 0 on padding, and `committed`; and the number of forward passes.

    Raises:
        ValueError: The logits give no finite confidence (NaN).
    """
    denoise, mask_id = adapter.denoiser(model), adapter.mask_id(model.config)
    device = next(model.get_submodule(adapter.embedding).parameters()).device
    confidences, commits = [], []
    bar = tqdm(total=len(batch), desc="confidence", unit="state", disable=not progress)
    with inference(model, adapter.block_list(model)), bar:
        for start in range(0, len(batch), batch_size):
            rows = slice(start, start + batch_size)
            ids, keep, mask = (x[rows].to(device) for x in (batch.ids, batch.attention_mask, batch.mask))
            candidates = propose(forbid(denoise(ids, keep), (mask_id,)), mask, torch.ones_like(mask))
            one = torch.ones(len(ids), dtype=torch.int64, device=device)
            result = commit_most_confident(ids, candidates, one)
            confidences.append(result.confidence.masked_fill(~keep, 0.0).float().cpu())
            commits.append(result.committed.cpu())
            bar.update(len(ids))
    confidence = torch.cat(confidences)
    if not bool(confidence.isfinite().all()):
        raise ValueError("logits of the model give a confidence of NaN; valid: logits without NaN or +inf")
    filled = dataclasses.replace(batch.to("cpu"), confidence=confidence, committed=torch.cat(commits))
    return filled, len(confidences)
