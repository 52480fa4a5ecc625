"""What a checkpoint holds, told from its configuration and the headers of its weight files."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from dllmquant.calibration import Cost
from dllmquant.calibration.experts import experts_summary
from dllmquant.integrations.transformers import DLLMQuantConfig
from dllmquant.lab.inspection.attention import (
    PARTS,
    attended,
    attention_errors,
    attention_schemes,
    attention_table,
    attention_tensors,
)
from dllmquant.lab.inspection.bits import (
    ActivationBits,
    activation_bits,
    bits_table,
    bits_text,
    checkpoint_bits,
    mean_bits,
)
from dllmquant.lab.inspection.coverage import (
    bucket_texts,
    cell_text,
    checkpoint_coverage,
    coverage_table,
    segment_texts,
    stored_coverage,
)
from dllmquant.lab.inspection.layers import layers_table, tensor_bytes
from dllmquant.lab.inspection.structure import Structure, quantization_of
from dllmquant.lab.tables import aligned
from dllmquant.recipe import Recipe

__all__ = [
    "ActivationBits",
    "bits_text",
    "bucket_texts",
    "cell_text",
    "checkpoint_bits",
    "checkpoint_coverage",
    "describe_checkpoint",
    "mean_bits",
    "segment_texts",
]


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
    quantization, facts = quantization_of(config), [("directory", str(directory)), ("family", str(config.model_type))]
    structure, sizes = Structure.of(config), tensor_bytes(directory)
    parts = []
    if quantization is None:
        facts.append(("quantized", _not_ours(config)))
        parts.append(layers_table(structure, {}, [], sizes, directory))
    else:
        recipe = Recipe.load(quantization.recipe)
        facts += _facts(quantization, recipe, len(structure.blocks))
        layers = {name: quantization.scheme(name) for name in quantization.modules}
        attention = attention_tensors(structure, quantization)
        parts += [layers_table(structure, layers, attention, sizes, directory), attention_table(quantization)]
        parts.append(attention_errors(structure, quantization))
        bits, coverage = activation_bits(structure, quantization), stored_coverage(quantization)
        parts += [bits_table(bits) if bits else "", coverage_table(coverage, recipe) if coverage else ""]
        if quantization.expert_tokens and recipe.calibration is not None:
            parts.append(experts_summary(quantization.expert_tokens, recipe.calibration.min_expert_tokens))
    lines = "\n".join(f"{title + ':':<17}{value}" for title, value in facts)
    return "\n\n".join(part for part in (lines, *parts, _files(directory)) if part)


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
    schemes = attention_schemes(quantization)
    if schemes and len(set(schemes.values())) == 1:
        described = ", ".join(
            f"{what} {how}" for what, how in zip(PARTS, attended(next(iter(schemes.values()))), strict=True)
        )
        count = f"all {blocks}" if len(schemes) == blocks else f"{len(schemes)} of {blocks}"
        facts.append(("attention", f"in {count} blocks: {described}"))
    return facts


def _cost(stored: Mapping[str, int]) -> str:
    try:
        return Cost.from_counts(stored).summary()
    except ValueError as error:
        raise ValueError(f"quantization_config.cost is malformed: {error}") from error


def _files(directory: Path) -> str:
    files = [(path.name, path.stat().st_size) for path in sorted(directory.iterdir()) if path.is_file()]
    rows = [[name, f"{size:,}"] for name, size in [*files, ("total", sum(size for _, size in files))]]
    return aligned(["file", "bytes"], rows)
