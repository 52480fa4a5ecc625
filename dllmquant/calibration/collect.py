"""From prompts to the states, and the token weights, that the statistics are made of."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.cache import cache_directory
from dllmquant.calibration.distributions import DISTRIBUTIONS, Cost, Request
from dllmquant.calibration.prompts import Prompt
from dllmquant.calibration.weights import weigh_tokens
from dllmquant.core.coverage import Coverage
from dllmquant.decoding import StateBatch
from dllmquant.settings import CalibrationSettings, TokenWeightSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CalibrationStates:
    """The sequences that calibrate a model, and how much each of their tokens counts.

    Attributes:
        batch: The states: ids, attention mask, mask, confidence, all [states, length].
        weights: float32 [states, length], at least 0; exactly 0 on padding.
        notes: What a reader of the report should know, such as redistributed quotas or parts that are not covered.
        coverage: Where in the denoising process the states lie; None if they were made by hand.
        cost: What they took; None if they were made by hand.
        tail: bool [states, length], positions behind the end of the generated text; None where there are none.
        waiting: bool [states, length], masked positions of blocks that are decoded later; None without trajectories.
    """

    batch: StateBatch
    weights: Tensor
    notes: tuple[str, ...] = ()
    coverage: Coverage | None = None
    cost: Cost | None = None
    tail: Tensor | None = None
    waiting: Tensor | None = None

    def reweighted(self, weighting: TokenWeightSettings) -> "CalibrationStates":
        """Returns the same states with the token weights a recipe asks for.

        Raises:
            ValueError: The states lack what the weights depend on.
        """
        return replace(self, weights=weigh_tokens(self.batch, weighting, self.tail, self.waiting))

    def content_hash(self) -> str:
        """Returns a SHA-256 over everything the statistics can see: ids, masks and weights."""
        digest = hashlib.sha256()
        for tensor in (self.batch.ids, self.batch.attention_mask, self.batch.mask, self.weights):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def prompts_needed(settings: CalibrationSettings) -> int:
    """Returns how many prompts the settings consume."""
    return settings.num_states if DISTRIBUTIONS[settings.states].prompt_per_state else settings.num_prompts


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
        model: The full-precision model; for "closed_loop" states the quantized model of a first pass.
        tokenizer: Its tokenizer.
        prompts: At least `prompts_needed(settings)` prompts; the first ones are used. "random_t" and "mcs" states need
            pairs of prompt and completion.
        settings: Where states come from.
        weighting: How tokens are weighted.
        seed: Seed of sampling, masks and selection.
        progress: Whether to show progress bars.

    Raises:
        ValueError: The settings ask for more states than the trajectories hold, a sampler setting is invalid, a
            completion is missing, or "closed_loop" states are asked of a model that is not quantized.
        OSError: The cache directory cannot be made.
    """
    request = Request(
        num_states=settings.num_states,
        batch_size=settings.batch_size,
        seed=seed,
        progress=progress,
        quotas=settings.quotas,
        mask_ratio_buckets=settings.mask_ratio_buckets,
        visible_prefix=settings.visible_prefix,
        sampler=settings.sampler,
        cache=None if settings.cache is None else cache_directory(settings.cache),
    )
    chosen = list(prompts[: prompts_needed(settings)])
    drawn = DISTRIBUTIONS[settings.states].draw(model, tokenizer, chosen, request)
    logger.info("calibration states (%s): %s", settings.states, drawn.cost.summary())
    logger.info("calibration states (%s): %s", settings.states, drawn.coverage.summary())
    for note in drawn.notes:
        logger.warning("calibration states: %s", note)
    weights = weigh_tokens(drawn.batch, weighting, drawn.tail, drawn.waiting)
    return CalibrationStates(drawn.batch, weights, drawn.notes, drawn.coverage, drawn.cost, drawn.tail, drawn.waiting)
