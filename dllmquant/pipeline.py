"""The one loop over blocks: capture, statistics, solve, swap, run the block again for the next one's inputs."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dllmquant.attention_fit import fit_attention
from dllmquant.calibration import CalibrationStates
from dllmquant.capture import BlockCall, first_calls, input_of
from dllmquant.core.allocate import allocate_group_bits
from dllmquant.core.gptaq import gptaq
from dllmquant.core.gptq import GPTQResult, gptq
from dllmquant.core.grid import Clip, Grid, QuantizedWeight, quantize_to_grid
from dllmquant.core.qronos import qronos
from dllmquant.core.rtn import rtn
from dllmquant.core.stats import HessianAccumulator, InputStatistics
from dllmquant.models import ModelAdapter
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.attention import installed, uninstall
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.transform import InputTransform
from dllmquant.plan import Plan
from dllmquant.preparation import Preparation
from dllmquant.recipe import Recipe
from dllmquant.settings import WeightSettings
from dllmquant.transforms.awq import search_clip

logger = logging.getLogger(__name__)

_TWO_PATHS = ("gptaq", "qronos")  # solvers that compare with the full-precision path


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer.

    Attributes:
        name: Full module path.
        bits: Mean bits per weight.
        nbytes: Bytes of codes, scales, zero points and input transform.
        tokens: Calibration tokens with a positive weight; 0 without calibration.
        loss: Tr(ΔW H ΔWᵀ), the weighted mean squared output error summed over outputs, or what the solver minimises
            instead; None without a solver that reads the Hessian.
        damping: Relative damping the solver ended with; None without one.
        dead_inputs: Input channels no calibration token used.
    """

    name: str
    bits: float
    nbytes: int
    tokens: int = 0
    loss: float | None = None
    damping: float | None = None
    dead_inputs: int = 0


