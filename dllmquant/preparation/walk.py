"""The pass over the full-precision model: it folds transforms into the weights and fits what is applied to inputs."""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dllmquant.calibration import CalibrationStates
from dllmquant.capture import BlockCall, first_calls
from dllmquant.models import ModelAdapter
from dllmquant.models.inference import in_float32
from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.transform import InputTransform
from dllmquant.plan import Plan
from dllmquant.preparation.bits import BitAllocation, SiteBits
from dllmquant.preparation.inputs import sample_tokens, second_moments
from dllmquant.preparation.interaction import block_token_weights
from dllmquant.preparation.routes import holding_routes, recording_routes
from dllmquant.preparation.scaling import scale_block
from dllmquant.recipe import Recipe
from dllmquant.settings import (
    AWQ,
    IAAQ,
    WUSH,
    DuQuant,
    FoldedTransforms,
    Hadamard,
    InputTransformSettings,
    QuaRot,
    SmoothQuant,
)
from dllmquant.transforms.duquant import fit_duquant
from dllmquant.transforms.fold import assert_same_function, linear_at, probe_logits, rounding_tolerance
from dllmquant.transforms.hadamard import fit_hadamard
from dllmquant.transforms.quarot import rotate_residual, rotate_values
from dllmquant.transforms.wush import fit_wush

logger = logging.getLogger(__name__)

_PROBE_STATES = 4  # states on which a folded transform must leave the logits as they were
_INVERSE_ERROR = 1e-6  # of an input transform, in float64; blocks may be as ill-conditioned as `nn.transform` allows
_SAMPLES = 512  # tokens DuQuant's rotations are fitted to
_SEARCH_STATES = 32  # states on which AWQ's scales are searched, from all over the trajectory; its statistics use all


@dataclass(frozen=True, eq=False)
class Preparation:
    """What the solving pass needs to know.

    Attributes:
        input_transforms: By the full path of the first layer of a group.
        activations: The scheme of every group, by the full path of its first layer.
        token_weights: Per block, the token weights of every state [states, length]; empty without states.
        allocation: What IA-AQ decided, empty if it was not asked.
    """

    input_transforms: dict[str, InputTransform]
    activations: dict[str, ActivationScheme | None]
    token_weights: tuple[Tensor, ...]
    allocation: tuple[SiteBits, ...] = ()


@torch.no_grad()
def prepare(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    plan: Plan,
    recipe: Recipe,
    states: CalibrationStates | None,
    *,
    progress: bool = True,
) -> Preparation:
    """Applies the transforms that fold into the weights, in place, and decides everything else about the inputs.

    Args:
        model: The 16- or 32-bit model, in evaluation mode.
        adapter: Its adapter.
        plan: What is quantized.
        recipe: The recipe.
        states: Calibration states; None for recipes that need no data.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A transform does not fit the model, or does not preserve its function.
    """
    with _checked_function(model, adapter, recipe, states):
        for transform in recipe.transforms:
            if isinstance(transform, QuaRot):
                if transform.residual:
                    rotate_residual(model, adapter, seed=recipe.seed)
                if transform.values:
                    rotate_values(model, adapter, seed=recipe.seed)
        walk = _Walk(model, adapter, plan, recipe, progress)
        if states is None:
            walk.without_data()
        else:
            walk.over_blocks(states)
    activations: dict[str, ActivationScheme | None] = {group[0]: plan.activation for group in plan.groups}
    bits: tuple[SiteBits, ...] = ()
    if walk.allocation is not None:
        assert states is not None
        assert recipe.calibration is not None
        if walk.allocation.settings.objective == "logits":
            walk.allocation.measure_logits(states, recipe.calibration.batch_size, progress=progress)
        activations, bits = walk.allocation.allocated()
    return Preparation(walk.transforms, activations, tuple(walk.token_weights), bits)


@contextmanager
def _checked_function(
    model: PreTrainedModel, adapter: ModelAdapter, recipe: Recipe, states: CalibrationStates | None
) -> Iterator[None]:
    """Checks that the transforms folded inside the context leave the logits as they were."""
    folded = [t.kind for t in recipe.transforms if isinstance(t, FoldedTransforms)]
    if not folded:
        yield
        return
    vocabulary = model.get_submodule(adapter.embedding).get_parameter("weight").shape[0]
    if states is None:
        ids = torch.randint(vocabulary, (_PROBE_STATES, 32), generator=torch.Generator().manual_seed(0))
        keep = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids, keep = states.batch.ids[:_PROBE_STATES], states.batch.attention_mask[:_PROBE_STATES]
    ids, keep = ids.to(model.device), keep.to(model.device)
    noise = torch.randint(vocabulary, ids.shape, generator=torch.Generator().manual_seed(1)).to(ids.device)
    mask_id = noise if adapter.mask_token_id is None else adapter.mask_id(model.config)
    blocks = adapter.block_list(model)
    with in_float32(model, blocks), recording_routes(model) as routes:
        before = probe_logits(adapter.denoiser(model), ids, keep, mask_id)
    yield
    with in_float32(model, blocks), holding_routes(model, routes):
        after = probe_logits(adapter.denoiser(model), ids, keep, mask_id)
    deviation = assert_same_function(
        before, after, keep, transform=", ".join(folded), tolerance=rounding_tolerance(model)
    )
    logger.info("%s: function preserved, logits deviate by %.1e", ", ".join(folded), deviation)


