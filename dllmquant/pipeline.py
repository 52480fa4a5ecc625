"""The one loop over blocks: capture, statistics, solve, swap, run the block again for the next one's inputs."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dllmquant.attention_fit import AttentionReport, fit_attention
from dllmquant.calibration import CalibrationStates
from dllmquant.capture import BlockCall, first_calls, inputs_of
from dllmquant.core.allocate import allocate_group_bits
from dllmquant.core.gptaq import gptaq
from dllmquant.core.gptq import GPTQResult, gptq
from dllmquant.core.grid import Clip, Grid, QuantizedWeight, quantize_to_grid
from dllmquant.core.qronos import qronos
from dllmquant.core.rtn import rtn
from dllmquant.core.stats import HessianAccumulator, InputStatistics
from dllmquant.models import ModelAdapter
from dllmquant.models.experts import is_expert
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.attention import installed, uninstall
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.transform import InputTransform
from dllmquant.plan import Plan
from dllmquant.preparation import Preparation
from dllmquant.recipe import Recipe
from dllmquant.settings import WeightSettings
from dllmquant.transforms.awq import search_clip
from dllmquant.transforms.fold import linear_at

logger = logging.getLogger(__name__)

_TWO_PATHS = ("gptaq", "qronos")  # solvers that compare with the full-precision path
_STATISTICS_BYTES = 4 << 30  # of Hessians held at a time, where a stage has many groups (experts)


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
        fallback: Why the layer was rounded to nearest instead of solved; None if it was not.
    """

    name: str
    bits: float
    nbytes: int
    tokens: int = 0
    loss: float | None = None
    damping: float | None = None
    dead_inputs: int = 0
    fallback: str | None = None


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
) -> tuple[list[LayerReport], list[AttentionReport]]:
    """Quantizes the planned layers in place, block by block.

    Later blocks, and later stages inside a block, see the inputs the already quantized layers produce. Only one
    block's statistics exist at a time, one Hessian for all layers that share an input; solvers that compare with the
    full-precision path keep a copy of that one block. If a block fails, that block is restored, so a failure in the
    first block leaves the model as it was.

    The statistics of an expert are those of the tokens routed to it, by the quantized path. An expert with fewer than
    `calibration.min_expert_tokens` of them is rounded to nearest, and its reports say so.

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
        One report per quantized layer, and one per block whose attention was fitted, both in execution order.

    Raises:
        ValueError: A solver fails on a layer; the message names it.
    """
    blocks, device = adapter.block_list(model), model.device
    calls: list[BlockCall] = []
    real: list[Tensor] = []
    if states is not None:
        ids, keep = states.batch.ids.to(device), states.batch.attention_mask.to(device)
        real = list(keep.split(batch_size))
        calls = first_calls(model, blocks, adapter.denoiser(model), ids, keep, batch_size)
    full_calls = list(calls) if recipe.weights.solver in _TWO_PATHS else []
    reports: list[LayerReport] = []
    attention_reports: list[AttentionReport] = []
    with tqdm(total=len(plan.modules), desc="quantizing", unit="layer", disable=not progress) as bar:
        for index, (block, stages) in enumerate(zip(blocks, plan.stages, strict=True)):
            name = f"{adapter.blocks}.{index}"
            weights: list[Tensor] = []
            if states is not None:
                weights = list(preparation.token_weights[index].to(device).split(batch_size))
            original = copy.deepcopy(block) if full_calls else None
            with _restored_on_failure(model, block, [names for stage in stages for names in stage]):
                attention = recipe.attention  # until it is installed
                fitted = None
                for stage in stages:
                    if attention is not None and _reads_attention(adapter, block, f"{name}.", stage):
                        fitted = fit_attention(model, name, adapter, attention, calls, weights, real)
                        attention = None
                    groups = [_Group(model, block, names, plan, recipe, preparation) for names in stage]
                    statistics = _statistics(groups, calls, weights, original, full_calls)
                    for group, known in zip(groups, statistics, strict=True):
                        reports += group.solve(known)
                        bar.update(len(group.names))
                if attention is not None:  # whatever reads the attention is skipped
                    fitted = fit_attention(model, name, adapter, attention, calls, weights, real)
            if fitted is not None:
                attention_reports.append(fitted)
            calls = [call.following(block) for call in calls]
            if original is not None:
                full_calls = [call.following(original) for call in full_calls]
    return reports, attention_reports


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


def _reads_attention(adapter: ModelAdapter, block: nn.Module, prefix: str, stage: Sequence[Sequence[str]]) -> bool:
    """Whether a stage comes after the value projection, so that queries, keys and values are final."""
    assert adapter.value_output is not None
    order = [leaves for _, leaves in adapter.sites(block)]
    values = next(index for index, leaves in enumerate(order) if adapter.value_output[0] in leaves)
    return next(index for index, leaves in enumerate(order) if stage[0][0].removeprefix(prefix) in leaves) > values


