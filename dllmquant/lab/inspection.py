"""What a checkpoint holds, told from its configuration and the headers of its weight files."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, PretrainedConfig

from dllmquant.attention_fit import AttentionReport
from dllmquant.calibration import Cost
from dllmquant.calibration.experts import experts_summary
from dllmquant.core.attention import PROBS_GRIDS
from dllmquant.core.coverage import Coverage
from dllmquant.core.grid import Grid
from dllmquant.core.softmax_search import PROBS_RANGES
from dllmquant.integrations.transformers import QUANT_METHOD, DLLMQuantConfig
from dllmquant.lab.tables import aligned
from dllmquant.models import adapter_for
from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.attention import AttentionScheme
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.transform import TransformStep
from dllmquant.preparation import SiteBits
from dllmquant.recipe import Recipe

_LISTED_HEADS = 8  # of more heads than these the table tells how many have which bits

Scheme = tuple[Grid, ActivationScheme | None, tuple[TransformStep, ...]]


@dataclass(frozen=True)
class ActivationBits:
    """Activation bits that differ between the inputs of a model's layers.

    Invariant: `bits` has a row for every block and in it an entry for every site.

    Attributes:
        sites: Inputs of a block, each by the names of the layers that read it.
        bits: [blocks][sites], the bits of every head, or one number for the whole input; empty where the input is not
            quantized.
        mean: Mean bits per activation value.
    """

    sites: tuple[str, ...]
    bits: tuple[tuple[tuple[int, ...], ...], ...]
    mean: float


def describe_checkpoint(directory: Path, config: PretrainedConfig) -> str:
    """Describes a checkpoint for people: recipe, version and seed; layers by kind; attention; bits; coverage; files.

    Args:
        directory: The checkpoint.
        config: Its configuration.

    Returns:
        Several lines of text.

    Raises:
        ValueError: A weight file is damaged or lacks a tensor, or the quantization configuration is malformed or names
            something the model does not have.
    """
    quantization, facts = _quantization(config), [("directory", str(directory)), ("family", str(config.model_type))]
    structure, sizes = _Structure.of(config), _tensor_bytes(directory)
    parts = []
    if quantization is None:
        facts.append(("quantized", _not_ours(config)))
        parts.append(_layers(structure, {}, [], sizes, directory))
    else:
        recipe = Recipe.load(quantization.recipe)
        facts += _facts(quantization, recipe, len(structure.blocks))
        layers = {name: quantization.scheme(name) for name in quantization.modules}
        attention = _attention_tensors(structure, quantization)
        parts += [_layers(structure, layers, attention, sizes, directory), _attention_table(quantization)]
        parts.append(_attention_errors(structure, quantization))
        bits, coverage = _activation_bits(structure, quantization), _coverage(quantization)
        parts += [_bits_table(bits) if bits else "", _coverage_table(coverage, recipe) if coverage else ""]
        if quantization.expert_tokens and recipe.calibration is not None:
            parts.append(experts_summary(quantization.expert_tokens, recipe.calibration.min_expert_tokens))
    lines = "\n".join(f"{title + ':':<17}{value}" for title, value in facts)
    return "\n\n".join(part for part in (lines, *parts, _files(directory)) if part)


def checkpoint_coverage(config: PretrainedConfig) -> Coverage | None:
    """Returns where in the denoising process a checkpoint's calibration states lie; None if it does not say.

    Raises:
        ValueError: The quantization configuration is malformed.
    """
    quantization = _quantization(config)
    return None if quantization is None else _coverage(quantization)


def checkpoint_bits(config: PretrainedConfig) -> ActivationBits | None:
    """Returns the activation bits of a checkpoint if they were allocated, else None.

    Raises:
        ValueError: The quantization configuration is malformed or names a layer the model does not have.
    """
    quantization = _quantization(config)
    return None if quantization is None else _activation_bits(_Structure.of(config), quantization)


def mean_bits(allocation: Iterable[SiteBits], widths: Mapping[str, int]) -> float:
    """Returns the mean bits per activation value.

    Args:
        allocation: The bits of every unit, at least one.
        widths: Channels of every site; its units have equal shares of them.
    """
    entries = list(allocation)
    units = Counter(entry.site for entry in entries)
    shares = [widths[entry.site] / units[entry.site] for entry in entries]
    return sum(entry.bits * share for entry, share in zip(entries, shares, strict=True)) / sum(shares)


@dataclass(frozen=True, eq=False)
class _Structure:
    """What a model's configuration says of its structure.

    Attributes:
        linears: The layers that can be quantized, without memory for their weights.
        blocks: Full paths of the blocks.
        sites: Names of the layers that share an input, relative to a block.
    """

    linears: dict[str, nn.Linear]
    blocks: tuple[str, ...]
    sites: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "_Structure":
        content = config.to_dict()
        content.pop("quantization_config", None)
        with torch.device("meta"):
            skeleton = AutoModel.from_config(type(config).from_dict(content))
        adapter = adapter_for(skeleton)
        if adapter.arrange is not None:
            adapter.arrange(skeleton)
        return cls(
            {name: cast("nn.Linear", module) for name, module in adapter.linears(skeleton)},
            tuple(f"{adapter.blocks}.{index}" for index in range(len(adapter.block_list(skeleton)))),
            adapter.linear_groups,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The quantization configuration


def _quantization(config: PretrainedConfig) -> DLLMQuantConfig | None:
    """The quantization configuration if it is ours."""
    stored = getattr(config, "quantization_config", None)
    if stored is None or isinstance(stored, DLLMQuantConfig):
        return stored
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("quant_method") != QUANT_METHOD:
        return None
    try:
        return DLLMQuantConfig(**stored)
    except TypeError as error:
        raise ValueError(f"quantization_config is malformed: {error}") from error


def _not_ours(config: PretrainedConfig) -> str:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return f"no; weights are {str(config.dtype).removeprefix('torch.')}"
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return f"yes, by {method!r}, not by dllmquant"


def _facts(quantization: DLLMQuantConfig, recipe: Recipe, blocks: int) -> list[tuple[str, str]]:
    facts = [
        ("quantized", f"yes, layout version {quantization.format_version}"),
        ("recipe", f"{recipe.name} ({recipe.summary()})"),
        ("protocol", recipe.protocol),
        *([("base model", quantization.base_model)] if quantization.base_model else []),
        ("library version", quantization.library_version),
        ("seed", str(quantization.seed)),
        ("states hash", quantization.states_hash or "none; the recipe uses no data"),
        *([("states took", _cost(quantization.cost))] if quantization.cost is not None else []),
    ]
    schemes = _attention_schemes(quantization)
    if schemes and len(set(schemes.values())) == 1:
        described = ", ".join(
            f"{what} {how}" for what, how in zip(_ATTENTION, _attended(next(iter(schemes.values()))), strict=True)
        )
        count = f"all {blocks}" if len(schemes) == blocks else f"{len(schemes)} of {blocks}"
        facts.append(("attention", f"in {count} blocks: {described}"))
    return facts


def _cost(stored: Mapping[str, int]) -> str:
    try:
        return Cost.from_counts(stored).summary()
    except ValueError as error:
        raise ValueError(f"quantization_config.cost is malformed: {error}") from error


_ATTENTION = ("softmax", "values", "queries and keys")


def _attention_schemes(quantization: DLLMQuantConfig) -> dict[str, AttentionScheme]:
    return {name: quantization.attention_quantizer(name, "meta").scheme for name in quantization.attention}


def _attended(scheme: AttentionScheme) -> tuple[str, str, str]:
    """How softmax output, values, and queries and keys are represented, for people."""
    values = "token and head" if scheme.value_granularity == "token" else f"{scheme.value_granularity} (static)"
    rotated = ", rotated" if scheme.rotate_query_key else ""
    return (
        "not quantized"
        if scheme.probs_bits is None
        else f"{scheme.probs_bits}-bit {scheme.probs_grid} (range: {scheme.probs_range})",
        "not quantized" if scheme.value_bits is None else f"{scheme.value_bits}-bit per {values}",
        "not quantized"
        if scheme.query_key_bits is None
        else f"{scheme.query_key_bits}-bit per token and head{rotated}",
    )


def _attention_table(quantization: DLLMQuantConfig) -> str:
    """A row for every block, if blocks differ."""
    schemes = _attention_schemes(quantization)
    if len(set(schemes.values())) < 2:
        return ""
    return aligned(
        ["attention of", *_ATTENTION], [[name, *_attended(scheme)] for name, scheme in schemes.items()], left=4
    )


def _attention_errors(structure: _Structure, quantization: DLLMQuantConfig) -> str:
    """A row for every block whose attention was fitted: the errors of all that was tried."""
    if not quantization.attention_reports:
        return ""
    try:
        columns = _error_columns([AttentionReport(**stored) for stored in quantization.attention_reports], structure)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"quantization_config.attention_reports is malformed: {error}") from error
    notes = {
        "0 to 1": "softmax grids and ranges (*: in use; 0 to 1: this grid, ending at 1)",
        "values": "static values (full range: α = 1)",
    }
    told = ", ".join(note for column, note in notes.items() if column in columns)
    rows = list(zip(*columns.values(), strict=True))
    return f"relative error of the attention output: {told}\n{aligned(list(columns), rows)}"


def _error_columns(reports: Sequence[AttentionReport], structure: _Structure) -> dict[str, list[str]]:
    """Cells of the errors' table by the title of their column.

    Raises:
        AttributeError, TypeError, ValueError: A report holds what fitting never writes.
    """

    def cell(error: float | None) -> str:
        return "-" if error is None else format(error, ".3g")

    known = [f"{grid} {range_}" for range_ in PROBS_RANGES for grid in PROBS_GRIDS]
    kinds = [kind for kind in known if any(kind in report.softmax for report in reports)]
    for report in reports:
        if report.block not in structure.blocks:
            raise ValueError(f"the model has no block {report.block!r}")
        if report.chosen not in (report.softmax or (None,)):
            raise ValueError(f"chosen: {report.chosen!r}; valid: {', '.join(report.softmax) or None}")
    columns = {"error in block": [str(structure.blocks.index(report.block)) for report in reports]}
    for kind in kinds:
        columns[kind] = ["*" * (kind == report.chosen) + cell(report.softmax.get(kind)) for report in reports]
    if kinds:
        columns["0 to 1"] = [cell(report.softmax_full_range) for report in reports]
    if any(report.values is not None for report in reports):
        columns["values"] = [cell(report.values) for report in reports]
        columns["full range"] = [cell(report.values_full_range) for report in reports]
    return columns


def _attention_tensors(structure: _Structure, quantization: DLLMQuantConfig) -> list[str]:
    """Names of the tensors of the attention quantizers."""
    names = []
    for block in quantization.attention:
        if block not in structure.blocks:
            raise ValueError(f"quantization_config.attention: the model has no block {block!r}")
        buffers = quantization.attention_quantizer(block, "meta").named_buffers()
        names += [f"{block}.attention_quantizer.{name}" for name, _ in buffers]
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Layers and their bytes


def _tensor_bytes(directory: Path) -> dict[str, int]:
    """Bytes of every stored tensor."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: holds no .safetensors file")
    sizes: dict[str, int] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # checks the header, and that it fits the file's length
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[name] = end - start
    return sizes


