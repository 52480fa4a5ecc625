"""What a recipe quantizes in a model, decided and checked before any work is done."""

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from dllmquant.core.grid import Grid
from dllmquant.models import ModelAdapter
from dllmquant.nn.activation import ActivationScheme
from dllmquant.recipe import Recipe, RecipeError
from dllmquant.settings import InputTransformSettings


@dataclass(frozen=True)
class Plan:
    """Which linear layers of each block are quantized, checked against the model before any work.

    Attributes:
        stages: Per block, what can be solved together, in execution order: groups of (full path) layers that share an
            input; more than one group where experts read side by side. Groups left empty are dropped.
        grid: The weights' grid.
        activation: The activations' scheme, or None.
        input_transforms: The settings of the input transform of a group, by the full path of its first layer.
    """

    stages: tuple[tuple[tuple[tuple[str, ...], ...], ...], ...]
    grid: Grid
    activation: ActivationScheme | None
    input_transforms: dict[str, InputTransformSettings]

    @property
    def modules(self) -> list[str]:
        """Full paths of the layers that are quantized, in execution order."""
        return [name for group in self.groups for name in group]

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The groups of all blocks, in execution order."""
        return [group for groups in self.blocks for group in groups]

    @property
    def blocks(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The groups of each block, in execution order."""
        return tuple(tuple(group for stage in stages for group in stage) for stages in self.stages)


def make_plan(model: nn.Module, adapter: ModelAdapter, recipe: Recipe) -> Plan:
    """Decides what is quantized and how, without touching the model.

    Raises:
        ValueError: The adapter does not fit the model, or a weight holds NaN or infinity.
        RecipeError: A `skip` pattern or a transform's site matches nothing, everything is skipped, a group or block
            size does not divide a layer's input width, or the adapter does not say what a setting needs.
    """
    adapter.validate(model)
    linears = {name: module for name, module in adapter.linears(model) if isinstance(module, nn.Linear)}
    skipped = _skipped(recipe, list(linears))
    settings, activations = recipe.weights, recipe.activations
    grid = Grid(settings.bits, settings.group_size, settings.symmetric)
    scheme = None
    if activations is not None:
        scheme = ActivationScheme(
            activations.bits, activations.group_size, activations.symmetric, full_range=activations.full_range
        )
    by_site = _input_transforms(adapter, recipe)
    blocks, transforms = [], {}
    for index, block in enumerate(adapter.block_list(model)):
        stages: dict[str, list[tuple[str, ...]]] = {}
        for site, leaves in adapter.sites(block):
            names = (f"{adapter.blocks}.{index}.{leaf}" for leaf in leaves)
            group = tuple(name for name in names if name not in skipped)
            if group:
                stages.setdefault(site, []).append(group)
                if site in by_site:
                    transforms[group[0]] = by_site[site]
        blocks.append(tuple(tuple(stage) for stage in stages.values()))
    for name, linear in linears.items():
        if name not in skipped:
            _check_layer(name, linear, recipe)
    for name, transform in transforms.items():
        size = transform.block_size
        if size is not None and linears[name].in_features % size:
            raise RecipeError(
                f"transforms: {transform.kind}.block_size {size} does not divide the {linears[name].in_features} input "
                f"channels of {name}; use a divisor, or restrict the transform's sites"
            )
    _check_adapter(adapter, recipe)
    return Plan(tuple(blocks), grid, scheme, transforms)


def _input_transforms(adapter: ModelAdapter, recipe: Recipe) -> dict[str, InputTransformSettings]:
    """Returns the input transform of every group that has one, by the group's first layer."""
    sites = [group[0] for group in adapter.linear_groups]
    chosen: dict[str, InputTransformSettings] = {}
    for transform in recipe.transforms:
        if isinstance(transform, InputTransformSettings):
            for name in sites if transform.sites is None else transform.sites:
                meant = [name] if name in sites else [site for other, site in adapter.site_names if other == name]
                if not meant:
                    raise RecipeError(f"transforms: {transform.kind}.sites: {name!r}; valid: {', '.join(sites)}")
                for site in meant:
                    if site in chosen:
                        raise RecipeError(
                            f"transforms: {transform.kind}.sites: {name!r} has a {chosen[site].kind} already; "
                            "valid: one transform per input"
                        )
                    chosen[site] = transform
    return chosen


def _check_adapter(adapter: ModelAdapter, recipe: Recipe) -> None:
    """Checks that the adapter names what the recipe's transforms and attention settings touch."""
    needs: dict[str, list[str]] = {}
    for transform in recipe.transforms:
        if transform.kind == "smoothquant":
            needs["transform 'smoothquant'"] = ["scale_pairs"]
        elif transform.kind == "awq":
            needs["transform 'awq'"] = ["scale_pairs"] + ["residual_outputs"] * (transform.objective == "sub_block")
        elif transform.kind == "quarot":
            residual = ["scale_pairs", "residual_outputs", "final_norm"] if transform.residual else []
            needs["transform 'quarot'"] = residual + (["value_output", "heads"] if transform.values else [])
    if recipe.attention is not None:
        needs["attention"] = ["value_output", "heads"]
    if recipe.activations is not None and recipe.activations.allocation and recipe.activations.allocation.heads:
        needs["activations.allocation.heads"] = ["value_output", "heads"]
    for what, fields in needs.items():
        missing = [field for field in fields if not getattr(adapter, field)]
        if missing:
            raise RecipeError(f"{what}: adapter {adapter.model_type!r} does not name {', '.join(missing)}")


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
