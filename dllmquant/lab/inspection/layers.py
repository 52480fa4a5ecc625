"""The layers of a checkpoint by kind: how they are stored and the bytes they take."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from dllmquant.core.grid import Grid
from dllmquant.lab.inspection.structure import Structure, leaf_of
from dllmquant.lab.tables import aligned
from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.transform import TransformStep

Scheme = tuple[Grid, ActivationScheme | None, tuple[TransformStep, ...]]


def tensor_bytes(directory: Path) -> dict[str, int]:
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


def layers_table(
    structure: Structure,
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
        kinds.setdefault((leaf_of(name), _shared(schemes.get(name))), []).append(name)
    rows = []
    for names in kinds.values():
        linears = [structure.linears[name] for name in names]
        told = _representation([schemes.get(name) for name in names], linears)
        rows.append([leaf_of(names[0]), *told, str(len(names)), *_numbers(names, structure, tensors, sizes)])
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
    names: Sequence[str], structure: Structure, tensors: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> list[str]:
    """Parameters, bytes, those of input transforms, and bytes per weight."""
    parameters = sum(structure.linears[name].in_features * structure.linears[name].out_features for name in names)
    stored = [tensor for name in names for tensor in tensors[name]]
    taken = sum(sizes[tensor] for tensor in stored)
    transforms = sum(sizes[tensor] for tensor in stored if ".input_transform." in tensor)
    return [f"{parameters:,}", f"{taken:,}", f"{transforms:,}", f"{taken / parameters:.3f}"]


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