def _layers(
    structure: _Structure,
    schemes: Mapping[str, Scheme],
    attention: Sequence[str],
    sizes: Mapping[str, int],
    directory: Path,
) -> str:
    """A table of the layers by kind: how many, how they are stored, what they take."""
    tensors = {name: _tensors(name, linear, schemes.get(name)) for name, linear in structure.linears.items()}
    for name in schemes:
        if name not in structure.linears:
            raise ValueError(f"quantization_config.modules: the model has no quantizable layer {name!r}")
    for tensor in (*(tensor for of_layer in tensors.values() for tensor in of_layer), *attention):
        if tensor not in sizes:
            raise ValueError(f"{directory}: the weight files hold no {tensor}")
    kinds: dict[object, list[str]] = {}
    for name in structure.linears:
        kinds.setdefault((_leaf(name), _shared(schemes.get(name))), []).append(name)
    rows = []
    for names in kinds.values():
        linears = [structure.linears[name] for name in names]
        told = _representation([schemes.get(name) for name in names], linears)
        rows.append([_leaf(names[0]), *told, str(len(names)), *_numbers(names, structure, tensors, sizes)])
    everything = list(structure.linears)
    rows.append(["all", "", "", "", str(len(everything)), *_numbers(everything, structure, tensors, sizes)])
    counted = sum(sizes[tensor] for name in everything for tensor in tensors[name])
    scales = sum(sizes[tensor] for tensor in attention)
    if attention:
        rows.append(["attention scales", "", "", "", "", "", f"{scales:,}", "", ""])
    rows.append(["everything else", "", "", "", "", "", f"{sum(sizes.values()) - counted - scales:,}", "", ""])
    header = ["layer", "weights", "inputs", "input transform", "count", "parameters", "bytes", "transform bytes"]
    header.append("bytes/weight")
    if not any(steps for _, _, steps in schemes.values()):
        header, *rows = ([*row[:3], *row[4:7], row[8]] for row in (header, *rows))
        return aligned(header, rows, left=3)
    return aligned(header, rows, left=4)


