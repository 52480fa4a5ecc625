"""The one loop over blocks: capture, statistics, solve, swap, run the block again for the next one's inputs."""

import fnmatch
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dllmquant.calibration import CalibrationStates
from dllmquant.capture import BlockCall, StopForward, capture_block_call, watching_input
from dllmquant.core.gptq import GPTQResult, gptq
from dllmquant.core.grid import Grid, QuantizedWeight
from dllmquant.core.rtn import rtn
from dllmquant.core.stats import HessianAccumulator
from dllmquant.models import ModelAdapter
from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.linear import QuantLinear
from dllmquant.recipe import Recipe, RecipeError, WeightSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer.

    Attributes:
        name: Full module path.
        bits: Bits per weight.
        nbytes: Bytes of codes, scales and zero points.
        tokens: Calibration tokens with a positive weight; 0 without calibration.
        loss: Tr(ΔW H ΔWᵀ), the weighted mean squared output error summed over outputs; None without calibration.
        damping: Relative damping the solver ended with; None without calibration.
        dead_inputs: Input channels no calibration token used.
    """

    name: str
    bits: int
    nbytes: int
    tokens: int = 0
    loss: float | None = None
    damping: float | None = None
    dead_inputs: int = 0


@dataclass(frozen=True)
class Plan:
    """Which linear layers of each block are quantized, checked against the model before any work.

    Attributes:
        blocks: Per block, the groups of (full path) layers that share an input; groups left empty are dropped.
        grid: The weights' grid.
        activation: The activations' scheme, or None.
    """

    blocks: tuple[tuple[tuple[str, ...], ...], ...]
    grid: Grid
    activation: ActivationScheme | None

    @property
    def modules(self) -> list[str]:
        """Full paths of the layers that are quantized, in execution order."""
        return [name for groups in self.blocks for group in groups for name in group]


def make_plan(model: nn.Module, adapter: ModelAdapter, recipe: Recipe) -> Plan:
    """Decides what is quantized and how, without touching the model.

    Raises:
        ValueError: The adapter does not fit the model, or a weight holds NaN or infinity.
        RecipeError: A `skip` pattern matches nothing, everything is skipped, or a group size does not divide a layer's
            input width.
    """
    adapter.validate(model)
    linears = {name: module for name, module in adapter.linears(model) if isinstance(module, nn.Linear)}
    skipped = _skipped(recipe, list(linears))
    for name, linear in linears.items():
        if name not in skipped:
            _check_layer(name, linear, recipe)
    settings, activations = recipe.weights, recipe.activations
    grid = Grid(settings.bits, settings.group_size, settings.symmetric)
    scheme = None
    if activations is not None:
        scheme = ActivationScheme(activations.bits, activations.group_size, activations.symmetric)
    blocks = []
    for index in range(len(adapter.block_list(model))):
        prefix = f"{adapter.blocks}.{index}."
        groups = (tuple(prefix + leaf for leaf in g if prefix + leaf not in skipped) for g in adapter.linear_groups)
        blocks.append(tuple(group for group in groups if group))
    return Plan(tuple(blocks), grid, scheme)


def _skipped(recipe: Recipe, names: list[str]) -> set[str]:
    """Returns the layers the recipe leaves in 16 bits."""
    skipped: set[str] = set()
    for pattern in recipe.skip:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise RecipeError(f"skip: {pattern!r} matches no quantizable layer; they look like {names[0]!r}")
        skipped.update(matched)
    if len(skipped) == len(names):
        raise RecipeError("skip: every quantizable layer is skipped; nothing would be quantized")
    return skipped


def _check_layer(name: str, linear: nn.Linear, recipe: Recipe) -> None:
    """Checks that the recipe's groups fit a layer and that the layer's weight is finite."""
    for section in ("weights", "activations"):
        settings = getattr(recipe, section)
        size = None if settings is None else settings.group_size
        if size is not None and linear.in_features % size:
            raise RecipeError(
                f"{section}.group_size: {size} does not divide the {linear.in_features} input channels of {name}; "
                "use a divisor, null, or skip the layer"
            )
    if not bool(torch.isfinite(linear.weight).all()):
        raise ValueError(f"{name}.weight holds NaN or infinity; the model cannot be quantized")


@torch.no_grad()
def quantize_blocks(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    plan: Plan,
    settings: WeightSettings,
    states: CalibrationStates | None,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> list[LayerReport]:
    """Quantizes the planned layers in place, block by block.

    Later blocks, and later groups inside a block, see the inputs the already quantized layers produce. Only one
    block's statistics exist at a time, one Hessian for all layers that share an input. If a block fails, that block
    is restored, so a failure in the first block leaves the model as it was.

    Args:
        model: The model; must be in evaluation mode.
        adapter: Its adapter.
        plan: What to quantize, from `make_plan`.
        settings: The solver's settings.
        states: Calibration states; None for solvers that use no data.
        batch_size: States per forward pass.
        progress: Whether to show a progress bar.

    Returns:
        One report per quantized layer, in execution order.

    Raises:
        ValueError: A solver fails on a layer; the message names it.
    """
    calls, weights = _first_calls(model, adapter, states, batch_size)
    reports: list[LayerReport] = []
    blocks = adapter.block_list(model)
    with tqdm(total=len(plan.modules), desc="quantizing", unit="layer", disable=not progress) as bar:
        for block, groups in zip(blocks, plan.blocks, strict=True):
            originals = {name: model.get_submodule(name) for group in groups for name in group}
            try:
                for group in groups:
                    accumulator = None
                    if states is not None:
                        accumulator = _group_statistics(block, originals[group[0]], calls, weights)
                    reports += _solve_group(model, group, plan, settings, accumulator)
                    bar.update(len(group))
            except BaseException:
                for name, module in originals.items():
                    model.set_submodule(name, module)
                raise
            calls = [call.following(block) for call in calls]
    return reports


def _first_calls(
    model: PreTrainedModel, adapter: ModelAdapter, states: CalibrationStates | None, batch_size: int
) -> tuple[list[BlockCall], list[Tensor]]:
    """Runs the model up to its first block: one call, and one [batch, length] tensor of token weights, per batch."""
    if states is None:
        return [], []
    device = model.device
    denoise, first_block = adapter.denoiser(model), adapter.block_list(model)[0]
    calls, weights = [], []
    for start in range(0, len(states.batch), batch_size):
        rows = slice(start, start + batch_size)
        ids, keep = states.batch.ids[rows].to(device), states.batch.attention_mask[rows].to(device)
        calls.append(capture_block_call(model, first_block, functools.partial(denoise, ids, keep)))
        weights.append(states.weights[rows].to(device))
    return calls, weights


def _group_statistics(
    block: nn.Module, linear: nn.Module, calls: Sequence[BlockCall], weights: Sequence[Tensor]
) -> HessianAccumulator:
    """Accumulates the weighted Hessian of the input that `linear` shares with its group."""
    assert isinstance(linear, nn.Linear)
    accumulator = HessianAccumulator(linear.in_features, device=linear.weight.device)
    for call, token_weights in zip(calls, weights, strict=True):

        def watch(x: Tensor, token_weights: Tensor = token_weights) -> None:
            accumulator.add(x, token_weights)

        with watching_input(linear, watch):
            try:
                call.run(block)
            except StopForward:
                continue
        raise ValueError("a block ran without calling a layer its adapter lists; is the execution order right?")
    return accumulator


def _solve_group(
    model: nn.Module,
    group: Sequence[str],
    plan: Plan,
    settings: WeightSettings,
    accumulator: HessianAccumulator | None,
) -> list[LayerReport]:
    """Solves the layers of a group against their common statistics and swaps the packed layers in."""
    reports = []
    hessian = None if accumulator is None else accumulator.hessian()
    for name in group:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            weight, result = _solve(linear.weight.detach().float(), plan.grid, settings, hessian)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        packed = QuantLinear.from_quantized(weight, linear.bias, plan.activation, linear.weight.dtype)
        model.set_submodule(name, packed)
        if result is None or accumulator is None:
            reports.append(LayerReport(name, plan.grid.bits, packed.nbytes))
            continue
        if result.attempts > 1:
            logger.warning(
                "%s: Hessian not positive definite; damping escalated from %g to %g",
                name,
                settings.damping,
                result.damping,
            )
        reports.append(
            LayerReport(
                name,
                plan.grid.bits,
                packed.nbytes,
                tokens=accumulator.tokens,
                loss=result.loss,
                damping=result.damping,
                dead_inputs=result.dead,
            )
        )
    return reports


def _solve(
    weight: Tensor, grid: Grid, settings: WeightSettings, hessian: Tensor | None
) -> tuple[QuantizedWeight, GPTQResult | None]:
    """Rounds one weight [out, in] onto its grid with the recipe's solver."""
    if hessian is None:
        return rtn(weight, grid, clip=settings.clip), None
    result = gptq(
        weight,
        hessian,
        grid,
        act_order=settings.act_order,
        damping=settings.damping,
        block_size=settings.block_size,
        clip=settings.clip,
    )
    return result.weight, result
