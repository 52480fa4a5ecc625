"""What happens before solving, on the full-precision path: transforms, attention interaction, activation bits.

fold rotations (QuaRot) ─▶ per block: interaction ─▶ scales (SmoothQuant, AWQ) ─▶ input transforms ─▶ site errors
                                                                          knapsack over all sites (IA-AQ) ◀─┘
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dllmquant.calibration import CalibrationStates
from dllmquant.capture import BlockCall, first_calls, input_of, output_of
from dllmquant.core.allocate import allocate
from dllmquant.core.iaaq import SiteErrors
from dllmquant.core.stats import HessianAccumulator, InputStatistics
from dllmquant.models import ModelAdapter
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.sdpa import capture_attention
from dllmquant.nn.transform import InputTransform
from dllmquant.plan import Plan
from dllmquant.recipe import Recipe
from dllmquant.settings import (
    AWQ,
    WUSH,
    DuQuant,
    FoldedTransforms,
    Hadamard,
    InputTransformSettings,
    QuaRot,
    SmoothQuant,
)
from dllmquant.transforms.awq import Objective, linear_objective, mean_magnitude, search_scales, sub_block_objective
from dllmquant.transforms.duquant import fit_duquant
from dllmquant.transforms.fold import (
    apply_scales,
    assert_same_function,
    in_float32,
    linear_at,
    probe_logits,
    rounding_tolerance,
)
from dllmquant.transforms.hadamard import fit_hadamard
from dllmquant.transforms.quarot import rotate_residual, rotate_values
from dllmquant.transforms.smoothquant import smooth_scales
from dllmquant.transforms.wush import fit_wush

logger = logging.getLogger(__name__)

_PROBE_STATES = 4  # states on which a folded transform must leave the logits as they were
_SEARCH_STATES = 32  # states on which AWQ's scales are searched; the statistics use all
_SAMPLES = 512  # tokens DuQuant's rotations are fitted to


@dataclass(frozen=True)
class SiteBits:
    """The bits one site, or one head of it, was given.

    Attributes:
        site: Full path of the first layer that reads the input.
        unit: Index of the head, or None for the whole input.
        bits: Bits given.
        errors: The measured error at each candidate width.
    """

    site: str
    unit: int | None
    bits: int
    errors: dict[int, float]


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
        walk = _Walk(model, adapter, plan, recipe, states, progress)
        if states is None:
            walk.without_data()
        else:
            walk.over_blocks(states)
    activations: dict[str, ActivationScheme | None] = {group[0]: plan.activation for group in _groups(plan)}
    bits: tuple[SiteBits, ...] = ()
    if recipe.activations is not None and recipe.activations.allocation is not None:
        assert states is not None
        if recipe.activations.allocation.objective == "logits":
            walk.measure_logits(states)
        activations, bits = walk.allocated()
    return Preparation(walk.transforms, activations, tuple(walk.token_weights), bits)


def _groups(plan: Plan) -> Iterator[tuple[str, ...]]:
    for groups in plan.blocks:
        yield from groups


@contextmanager
def _checked_function(
    model: PreTrainedModel, adapter: ModelAdapter, recipe: Recipe, states: CalibrationStates | None
) -> Iterator[None]:
    """Checks that the transforms folded inside the context leave the logits as they were."""
    folded = [t.kind for t in recipe.transforms if isinstance(t, FoldedTransforms)]
    if not folded:
        yield
        return
    mask_id = adapter.mask_id(model.config)
    if states is None:
        vocabulary = model.get_submodule(adapter.embedding).get_parameter("weight").shape[0]
        ids = torch.randint(vocabulary, (_PROBE_STATES, 32), generator=torch.Generator().manual_seed(0))
        keep = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids, keep = states.batch.ids[:_PROBE_STATES], states.batch.attention_mask[:_PROBE_STATES]
    ids, keep = ids.to(model.device), keep.to(model.device)
    blocks = adapter.block_list(model)
    with in_float32(model, blocks):
        before = probe_logits(adapter.denoiser(model), ids, keep, mask_id)
    yield
    with in_float32(model, blocks):
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
    states: CalibrationStates | None
    progress: bool

    def __post_init__(self) -> None:
        self.transforms: dict[str, InputTransform] = {}
        self.token_weights: list[Tensor] = []
        self.errors: dict[tuple[str, int | None], dict[int, float]] = {}
        self.sizes: dict[tuple[str, int | None], int] = {}
        self.allocation = None if self.recipe.activations is None else self.recipe.activations.allocation
        self.modules = set(self.plan.modules)

    def without_data(self) -> None:
        """Fits the transforms that need no data."""
        for group in _groups(self.plan):
            settings = self.plan.input_transforms.get(group[0])
            if isinstance(settings, Hadamard):
                linear = linear_at(self.model, group[0])
                fitted = fit_hadamard(linear.in_features, block_size=settings.block_size, seed=self.recipe.seed)
                self.transforms[group[0]] = fitted.to(linear.weight.device)

    def over_blocks(self, states: CalibrationStates) -> None:
        """Runs the full-precision path block by block."""
        recipe, blocks = self.recipe, self.adapter.block_list(self.model)
        measures = self.allocation is not None and self.allocation.objective == "output"
        received, self.token_weights = block_token_weights(self.model, self.adapter, recipe, states, measures=measures)
        if not (measures or recipe.transforms):
            return
        assert recipe.calibration is not None
        size, device = recipe.calibration.batch_size, self.model.device
        ids, keep = states.batch.ids.to(device), states.batch.attention_mask.to(device)
        calls = first_calls(self.model, blocks[0], self.adapter.denoiser(self.model), ids, keep, size)
        bar = tqdm(
            enumerate(zip(blocks, self.plan.blocks, strict=True)),
            desc="preparing",
            total=len(blocks),
            unit="block",
            disable=not self.progress,
        )
        for index, (block, groups) in bar:
            weights = self.token_weights[index].to(device).split(size)
            for transform in recipe.transforms:
                if isinstance(transform, SmoothQuant | AWQ):
                    self._scale(block, f"{self.adapter.blocks}.{index}.", calls, weights, transform)
            for group in groups:
                settings = self.plan.input_transforms.get(group[0])
                if settings is not None:
                    self.transforms[group[0]] = self._fit(block, group, calls, weights, settings)
                if measures:
                    attended = (states.weights * received[index]).to(device).split(size)
                    self._measure_output(block, group, calls, attended)
            calls = [call.following(block) for call in calls]

    def _scale(
        self,
        block: nn.Module,
        prefix: str,
        calls: Sequence[BlockCall],
        weights: Sequence[Tensor],
        transform: SmoothQuant | AWQ,
    ) -> None:
        """Moves channel scales between producers and consumers of one block."""
        for producer, consumers in _scale_pairs(block, self.adapter, transform):
            linears = [linear_at(block, consumer) for consumer in consumers]
            rounded = [consumer for consumer in consumers if prefix + consumer in self.modules]
            if not rounded:  # all of them stay in 16 bits
                continue
            statistics = input_statistics(block, linears[0], calls, weights)
            if isinstance(transform, SmoothQuant):
                scales = smooth_scales(statistics.absmax, [linear.weight for linear in linears], transform.alpha)
            else:
                evaluate = self._awq_objective(block, rounded, calls, weights, transform)
                own = [linear.weight.detach() for linear in linears]
                mean = mean_magnitude(own, self.plan.grid) if transform.duo_scaling else None
                found = search_scales(
                    statistics.mean_abs, evaluate, grid_points=transform.grid_points, weight_mean=mean
                )
                scales = found.scales
            apply_scales(block, producer, consumers, scales)

    def _awq_objective(
        self,
        block: nn.Module,
        consumers: Sequence[str],
        calls: Sequence[BlockCall],
        weights: Sequence[Tensor],
        transform: AWQ,
    ) -> Objective:
        """Returns what AWQ's scale search minimises."""
        grid, activation = self.plan.grid, self.plan.activation
        if transform.objective == "layer":
            linears = [linear_at(block, consumer) for consumer in consumers]
            x, token_weights = sample_tokens(block, linears[0], calls, weights, _SAMPLES, self.recipe.seed)
            return linear_objective([linear.weight.detach() for linear in linears], x, token_weights, grid, activation)
        some = max(1, _SEARCH_STATES // calls[0].hidden.shape[0])
        end = block.get_submodule(_sub_block_end(self.adapter, consumers))
        run = functools.partial(_outputs, block, end, calls[:some])
        return sub_block_objective(block, consumers, run, weights[:some], grid, activation)

    def _fit(
        self,
        block: nn.Module,
        group: Sequence[str],
        calls: Sequence[BlockCall],
        weights: Sequence[Tensor],
        settings: InputTransformSettings,
    ) -> InputTransform:
        """Fits the input transform of a group."""
        linears = [linear_at(self.model, name) for name in group]
        if isinstance(settings, Hadamard):
            fitted = fit_hadamard(linears[0].in_features, block_size=settings.block_size, seed=self.recipe.seed)
        elif isinstance(settings, DuQuant):
            samples, _ = sample_tokens(block, linears[0], calls, weights, _SAMPLES, self.recipe.seed)
            fitted = fit_duquant(samples, block_size=settings.block_size, steps=settings.steps, seed=self.recipe.seed)
        else:
            assert isinstance(settings, WUSH)
            hessian = input_statistics(block, linears[0], calls, weights).hessian
            fitted = fit_wush(
                hessian,
                [linear.weight.detach() for linear in linears],
                block_size=settings.block_size,
                damping=settings.damping,
            )
        return fitted.to(linears[0].weight.device)

    def _units(self, group: Sequence[str]) -> list[int | None]:
        """Lists the units of a group's input: the heads of the attention output if asked for, else the whole."""
        assert self.allocation is not None
        assert self.adapter.value_output is not None or not self.allocation.heads
        if (
            self.allocation.heads
            and self.adapter.value_output
            and group[0].endswith("." + self.adapter.value_output[1])
        ):
            assert self.adapter.heads is not None
            return list(range(getattr(self.model.config, self.adapter.heads[0])))
        return [None]

    def _candidates(self) -> tuple[int, int]:
        assert self.recipe.activations is not None
        assert self.allocation is not None
        return self.recipe.activations.bits, self.allocation.high_bits

    def _scheme(self, group: Sequence[str], bits: Sequence[int]) -> ActivationScheme:
        """Returns a group's scheme with the given bits, one per unit."""
        assert self.plan.activation is not None
        if len(bits) == 1:
            return replace(self.plan.activation, bits=bits[0])
        width = linear_at(self.model, group[0]).in_features // len(bits)
        size = self.plan.activation.group_size
        if size is None or width % size:
            size = width
        per_group = tuple(b for b in bits for _ in range(width // size))
        return replace(self.plan.activation, bits=max(bits), group_size=size, group_bits=per_group)

    def _trials(self, group: Sequence[str]) -> Iterator[tuple[tuple[str, int | None], int, ActivationScheme]]:
        """Yields (unit, bits, scheme) for every candidate; a unit is tried with the others at high bits."""
        units = self._units(group)
        low, high = self._candidates()
        for unit in units:
            self.sizes[group[0], unit] = linear_at(self.model, group[0]).in_features // len(units)
            for bits in (low, high):
                scheme = self._scheme(group, [bits if other == unit else high for other in units])
                yield (group[0], unit), bits, scheme

    def _measure_output(
        self, block: nn.Module, group: Sequence[str], calls: Sequence[BlockCall], weights: Sequence[Tensor]
    ) -> None:
        """Measures the interaction-weighted error of the outputs of the layers that read a quantized input."""
        linears = [linear_at(self.model, name) for name in group]
        transform = self.transforms.get(group[0])
        matrix = torch.cat([linear.weight.detach().float() for linear in linears])
        if transform is not None:
            matrix = transform.inverse_transpose_weight(matrix).to(matrix)
        trials = list(self._trials(group))
        quantizers = [functools.partial(quantize_activation, scheme=scheme) for _, _, scheme in trials]
        errors = SiteErrors(matrix, quantizers)
        for call, w in zip(calls, weights, strict=True):
            x = input_of(block, linears[0], call).float()
            errors.add(x if transform is None else transform(x), w)
        for (unit, bits, _), error in zip(trials, errors.relative().tolist(), strict=True):
            self.errors.setdefault(unit, {})[bits] = error

    def measure_logits(self, states: CalibrationStates) -> None:
        """Measures, site by site, the KL divergence of the predictions at masked positions when it is quantized."""
        assert self.recipe.calibration is not None
        size, denoise = self.recipe.calibration.batch_size, self.adapter.denoiser(self.model)
        trials = [(group, *trial) for group in _groups(self.plan) for trial in self._trials(group)]
        totals = [0.0] * len(trials)
        starts = range(0, len(states.batch), size)
        for start in tqdm(starts, desc="measuring sites", unit="batch", disable=not self.progress):
            rows = slice(start, start + size)
            ids = states.batch.ids[rows].to(self.model.device)
            keep = states.batch.attention_mask[rows].to(self.model.device)
            masked = states.batch.mask[rows].to(self.model.device)
            weights = states.weights[rows].to(self.model.device)[masked]
            reference = denoise(ids, keep)[masked].float().log_softmax(-1)
            for index, (group, _, _, scheme) in enumerate(trials):
                with _quantized_inputs(self.model, group, scheme, self.transforms.get(group[0])):
                    got = denoise(ids, keep)[masked].float().log_softmax(-1)
                divergence = (reference.exp() * (reference - got)).sum(-1)
                totals[index] += float((divergence * weights).sum())
        for (_, unit, bits, _), total in zip(trials, totals, strict=True):
            self.errors.setdefault(unit, {})[bits] = total

    def allocated(self) -> tuple[dict[str, ActivationScheme | None], tuple[SiteBits, ...]]:
        """Solves the knapsack and returns every group's scheme."""
        assert self.allocation is not None
        low, high = self._candidates()
        units = list(self.errors)
        costs = torch.tensor([[self.errors[unit][low], self.errors[unit][high]] for unit in units], dtype=torch.float64)
        sizes = [self.sizes[unit] for unit in units]
        chosen = dict(zip(units, allocate(costs, sizes, (low, high), self.allocation.mean_bits), strict=True))
        schemes: dict[str, ActivationScheme | None] = {}
        for group in _groups(self.plan):
            schemes[group[0]] = self._scheme(group, [chosen[group[0], unit] for unit in self._units(group)])
        table = tuple(SiteBits(site, unit, chosen[site, unit], self.errors[site, unit]) for site, unit in units)
        raised = sum(entry.bits == high for entry in table)
        logger.info("activation bits: %d of %d units at %d bits", raised, len(table), high)
        return schemes, table


@torch.no_grad()
def block_token_weights(
    model: PreTrainedModel, adapter: ModelAdapter, recipe: Recipe, states: CalibrationStates, *, measures: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Decides how much each token counts in each block.

    Args:
        model: The model.
        adapter: Its adapter.
        recipe: The recipe; with token weights "interaction" a token counts by the attention it receives in the block.
        states: The states.
        measures: Whether the interaction is wanted whatever the weights are.

    Returns:
        Per block the attention received (empty when nothing asks for it) and the token weights, [states, length].

    Raises:
        ValueError: The interaction is needed, but a block does not call scaled-dot-product attention.
    """
    blocks, interacts = adapter.block_list(model), recipe.token_weights.kind == "interaction"
    if not (interacts or measures):
        return [], [states.weights] * len(blocks)
    assert recipe.calibration is not None
    size, device = recipe.calibration.batch_size, model.device
    ids, keep = states.batch.ids.to(device), states.batch.attention_mask.to(device)
    calls = first_calls(model, blocks[0], adapter.denoiser(model), ids, keep, size)
    queries = states.weights.to(device).split(size)
    received = []
    for block in blocks:
        received.append(torch.cat([attention_received(block, c, w) for c, w in zip(calls, queries, strict=True)]).cpu())
        calls = [call.following(block) for call in calls]
    return received, received if interacts else [states.weights] * len(blocks)


def attention_received(block: nn.Module, call: BlockCall, weights: Tensor) -> Tensor:
    """Returns the attention each token receives in a block, [batch, length], relative to its sequence's mean.

    Args:
        block: The block.
        call: How it is called.
        weights: Weights of the queries [batch, length]; 0 on padding.

    Raises:
        ValueError: The block does not call scaled-dot-product attention exactly once.
    """
    return capture_attention(block, lambda: call.run(block)).interaction(weights).float()


def _outputs(block: nn.Module, end: nn.Module, calls: Sequence[BlockCall]) -> Iterator[Tensor]:
    return (output_of(block, end, call) for call in calls)


def _sub_block_end(adapter: ModelAdapter, consumers: Sequence[str]) -> str:
    """Returns the layer that writes the output of the sub-block (attention or feed-forward) the consumers are in."""
    order = [leaf for group in adapter.linear_groups for leaf in group]
    later = order[order.index(consumers[0]) :]
    return next(leaf for leaf in later if leaf in adapter.residual_outputs)


def input_statistics(
    block: nn.Module, linear: nn.Module, calls: Sequence[BlockCall], weights: Sequence[Tensor]
) -> InputStatistics:
    """Accumulates the weighted statistics of a layer's input over all calls."""
    assert isinstance(linear, nn.Linear)
    accumulator = HessianAccumulator(linear.in_features, device=linear.weight.device)
    for call, token_weights in zip(calls, weights, strict=True):
        accumulator.add(input_of(block, linear, call), token_weights)
    return accumulator.statistics()


def sample_tokens(
    block: nn.Module, linear: nn.Module, calls: Sequence[BlockCall], weights: Sequence[Tensor], count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draws inputs of a layer among the tokens of positive weight: float32 [count, in], and their weights [count]."""
    generator = torch.Generator().manual_seed(seed)
    per_call = -(-count // len(calls))
    rows, drawn = [], []
    for call, token_weights in zip(calls, weights, strict=True):
        used = token_weights > 0
        x, w = input_of(block, linear, call)[used], token_weights[used]
        chosen = torch.randperm(len(x), generator=generator)[:per_call].to(x.device)
        rows.append(x[chosen])
        drawn.append(w[chosen])
    return torch.cat(rows)[:count].float(), torch.cat(drawn)[:count]


def _scale_pairs(
    block: nn.Module, adapter: ModelAdapter, transform: SmoothQuant | AWQ
) -> list[tuple[str, tuple[str, ...]]]:
    """Lists (producer, consumers) a method scales: SmoothQuant norms only; AWQ linear producers as well."""
    pairs = list(adapter.scale_pairs)
    if isinstance(transform, SmoothQuant):
        return [pair for pair in pairs if not isinstance(block.get_submodule(pair[0]), nn.Linear)]
    if adapter.value_output is not None:
        value, output = (linear_at(block, name) for name in adapter.value_output)
        if value.out_features == output.in_features:  # grouped value heads feed several output channels each
            pairs.insert(1, (adapter.value_output[0], (adapter.value_output[1],)))
    return pairs


@contextmanager
def _quantized_inputs(
    model: nn.Module, group: Sequence[str], scheme: ActivationScheme, transform: InputTransform | None
) -> Iterator[None]:
    """While the context lasts, the layers of a group compute with quantized inputs and their own weights."""

    def output_of(linear: nn.Linear) -> Callable[..., Tensor]:
        weight = linear.weight if transform is None else transform.inverse_transpose_weight(linear.weight)

        def recompute(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            x = args[0] if transform is None else transform(args[0])
            return F.linear(quantize_activation(x, scheme), weight.to(x.dtype), linear.bias)

        return recompute

    with ExitStack() as stack:
        for name in group:
            linear = linear_at(model, name)
            stack.callback(linear.register_forward_hook(output_of(linear)).remove)
        yield
