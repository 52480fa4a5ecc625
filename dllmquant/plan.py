"""What a recipe quantizes in a model, decided and checked before any work is done."""

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from dllmquant.core.grid import Grid
from dllmquant.core.hadamard import largest_hadamard_block
from dllmquant.models import ModelAdapter
from dllmquant.nn.activation import ActivationScheme
from dllmquant.recipe import Recipe, RecipeError
from dllmquant.settings import IAAQ, DuQuant, Hadamard, InputTransformSettings


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
            size does not divide a layer's input width, there is no Hadamard matrix where one is asked for, bits are
            asked for by heads that a transform mixes, or the adapter does not say what a setting needs.
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
        _check_transform(name, linears[name], transform)
    _check_adapter(adapter, recipe)
    if any(isinstance(transform, IAAQ) for transform in recipe.transforms):
        _check_scaled(adapter.block_list(model)[0], adapter, blocks[0], transforms)
    _check_heads(model, adapter, recipe, linears, transforms)
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
        if transform.kind in ("smoothquant", "iaaq"):
            needs[f"transform {transform.kind!r}"] = ["scale_pairs"]
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


def _check_scaled(
    block: nn.Module,
    adapter: ModelAdapter,
    stages: tuple[tuple[tuple[str, ...], ...], ...],
    transforms: dict[str, InputTransformSettings],
) -> None:
    """Checks that IA-AQ's input scales find an input that is rotated and whose producer can be scaled."""
    readers = {name for _, consumers in adapter.scalable(block) for name in consumers}
    groups = (group for stage in stages for group in stage if isinstance(transforms.get(group[0]), Hadamard))
    rotated = {name.removeprefix(f"{adapter.blocks}.0.") for group in groups for name in group}
    if not rotated & readers:
        raise RecipeError(
            f"transforms: 'iaaq': what a 'hadamard' rotates ({', '.join(sorted(rotated)) or 'nothing'}) has no "
            f"producer that can be scaled; valid: hadamard.sites at the input of {', '.join(sorted(readers))}"
        )


def _check_heads(
    model: nn.Module,
    adapter: ModelAdapter,
    recipe: Recipe,
    linears: dict[str, nn.Linear],
    transforms: dict[str, InputTransformSettings],
) -> None:
    """Checks what depends on how wide the heads of the attention are."""
    rotates = recipe.attention is not None and recipe.attention.rotate_query_key
    allocation = None if recipe.activations is None else recipe.activations.allocation
    by_head = allocation is not None and allocation.heads
    if not rotates and not by_head:
        return
    assert adapter.heads is not None
    assert adapter.value_output is not None
    heads, output = getattr(model.config, adapter.heads[0]), "." + adapter.value_output[1]
    for name, linear in linears.items():
        if not name.endswith(output):
            continue
        width = linear.in_features // heads
        if rotates and largest_hadamard_block(width) != width:
            raise RecipeError(
                f"attention.rotate_query_key: true, but the heads of {name} have {width} channels, and no Hadamard "
                "matrix of that order can be built; valid: false"
            )
        size = None if recipe.activations is None else recipe.activations.group_size
        if by_head and size is not None and width % size:
            raise RecipeError(
                f"activations.allocation.heads: true, but activations.group_size {size} does not divide the {width} "
                f"channels of the heads of {name}; valid: false, a divisor, or null, which is one scale per head there"
            )
        block = _mixed_channels(transforms[name], linear) if name in transforms else 1
        if by_head and width % block:
            raise RecipeError(
                f"activations.allocation.heads: true, but transform {transforms[name].kind!r} at {name} mixes {block} "
                f"channels, and heads have {width}; valid: false, blocks that divide a head, or other sites"
            )


def _mixed_channels(transform: InputTransformSettings, linear: nn.Linear) -> int:
    """Returns how many channels of an input a transform mixes with each other."""
    if isinstance(transform, DuQuant):
        return linear.in_features  # its permutation deals the channels to all blocks
    return transform.block_size or largest_hadamard_block(linear.in_features)


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


def _check_transform(name: str, linear: nn.Linear, transform: InputTransformSettings) -> None:
    """Checks that a transform's blocks fit a layer's input, and that there is a Hadamard matrix of their order."""
    size, where = transform.block_size, f"input channels of {name}"
    if size is not None and linear.in_features % size:
        raise RecipeError(
            f"transforms: {transform.kind}.block_size {size} does not divide the {linear.in_features} {where}; use a "
            "divisor, or restrict the transform's sites"
        )
    if isinstance(transform, DuQuant):
        return  # its rotations are of any order
    if size is not None and largest_hadamard_block(size) != size:
        raise RecipeError(
            f"transforms: {transform.kind}.block_size {size}: no Hadamard matrix of that order can be built; valid for "
            f"the {where}: {largest_hadamard_block(size)}, for example"
        )
    if size is None and largest_hadamard_block(linear.in_features) == 1:
        raise RecipeError(
            f"transforms: {transform.kind}: no Hadamard matrix can be built whose order divides the "
            f"{linear.in_features} {where}; restrict the transform's sites"
        )


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
