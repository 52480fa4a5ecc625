"""Calibration states: from prompts to the sequences, and the token weights, that the statistics are made of."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant import tasks
from dllmquant.core.cgq import token_weights
from dllmquant.core.tmas import select_states
from dllmquant.decoding import StateBatch
from dllmquant.generation import encode_prompts, generate_tokens
from dllmquant.recipe import CalibrationSettings, TokenWeightSettings

logger = logging.getLogger(__name__)

Prompt = str | tuple[str, str]
"""A prompt, or a prompt and its completion."""


@dataclass(frozen=True, eq=False)
class CalibrationStates:
    """The sequences that calibrate a model, and how much each of their tokens counts.

    Attributes:
        batch: The states: ids, attention mask, mask, confidence, all [states, length].
        weights: float32 [states, length], at least 0; exactly 0 on padding.
        notes: What a reader of the report should know, such as redistributed quotas.
    """

    batch: StateBatch
    weights: Tensor
    notes: tuple[str, ...] = ()

    def content_hash(self) -> str:
        """Returns a SHA-256 over everything the statistics can see: ids, masks and weights."""
        digest = hashlib.sha256()
        for tensor in (self.batch.ids, self.batch.attention_mask, self.batch.mask, self.weights):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def builtin_prompts(count: int, seed: int) -> list[Prompt]:
    """Returns prompts with completions from the training split of the built-in tasks, the tasks taking turns."""
    streams = [tasks.iterate(task, "train", seed) for task in tasks.TASKS]
    items = (next(streams[index % len(streams)]) for index in range(count))
    return [(item.prompt, item.answer) for item in items]


def check_prompts(prompts: Sequence[Prompt], needed: int) -> None:
    """Checks user-given calibration prompts before any work is done.

    Args:
        prompts: Prompts, or pairs of prompt and completion.
        needed: How many the recipe asks for.

    Raises:
        ValueError: There are too few, or one is neither a non-empty string nor a pair of strings.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: a single string; give a list of strings")
    for index, prompt in enumerate(prompts):
        parts = (prompt,) if isinstance(prompt, str) else prompt
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts) or not parts[0]:
            raise ValueError(f"prompts[{index}]: {prompt!r} is neither a non-empty string nor (prompt, completion)")
    if len(prompts) < needed:
        raise ValueError(f"prompts: {len(prompts)} given, the recipe needs {needed}; give more or lower its count")


def prompts_needed(settings: CalibrationSettings) -> int:
    """Returns how many prompts the settings consume."""
    return settings.num_states if settings.states == "clean" else settings.num_prompts


def collect_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    weighting: TokenWeightSettings,
    *,
    seed: int,
    progress: bool,
) -> CalibrationStates:
    """Makes the calibration states a recipe asks for.

    Args:
        model: The full-precision model (decoded only when `settings.states` is "trajectory").
        tokenizer: Its tokenizer.
        prompts: At least `prompts_needed(settings)` prompts; the first ones are used.
        settings: Where states come from.
        weighting: How tokens are weighted.
        seed: Seed of sampling and selection.
        progress: Whether to show progress bars.

    Raises:
        ValueError: The settings ask for more states than the trajectories hold, or a sampler setting is invalid.
    """
    chosen = list(prompts[: prompts_needed(settings)])
    notes: tuple[str, ...] = ()
    if settings.states == "clean":
        batch = _clean_states(tokenizer, chosen)
    else:
        texts = [prompt if isinstance(prompt, str) else prompt[0] for prompt in chosen]
        batch, notes = _trajectory_states(model, tokenizer, texts, settings, seed, progress)
    for note in notes:
        logger.warning("calibration states: %s", note)
    if weighting.kind == "cgq":
        weights = token_weights(
            batch.mask,
            batch.confidence,
            masked_base=weighting.masked_base,
            unmasked_base=weighting.unmasked_base,
            decoded_confidence=weighting.decoded_confidence,
        )
    else:
        weights = torch.ones(batch.ids.shape)
    return CalibrationStates(batch, weights * batch.attention_mask, notes)


def _clean_states(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> StateBatch:
    """Prompt and completion as one text, no masks, left-padded."""
    texts = [prompt if isinstance(prompt, str) else "".join(prompt) for prompt in prompts]
    rows = encode_prompts(tokenizer, texts)
    length = max(map(len, rows))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(rows), length), pad)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        keep[index, length - len(row) :] = True
    nothing = torch.zeros(ids.shape, dtype=torch.bool)
    none = torch.zeros(len(rows))
    return StateBatch(ids, keep, nothing, torch.zeros(ids.shape), nothing, none.long(), none)


def _trajectory_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: CalibrationSettings,
    seed: int,
    progress: bool,
) -> tuple[StateBatch, tuple[str, ...]]:
    """TMAS: states of recorded denoising runs, by trajectory segment and mask ratio."""
    generation = generate_tokens(
        model,
        tokenizer,
        prompts,
        batch_size=settings.batch_size,
        seed=seed,
        record=True,
        progress=progress,
        **settings.sampler,
    )
    trajectory = generation.trajectory
    assert trajectory is not None
    selection = select_states(
        trajectory.mask_ratio,
        trajectory.valid,
        trajectory.block,
        num_states=settings.num_states,
        quotas=settings.quotas,
        generator=torch.Generator().manual_seed(seed),
    )
    indices = [(state.trajectory, state.step) for state in selection.states]
    return trajectory.states(indices), selection.notes