@torch.no_grad()
def quantize_blocks(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    plan: Plan,
    recipe: Recipe,
    states: CalibrationStates | None,
    preparation: Preparation,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> list[LayerReport]:
    """Quantizes the planned layers in place, block by block.

    Later blocks, and later groups inside a block, see the inputs the already quantized layers produce. Only one
    block's statistics exist at a time, one Hessian for all layers that share an input; solvers that compare with the
    full-precision path keep a copy of that one block. If a block fails, that block is restored, so a failure in the
    first block leaves the model as it was.

    Args:
        model: The model; must be in evaluation mode.
        adapter: Its adapter.
        plan: What to quantize, from `make_plan`.
        recipe: The recipe.
        states: Calibration states; None for recipes that use no data.
        preparation: From `prepare`.
        batch_size: States per forward pass.
        progress: Whether to show a progress bar.

    Returns:
        One report per quantized layer, in execution order.

    Raises:
        ValueError: A solver fails on a layer; the message names it.
    """
    blocks, device = adapter.block_list(model), model.device
    calls: list[BlockCall] = []
    if states is not None:
        ids, keep = states.batch.ids.to(device), states.batch.attention_mask.to(device)
        calls = first_calls(model, blocks[0], adapter.denoiser(model), ids, keep, batch_size)
    full_calls = list(calls) if recipe.weights.solver in _TWO_PATHS else []
    reports: list[LayerReport] = []
    with tqdm(total=len(plan.modules), desc="quantizing", unit="layer", disable=not progress) as bar:
        for index, (block, groups) in enumerate(zip(blocks, plan.blocks, strict=True)):
            weights: list[Tensor] = []
            if states is not None:
                weights = list(preparation.token_weights[index].to(device).split(batch_size))
            original = copy.deepcopy(block) if full_calls else None
            with _restored_on_failure(model, block, groups):
                attention = recipe.attention  # until it is installed
                for group in groups:
                    if attention is not None and _reads_attention(adapter, f"{adapter.blocks}.{index}.", group):
                        fit_attention(model, block, adapter, attention, calls, weights)
                        attention = None
                    layers = _Group(model, block, group, plan, recipe.weights, preparation)
                    reports += layers.solve(layers.statistics(calls, weights, original, full_calls))
                    bar.update(len(group))
                if attention is not None:  # whatever reads the attention is skipped
                    fit_attention(model, block, adapter, attention, calls, weights)
            calls = [call.following(block) for call in calls]
            if original is not None:
                full_calls = [call.following(original) for call in full_calls]
    return reports


@contextmanager
def _restored_on_failure(model: nn.Module, block: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[None]:
    """Puts a block's layers back if the context fails."""
    originals = {name: model.get_submodule(name) for group in groups for name in group}
    try:
        yield
    except BaseException:
        if installed(block) is not None:
            uninstall(block)
        for name, module in originals.items():
            model.set_submodule(name, module)
        raise


def _reads_attention(adapter: ModelAdapter, prefix: str, group: Sequence[str]) -> bool:
    """Whether a group comes after the value projection, so that queries, keys and values are final."""
    assert adapter.value_output is not None
    order = [leaf for leaves in adapter.linear_groups for leaf in leaves]
    leaf = group[0].removeprefix(prefix)
    values = next(leaves for leaves in adapter.linear_groups if adapter.value_output[0] in leaves)
    return order.index(leaf) > max(order.index(other) for other in values)


@dataclass(frozen=True)
class _Group:
    """The layers of a block that share an input, and how they are quantized."""

    model: nn.Module
    block: nn.Module
    names: Sequence[str]
    plan: Plan
    settings: WeightSettings
    preparation: Preparation

    @property
    def transform(self) -> InputTransform | None:
        """The group's input transform."""
        return self.preparation.input_transforms.get(self.names[0])

    @property
    def activation(self) -> ActivationScheme | None:
        """How the group's input is quantized."""
        return self.preparation.activations[self.names[0]]

    def statistics(
        self,
        calls: Sequence[BlockCall],
        weights: Sequence[Tensor],
        original: nn.Module | None,
        full_calls: Sequence[BlockCall],
    ) -> InputStatistics | None:
        """Accumulates what the solver reads: moments of the transformed and, if asked for, quantized input."""
        needed = self.settings.solver != "rtn" or self.settings.clip == "awq"
        if not calls or not needed:
            return None
        linear = self.model.get_submodule(self.names[0])
        assert isinstance(linear, nn.Linear)
        leaf = next(name for name, module in self.block.named_modules() if module is linear)
        accumulator = HessianAccumulator(linear.in_features, device=linear.weight.device, cross=original is not None)
        for index, (call, token_weights) in enumerate(zip(calls, weights, strict=True)):
            x = self._transformed(input_of(self.block, linear, call))
            if self.settings.inputs == "quantized" and self.activation is not None:
                x = quantize_activation(x, self.activation)
            full = None
            if original is not None:
                full = self._transformed(input_of(original, original.get_submodule(leaf), full_calls[index]))
            accumulator.add(x, token_weights, full)
        return accumulator.statistics()

    def _transformed(self, x: Tensor) -> Tensor:
        return x if self.transform is None else self.transform(x)

    def solve(self, statistics: InputStatistics | None) -> list[LayerReport]:
        """Solves the layers against their common statistics and swaps the packed layers in."""
        reports = []
        for name in self.names:
            linear = self.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            try:
                weight = linear.weight.detach().float()
                if self.transform is not None:
                    weight = self.transform.inverse_transpose_weight(weight)
                solved, result = _solve(weight, self.plan.grid, self.settings, statistics)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            packed = QuantLinear.from_quantized(
                solved, linear.bias, self.activation, linear.weight.dtype, input_transform=self.transform
            )
            self.model.set_submodule(name, packed)
            report = LayerReport(name, solved.grid.mean_bits(linear.in_features), packed.nbytes)
            if result is not None and statistics is not None:
                if result.attempts > 1:
                    logger.warning(
                        "%s: Hessian not positive definite; damping escalated from %g to %g",
                        name,
                        self.settings.damping,
                        result.damping,
                    )
                report = replace(
                    report,
                    tokens=statistics.tokens,
                    loss=result.loss,
                    damping=result.damping,
                    dead_inputs=result.dead,
                )
            reports.append(report)
        return reports


def _solve(
    weight: Tensor, grid: Grid, settings: WeightSettings, statistics: InputStatistics | None
) -> tuple[QuantizedWeight, GPTQResult | None]:
    """Rounds one weight [out, in] onto its grid with the recipe's solver."""
    if settings.solver == "rtn":
        if settings.clip != "awq":
            return rtn(weight, grid, clip=settings.clip), None
        assert statistics is not None
        scale, zero = search_clip(weight, statistics.hessian, grid)
        return QuantizedWeight(grid, quantize_to_grid(weight, scale, zero, grid), scale, zero), None
    assert statistics is not None
    clip: Clip = "mse" if settings.clip == "mse" else "none"
    options: dict[str, Any] = {"act_order": settings.act_order, "damping": settings.damping, "clip": clip}
    moments = [statistics.hessian]
    if statistics.cross is not None:
        moments.append(settings.correction * statistics.cross)

    def solve(grid: Grid) -> GPTQResult:
        return _SOLVERS[settings.solver](weight, *moments, grid=grid, block_size=settings.block_size, **options)

    mixed = settings.mixed
    if mixed is None:
        result = solve(grid)
    else:
        widths = allocate_group_bits(
            weight, statistics.hessian, grid, choices=mixed.choices, mean=mixed.mean, **options
        )
        result = solve(replace(grid, group_bits=widths))
        if grid.bits <= mixed.mean and len(set(widths)) > 1:  # the allocation rests on estimates: this does not
            result = min(solve(grid), result, key=lambda found: found.loss)
    return result.weight, result


# Called with (weight, hessian) and, where the full-precision path was followed, the cross moment.
_SOLVERS: dict[str, Callable[..., GPTQResult]] = {"gptq": gptq, "gptaq": gptaq, "qronos": qronos}