@dataclass
class _Walk:
    """The pass over the blocks, and what it collects."""

    model: PreTrainedModel
    adapter: ModelAdapter
    plan: Plan
    recipe: Recipe
    progress: bool

    def __post_init__(self) -> None:
        self.transforms: dict[str, InputTransform] = {}
        self.token_weights: list[Tensor] = []
        settings = None if self.recipe.activations is None else self.recipe.activations.allocation
        self.allocation: BitAllocation | None = None
        if settings is not None:
            self.allocation = BitAllocation(self.model, self.adapter, self.plan, settings, self.transforms)

    def without_data(self) -> None:
        """Fits the transforms that need no data."""
        for group in self.plan.groups:
            settings = self.plan.input_transforms.get(group[0])
            if isinstance(settings, Hadamard):
                linear = linear_at(self.model, group[0])
                fitted = fit_hadamard(linear.in_features, block_size=settings.block_size, seed=self.recipe.seed)
                self.transforms[group[0]] = _checked_inverse(group[0], settings, fitted.to(linear.weight.device))

    def over_blocks(self, states: CalibrationStates) -> None:
        """Runs the full-precision path block by block."""
        self.without_data()
        recipe, blocks = self.recipe, self.adapter.block_list(self.model)
        measured = self.allocation
        if measured is not None and measured.settings.objective != "output":
            measured = None
        attends = any(isinstance(t, IAAQ) and t.interaction for t in recipe.transforms)
        measures = measured is not None or attends
        received, self.token_weights = block_token_weights(self.model, self.adapter, recipe, states, measures=measures)
        if not (measures or recipe.transforms):
            return
        assert recipe.calibration is not None
        size, device = recipe.calibration.batch_size, self.model.device
        ids, keep = states.batch.ids.to(device), states.batch.attention_mask.to(device)
        some = torch.arange(0, len(ids), max(1, len(ids) // _SEARCH_STATES))
        searches = any(isinstance(transform, AWQ) for transform in recipe.transforms)
        start = functools.partial(first_calls, self.model, blocks, self.adapter.denoiser(self.model))
        calls = start(ids, keep, size)
        search_calls = start(ids[some], keep[some], size) if searches else []
        bar = tqdm(
            enumerate(zip(blocks, self.plan.blocks, strict=True)),
            desc="preparing",
            total=len(blocks),
            unit="block",
            disable=not self.progress,
        )
        for index, (block, groups) in bar:
            weights = self.token_weights[index].to(device).split(size)
            attended = (states.weights * received[index]).to(device).split(size) if received else weights
            for transform in recipe.transforms:
                if isinstance(transform, SmoothQuant | AWQ | IAAQ):
                    prefix = f"{self.adapter.blocks}.{index}."
                    scale_block(
                        block,
                        prefix,
                        self.adapter,
                        self.plan,
                        calls,
                        attended if isinstance(transform, IAAQ) and transform.interaction else weights,
                        transform,
                        transforms=self.transforms,
                        search=(search_calls, self.token_weights[index][some].to(device).split(size)),
                        seed=recipe.seed,
                    )
            for group in groups:
                settings = self.plan.input_transforms.get(group[0])
                if settings is not None and not isinstance(settings, Hadamard):
                    fitted = self._fit(block, group, calls, weights, settings)
                    if fitted is not None:
                        self.transforms[group[0]] = fitted
                if measured is not None:
                    measured.measure_output(block, group, calls, attended)
            calls = [call.following(block) for call in calls]
            search_calls = [call.following(block) for call in search_calls]

    def _fit(
        self,
        block: nn.Module,
        group: Sequence[str],
        calls: Sequence[BlockCall],
        weights: Sequence[Tensor],
        settings: DuQuant | WUSH,
    ) -> InputTransform | None:
        """Fits the input transform of a group; None where no token was routed to an expert."""
        linears = [linear_at(self.model, name) for name in group]
        if isinstance(settings, DuQuant):
            samples, _ = sample_tokens(block, linears[0], calls, weights, _SAMPLES, self.recipe.seed)
            if not len(samples):
                return None
            fitted = fit_duquant(samples, block_size=settings.block_size, steps=settings.steps, seed=self.recipe.seed)
        else:
            moments = second_moments(block, linears[0], calls, weights)
            if moments is None:
                return None
            fitted = fit_wush(
                moments,
                [linear.weight.detach() for linear in linears],
                block_size=settings.block_size,
                damping=settings.damping,
            )
        return _checked_inverse(group[0], settings, fitted.to(linears[0].weight.device))


def _checked_inverse(name: str, settings: InputTransformSettings, fitted: InputTransform) -> InputTransform:
    """Returns a transform after checking that what it does to the input is undone in the weight."""
    error = fitted.inverse_error()
    if not error <= _INVERSE_ERROR:  # also when it is NaN
        raise ValueError(
            f"{name}: transform {settings.kind!r} and its inverse do not cancel: outputs deviate by {error:.2g} "
            f"(valid: at most {_INVERSE_ERROR:g})"
        )
    return fitted