def _tensors(name: str, linear: nn.Linear, scheme: Scheme | None) -> list[str]:
    """Names of the tensors that hold a layer's weight, its scales and its input transform."""
    if scheme is None:
        return [f"{name}.weight"]
    grid, activation, steps = scheme
    try:
        packed = QuantLinear(
            linear.in_features,
            linear.out_features,
            grid,
            activation,
            bias=False,
            device="meta",
            input_transform=steps,
        )
    except ValueError as error:
        raise ValueError(f"quantization_config.modules[{name!r}]: {error}") from error
    return [f"{name}.{buffer}" for buffer, _ in packed.named_buffers()]


def _numbers(
    names: Sequence[str], structure: _Structure, tensors: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> list[str]:
    """Parameters, bytes, those of input transforms, and bytes per weight."""
    parameters = sum(structure.linears[name].in_features * structure.linears[name].out_features for name in names)
    stored = [tensor for name in names for tensor in tensors[name]]
    taken = sum(sizes[tensor] for tensor in stored)
    transforms = sum(sizes[tensor] for tensor in stored if ".input_transform." in tensor)
    return [f"{parameters:,}", f"{taken:,}", f"{transforms:,}", f"{taken / parameters:.3f}"]


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _shared(scheme: Scheme | None) -> object:
    """What layers must have in common to be told together: all but the widths that vary within a mean."""
    if scheme is None:
        return None
    grid, activation, steps = scheme
    return (
        (grid.bits if grid.group_bits is None else "mixed", grid.group_size, grid.symmetric),
        None if activation is None else (activation.group_size, activation.symmetric),
        steps,
    )


def _representation(schemes: Sequence[Scheme | None], linears: Sequence[nn.Linear]) -> tuple[str, str, str]:
    """How weights and inputs of layers of one kind are represented, and how inputs are transformed, for people."""
    grids: Counter[int] = Counter()
    inputs: Counter[int] = Counter()
    for scheme, linear in zip(schemes, linears, strict=True):
        if scheme is None:
            return "not quantized", "not quantized", "none"
        grid, activation, _ = scheme
        for bits in grid.bits_of_groups(linear.in_features):
            grids[bits] += grid.width(linear.in_features) * linear.out_features
        if activation is not None:
            width = activation.width(linear.in_features)
            for bits in activation.group_bits or (activation.bits,) * (linear.in_features // width):
                inputs[bits] += width
    assert schemes[0] is not None
    grid, activation, steps = schemes[0]
    return (
        _grid_text(grids, grid.symmetric, grid.group_size, "channel"),
        "not quantized"
        if activation is None
        else _grid_text(inputs, activation.symmetric, activation.group_size, "token"),
        " · ".join(step.kind if step.size is None else f"{step.kind} {step.size}" for step in steps) or "none",
    )


def _grid_text(widths: Counter[int], symmetric: bool, group_size: int | None, whole: str) -> str:
    bits = "/".join(map(str, sorted(widths))) + "-bit"
    if len(widths) > 1:
        mean = sum(width * count for width, count in widths.items()) / widths.total()
        bits += f", mean {round(mean, 2)},"
    grouping = whole if group_size is None else f"group of {group_size}"
    return f"{bits} {'symmetric' if symmetric else 'asymmetric'} per {grouping}"


def _files(directory: Path) -> str:
    files = [(path.name, path.stat().st_size) for path in sorted(directory.iterdir()) if path.is_file()]
    rows = [[name, f"{size:,}"] for name, size in [*files, ("total", sum(size for _, size in files))]]
    return aligned(["file", "bytes"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Activation bits


def _activation_bits(structure: _Structure, quantization: DLLMQuantConfig) -> ActivationBits | None:
    if not quantization.allocation:
        return None
    where = {
        f"{block}.{leaf}": (row, column)
        for row, block in enumerate(structure.blocks)
        for column, site in enumerate(structure.sites)
        for leaf in site
    }
    entries, units = [], {}
    for stored in quantization.allocation:
        try:
            entry = SiteBits(**stored)
            if entry.site not in where or type(entry.bits) is not int:
                raise ValueError(f"the model has no site {entry.site!r} of {entry.bits!r} bits")
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config.allocation is malformed: {error}") from error
        entries.append(entry)
        units[(*where[entry.site], entry.unit)] = entry.bits
    bits = tuple(
        tuple(
            tuple(width for (at, of, _), width in units.items() if (at, of) == (row, column))
            for column in range(len(structure.sites))
        )
        for row in range(len(structure.blocks))
    )
    widths = {entry.site: structure.linears[entry.site].in_features for entry in entries}
    sites = tuple("+".join(map(_leaf, site)) for site in structure.sites)
    return ActivationBits(sites, bits, mean_bits(entries, widths))


def bits_text(bits: Sequence[int]) -> str:
    """The bits of one site, for people: those of every head, or of many heads how many have which."""
    if len(bits) <= _LISTED_HEADS:
        return "/".join(map(str, bits)) or "-"
    return " ".join(f"{count}×{width}" for width, count in sorted(Counter(bits).items()))


def _bits_table(bits: ActivationBits) -> str:
    heads = "; several numbers: head by head" if any(len(entry) > 1 for row in bits.bits for entry in row) else ""
    rows = [[str(index), *map(bits_text, row)] for index, row in enumerate(bits.bits)]
    title = f"activation bits by block and input, mean {round(bits.mean, 3)}{heads}"
    return f"{title}\n{aligned(['block', *bits.sites], rows)}"


# ---------------------------------------------------------------------------------------------------------------------
# Coverage


def _coverage(quantization: DLLMQuantConfig) -> Coverage | None:
    if quantization.coverage is None:
        return None
    try:
        return Coverage.from_dict(quantization.coverage)
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantization_config.coverage is malformed: {error}") from error


def bucket_texts(coverage: Coverage) -> list[str]:
    """Names of the mask-ratio buckets, for people."""
    return [_edges(bucket, coverage.buckets) for bucket in range(coverage.buckets)]


def segment_texts(coverage: Coverage) -> list[str]:
    """Names of the trajectory segments, for people: number and progress."""
    return [f"{segment + 1} ({_edges(segment, coverage.segments)})" for segment in range(coverage.segments)]


def cell_text(coverage: Coverage, segment: int, bucket: int) -> str:
    """The states of a cell, and how many they were selected from if any were recorded, for people."""
    recorded = 0 if coverage.recorded is None else coverage.recorded[segment][bucket]
    return f"{coverage.states[segment][bucket]}" + (f"/{recorded}" if recorded else "")


def _edges(part: int, parts: int) -> str:
    return "-".join(f"{100 * edge / parts:.3g}" for edge in (part, part + 1)) + "%"


def _coverage_table(coverage: Coverage, recipe: Recipe) -> str:
    diagonal, empty = set(coverage.diagonal), set(coverage.empty)

    def cell(segment: int, bucket: int) -> str:
        text = cell_text(coverage, segment, bucket)
        if (segment, bucket) in empty:
            return "." if text == "0" and (segment, bucket) not in diagonal else text
        return f"{text} ({coverage.masked_tokens[segment][bucket]}+{coverage.unmasked_tokens[segment][bucket]})"

    header = ["segment", *(f"{text} masked" for text in bucket_texts(coverage))]
    rows = [
        [text, *(cell(segment, bucket) for bucket in range(coverage.buckets))]
        for segment, text in enumerate(segment_texts(coverage))
    ]
    counted = "states" if coverage.recorded is None else "selected/recorded states"
    return "\n".join(
        [
            f"calibration states: {coverage.summary()}",
            aligned(header, rows),
            f"cells: {counted} (masked+other tokens); 0: an even schedule passes through, but no state is there",
            *(f"note: {note}" for note in _coverage_notes(coverage, recipe)),
        ]
    )


def _coverage_notes(coverage: Coverage, recipe: Recipe) -> tuple[str, ...]:
    """What quantizing said: states without masks leave the denoising process out on purpose."""
    if recipe.calibration is None or recipe.calibration.states == "clean":
        return ()
    selected = recipe.calibration.states in ("trajectory", "closed_loop")
    return coverage.notes(recipe.calibration.quotas if selected else None)
