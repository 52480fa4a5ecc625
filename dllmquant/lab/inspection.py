"""What a checkpoint holds, told from its configuration and the headers of its weight files."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, PretrainedConfig

from dllmquant.integrations.transformers import QUANT_METHOD, DLLMQuantConfig
from dllmquant.lab.tables import aligned
from dllmquant.models import adapter_for
from dllmquant.recipe import Recipe


def describe_checkpoint(directory: Path, config: PretrainedConfig) -> str:
    """Describes a checkpoint for people: recipe, version and seed; layers by kind; files.

    Args:
        directory: The checkpoint.
        config: Its configuration.

    Returns:
        Several lines of text.

    Raises:
        ValueError: A weight file is damaged or lacks a layer, or the quantization configuration is malformed or names
            a layer the model does not have.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        facts = [("quantized", f"no; weights are {str(config.dtype).removeprefix('torch.')}")]
        packed: dict[str, Any] = {}
    else:
        facts, packed = _quantization(stored if isinstance(stored, dict) else stored.to_dict())
    linears = _linears(config)
    sizes = _tensor_bytes(directory)
    for name in packed:
        if name not in linears:
            raise ValueError(f"quantization_config.modules: the model has no quantizable layer {name!r}")
    for name in linears:
        if f"{name}.weight" not in sizes:
            raise ValueError(f"{directory}: the weight files hold no {name}.weight")
    facts = [("directory", str(directory)), ("family", str(config.model_type)), *facts]
    lines = [f"{title + ':':<17}{value}" for title, value in facts]
    return "\n".join([*lines, "", _layers(linears, packed, sizes), "", _files(directory)])


def _quantization(stored: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What a quantization configuration says, for people, and its packed layers."""
    method = stored.get("quant_method")
    if method != QUANT_METHOD:
        return [("quantized", f"yes, by {method!r}, not by dllmquant")], {}
    try:
        config = DLLMQuantConfig(**stored)
    except TypeError as error:
        raise ValueError(f"quantization_config is malformed: {error}") from error
    recipe = Recipe.load(config.recipe)
    facts = [
        ("quantized", f"yes, layout version {config.format_version}"),
        ("recipe", f"{recipe.name} ({recipe.summary()})"),
        ("library version", config.library_version),
        ("seed", str(config.seed)),
        ("states hash", config.states_hash or "none; the recipe uses no data"),
    ]
    return facts, config.modules


def _linears(config: PretrainedConfig) -> dict[str, nn.Linear]:
    """The layers that can be quantized, without memory for their weights."""
    content = config.to_dict()
    content.pop("quantization_config", None)
    with torch.device("meta"):
        skeleton = AutoModel.from_config(type(config).from_dict(content))
    return {name: cast("nn.Linear", module) for name, module in adapter_for(skeleton).linears(skeleton)}


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


def _layers(linears: dict[str, nn.Linear], packed: dict[str, Any], sizes: dict[str, int]) -> str:
    """A table of the layers by kind: how many, how they are stored, what they take."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name in linears:
        kind = name.rsplit(".", 1)[-1]
        kinds.setdefault((kind, *_representation(packed.get(name))), []).append(name)
    rows = []
    total_parameters = total_bytes = 0
    for described, names in kinds.items():
        parameters = sum(linears[name].in_features * linears[name].out_features for name in names)
        taken = sum(
            sizes.get(f"{name}.{tensor}", 0)
            for name in names
            for tensor in ("weight", "weight_scale", "weight_zero_point")
        )
        rows.append([*described, str(len(names)), f"{parameters:,}", f"{taken:,}", f"{taken / parameters:.3f}"])
        total_parameters += parameters
        total_bytes += taken
    total = [f"{total_parameters:,}", f"{total_bytes:,}", f"{total_bytes / total_parameters:.3f}"]
    rows.append(["all", "", "", str(len(linears)), *total])
    rows.append(["everything else", "", "", "", "", f"{sum(sizes.values()) - total_bytes:,}", ""])
    header = ["layer", "weights", "inputs", "count", "parameters", "bytes", "bytes/weight"]
    return aligned(header, rows, left=3)


def _representation(scheme: dict[str, Any] | None) -> tuple[str, str]:
    """How a layer's weights and inputs are represented, for people."""
    if scheme is None:
        return "not quantized", "not quantized"
    told = []
    for part, whole in ((scheme["weight"], "channel"), (scheme["activation"], "token")):
        if part is None:
            told.append("not quantized")
            continue
        grouping = whole if part["group_size"] is None else f"group of {part['group_size']}"
        told.append(f"{part['bits']}-bit {'symmetric' if part['symmetric'] else 'asymmetric'} per {grouping}")
    return told[0], told[1]


def _files(directory: Path) -> str:
    files = [(path.name, path.stat().st_size) for path in sorted(directory.iterdir()) if path.is_file()]
    rows = [[name, f"{size:,}"] for name, size in [*files, ("total", sum(size for _, size in files))]]
    return aligned(["file", "bytes"], rows)
