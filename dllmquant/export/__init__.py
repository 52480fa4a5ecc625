"""Exports: quantized models as checkpoints that other programs load without dllmquant."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.export.compressed_tensors import export_compressed_tensors
from dllmquant.export.content import ExportError
from dllmquant.export.dequantized import export_dequantized
from dllmquant.export.gptq import export_gptq
from dllmquant.models import registered_adapters

__all__ = ["FORMATS", "ExportError", "export_model"]

FORMATS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "compressed-tensors": export_compressed_tensors,
    "gptq": export_gptq,
    "dequantized": export_dequantized,
}


def export_model(
    model: PreTrainedModel,
    directory: str | Path,
    format: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes a quantized model in a format that other programs load without dllmquant.

    An export computes what the model computes, up to the arithmetic of the program that runs it, or is refused.
    Families that transformers does not know bring their modelling code along; they load with `trust_remote_code=True`.

    Args:
        model: A model quantized by dllmquant; it stays as it is.
        directory: Target directory; weights of an earlier checkpoint in it are replaced.
        format: "compressed-tensors", "gptq" or "dequantized"; see the modules of their names.
        tokenizer: Saved along; None saves none.

    Raises:
        ValueError: The format is unknown.
        ExportError: The model is not quantized, the format cannot express it, or needs a package that is not installed;
            the message says which.
        OSError: The target is a file or cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is unknown; valid: {', '.join(FORMATS)}")
    adapter = registered_adapters().get(model.config.model_type)
    if adapter is not None and adapter.arrange is not None and format != "dequantized":
        raise ExportError(
            f"format: {format!r} cannot express {adapter.model_type}: its layers are rearranged to be quantized, "
            "and other programs know them as they were; valid: 'dequantized'"
        )
    FORMATS[format](model, Path(directory))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
