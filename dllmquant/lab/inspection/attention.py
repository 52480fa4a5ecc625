"""The quantized attention of a checkpoint: how it is represented, and what fitting it found."""

from collections.abc import Sequence

from dllmquant.attention_fit import AttentionReport
from dllmquant.core.attention import PROBS_GRIDS
from dllmquant.core.softmax_search import PROBS_RANGES
from dllmquant.integrations.transformers import DLLMQuantConfig
from dllmquant.lab.inspection.structure import Structure
from dllmquant.lab.tables import aligned
from dllmquant.nn.attention import AttentionScheme

PARTS = ("softmax", "values", "queries and keys")


def attention_schemes(quantization: DLLMQuantConfig) -> dict[str, AttentionScheme]:
    """Returns how the attention of every quantized block is represented."""
    return {name: quantization.attention_quantizer(name, "meta").scheme for name in quantization.attention}


def attended(scheme: AttentionScheme) -> tuple[str, str, str]:
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


def attention_table(quantization: DLLMQuantConfig) -> str:
    """A row for every block, if blocks differ."""
    schemes = attention_schemes(quantization)
    if len(set(schemes.values())) < 2:
        return ""
    return aligned(["attention of", *PARTS], [[name, *attended(scheme)] for name, scheme in schemes.items()], left=4)


def attention_errors(structure: Structure, quantization: DLLMQuantConfig) -> str:
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


def _error_columns(reports: Sequence[AttentionReport], structure: Structure) -> dict[str, list[str]]:
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


def attention_tensors(structure: Structure, quantization: DLLMQuantConfig) -> list[str]:
    """Names of the tensors of the attention quantizers."""
    names = []
    for block in quantization.attention:
        if block not in structure.blocks:
            raise ValueError(f"quantization_config.attention: the model has no block {block!r}")
        buffers = quantization.attention_quantizer(block, "meta").named_buffers()
        names += [f"{block}.attention_quantizer.{name}" for name, _ in buffers]
    return names
