"""How far a quantized model is from the original at every denoising step, on the same states.

The original decodes prompts and its states are recorded. Every model is then run on exactly these states (teacher
forcing), so a difference at step s is the error made at s, not the consequence of another text at earlier steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.decoding import StateBatch
from dllmquant.generation import generate_tokens
from dllmquant.models import adapter_for
from dllmquant.models.inference import inference


@dataclass(frozen=True, eq=False)
class Reference:
    """The states the original passed through and what it predicted there.

    Attributes:
        batches: The states, all steps of the first prompt first.
        log_probs: Per batch, float32 [masked positions, vocabulary without the mask token].
        where: (prompt, step) of every state, in the order of the batches.
        prompts: Number of prompts.
        steps: Denoising steps of the prompt that took the most.
        block_starts: Steps at which the first prompt enters a new block, the first one (0) left out.
    """

    batches: tuple[StateBatch, ...]
    log_probs: tuple[Tensor, ...]
    where: tuple[tuple[int, int], ...]
    prompts: int
    steps: int
    block_starts: tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """A quantity at every denoising step, as a mean over prompts.

    Attributes:
        mean: Per step.
        low: Lower end of the mean's 95% bootstrap interval over prompts, per step.
        high: Upper end of it.
    """

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class StepErrors:
    """The error of a model at every denoising step of the original.

    Attributes:
        kl: KL divergence of the model's prediction from the original's in nats, averaged over masked positions.
        disagreement: Share of the masked positions where the two models' most likely tokens differ.
    """

    kl: Curve
    disagreement: Curve


def record_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    seed: int = 0,
    **sampler: Any,
) -> Reference:
    """Decodes prompts with the original model and keeps its states and predictions.

    Args:
        model: The original.
        tokenizer: Its tokenizer.
        prompts: At least one.
        batch_size: Sequences per forward pass.
        seed: Seed of the sampler's random numbers.
        **sampler: Settings of the family's sampler that override the checkpoint's defaults.

    Raises:
        ValueError: As `dllmquant.generation.generate_tokens`.
    """
    generation = generate_tokens(model, tokenizer, prompts, batch_size=batch_size, seed=seed, record=True, **sampler)
    trajectory = generation.trajectory
    assert trajectory is not None
    where = [(prompt, step) for prompt, step in trajectory.valid.nonzero().tolist()]
    batches = [trajectory.states(where[start : start + batch_size]) for start in range(0, len(where), batch_size)]
    blocks = trajectory.block[0][trajectory.valid[0]]
    return Reference(
        batches=tuple(batches),
        log_probs=tuple(_log_probs(model, batches)),
        where=tuple(where),
        prompts=len(prompts),
        steps=int(trajectory.num_steps.max()),
        block_starts=tuple((blocks.diff().nonzero().squeeze(1) + 1).tolist()),
    )


def step_errors(reference: Reference, model: PreTrainedModel) -> StepErrors:
    """Measures a model on the reference's states.

    Args:
        reference: Of the original, with the same tokenizer.
        model: The quantized model.
    """
    kl: list[float] = []
    disagreement: list[float] = []
    for batch, expected, got in zip(
        reference.batches, reference.log_probs, _log_probs(model, reference.batches), strict=True
    ):
        counts = batch.mask.sum(dim=1).tolist()
        divergence = (expected.exp() * (expected - got)).sum(dim=-1)
        differs = (expected.argmax(dim=-1) != got.argmax(dim=-1)).float()
        kl += [float(part.mean()) for part in divergence.split(counts)]
        disagreement += [float(part.mean()) for part in differs.split(counts)]
    return StepErrors(_curve(reference, kl), _curve(reference, disagreement))


@torch.no_grad()
def _log_probs(model: PreTrainedModel, batches: Sequence[StateBatch]) -> Iterator[Tensor]:
    """Per batch, the predictions at its masked positions, float32 [positions, vocabulary without the mask token]."""
    adapter = adapter_for(model)
    denoise, mask_id = adapter.denoiser(model), adapter.mask_id(model.config)
    for batch in batches:
        with inference(model, adapter.block_list(model)):
            logits = denoise(batch.ids.to(model.device), batch.attention_mask.to(model.device))
        chosen = logits[batch.mask.to(model.device)].float().cpu()
        yield torch.cat((chosen[:, :mask_id], chosen[:, mask_id + 1 :]), dim=1).log_softmax(dim=-1)


def _curve(reference: Reference, values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> Curve:
    """Averages values, in the order of `reference.where`, over the prompts that have a step."""
    table: NDArray[np.float64] = np.full((reference.prompts, reference.steps), np.nan)
    for (prompt, step), value in zip(reference.where, values, strict=True):
        table[prompt, step] = value
    rng = np.random.default_rng(seed)
    mean, low, high = [], [], []
    for column in table.T:
        present = column[~np.isnan(column)]
        drawn = present[rng.integers(present.size, size=(resamples, present.size))].mean(axis=1)
        mean.append(float(present.mean()))
        low.append(float(np.quantile(drawn, 0.025)))
        high.append(float(np.quantile(drawn, 0.975)))
    return Curve(tuple(mean), tuple(low), tuple(high))