@dataclass(frozen=True)
class _Group:
    """The layers of a block that share an input, and how they are quantized."""

    model: nn.Module
    block: nn.Module
    names: Sequence[str]
    plan: Plan
    recipe: Recipe
    preparation: Preparation

    @property
    def settings(self) -> WeightSettings:
        """How its weights are quantized."""
        return self.recipe.weights

    @property
    def needs_statistics(self) -> bool:
        """Whether its solver reads statistics of the input."""
        return self.settings.solver != "rtn" or self.settings.clip == "awq"

    @property
    def linear(self) -> nn.Linear:
        """The first layer."""
        return linear_at(self.model, self.names[0])

    @property
    def transform(self) -> InputTransform | None:
        """The group's input transform."""
        return self.preparation.input_transforms.get(self.names[0])

    @property
    def activation(self) -> ActivationScheme | None:
        """How the group's input is quantized."""
        return self.preparation.activations[self.names[0]]

    def read(self, x: Tensor) -> Tensor:
        """Returns an input as the layers are solved for it: transformed and, if asked for, quantized."""
        x = self.transformed(x)
        if self.settings.inputs == "exact" or self.activation is None:
            return x
        return quantize_activation(x, self.activation)

    def transformed(self, x: Tensor) -> Tensor:
        """Returns an input after its transform."""
        return x if self.transform is None else self.transform(x)

    def solve(self, statistics: InputStatistics | None) -> list[LayerReport]:
        """Solves the layers against their common statistics and swaps the packed layers in."""
        reports = []
        fallback = self._fallback(statistics)
        for name in self.names:
            linear = self.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            try:
                weight = linear.weight.detach().float()
                if self.transform is not None:
                    weight = self.transform.inverse_transpose_weight(weight)
                if fallback is not None:
                    solved, result = rtn(weight, self._uniform_grid(), clip=_range(self.settings)), None
                else:
                    solved, result = _solve(weight, self.plan.grid, self.settings, statistics)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            packed = QuantLinear.from_quantized(
                solved, linear.bias, self.activation, linear.weight.dtype, input_transform=self.transform
            )
            self.model.set_submodule(name, packed)
            bits, tokens = solved.grid.mean_bits(linear.in_features), 0 if statistics is None else statistics.tokens
            report = LayerReport(name, bits, packed.nbytes, tokens=tokens, fallback=fallback)
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
                    loss=result.loss,
                    damping=result.damping,
                    dead_inputs=result.dead,
                )
            reports.append(report)
        return reports

    def _uniform_grid(self) -> Grid:
        """Returns the grid of a layer that is not solved: of one width, within the mean where widths are mixed."""
        mixed = self.settings.mixed
        if mixed is None:
            return self.plan.grid
        return replace(self.plan.grid, bits=max(bits for bits in mixed.choices if bits <= mixed.mean))

    def _fallback(self, statistics: InputStatistics | None) -> str | None:
        """Says why the layers cannot be solved, which only happens to experts; None if they can."""
        if not self.needs_statistics or self.recipe.calibration is None:
            return None
        needed, seen = self.recipe.calibration.min_expert_tokens, 0 if statistics is None else statistics.tokens
        if seen >= needed or not is_expert(self.block, self.linear):
            return None
        return f"rounded to nearest: {seen} of {needed} tokens routed to it"


def _statistics(
    groups: Sequence[_Group],
    calls: Sequence[BlockCall],
    weights: Sequence[Tensor],
    original: nn.Module | None,
    full_calls: Sequence[BlockCall],
) -> Iterator[InputStatistics | None]:
    """Yields the statistics of each group of a stage; None where none are needed or an expert read no token.

    All groups are served by one run of the block per call, or as many as their sums fit in memory.
    """
    if not calls or not groups[0].needs_statistics:
        yield from itertools.repeat(None, len(groups))
        return
    block, features = groups[0].block, groups[0].linear.in_features
    at_once = max(1, _STATISTICS_BYTES // (4 * features**2 * (1 if original is None else 2)))
    for start in range(0, len(groups), at_once):
        part = groups[start : start + at_once]
        linears = [group.linear for group in part]
        leaves = {module: name for name, module in block.named_modules()}
        sums = [
            HessianAccumulator(linear.in_features, device=linear.weight.device, cross=original is not None)
            for linear in linears
        ]
        for index, (call, token_weights) in enumerate(zip(calls, weights, strict=True)):
            seen = inputs_of(block, linears, call, token_weights)
            full: Sequence[Tensor | None] = [None] * len(part)
            if original is not None:
                twins = [original.get_submodule(leaves[linear]) for linear in linears]
                routed = inputs_of(original, twins, full_calls[index], token_weights, chosen=seen.chosen)
                full = [group.transformed(x) for group, x in zip(part, routed.tokens, strict=True)]
            for group, total, x, own, other in zip(part, sums, seen.tokens, seen.weights, full, strict=True):
                total.add(group.read(x), own, other)
        for linear, total in zip(linears, sums, strict=True):
            yield None if total.tokens == 0 and is_expert(block, linear) else total.statistics()


def _range(settings: WeightSettings) -> Clip:
    """Returns how ranges are searched without statistics."""
    return "mse" if settings.clip == "mse" else "none"


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
    options: dict[str, Any] = {
        "act_order": settings.act_order,
        "damping": settings.damping,
        "clip": _range(settings),
    }
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
