"""The format "dequantized": plain weights under the original names, for converters such as GGUF's.

Each weight is (codes − zero)·scale in the model's own type, usually of 16 bits, so the export computes the model's
logits bit by bit. Layers that were rearranged to be quantized are put back; the original class may sum them in another
order. Quantized activations are refused: their weights alone would be another model. While they are written, the
weights take their full size in memory.
"""

from pathlib import Path

from transformers import PreTrainedModel

from dllmquant.export.content import Content, activation
from dllmquant.export.writing import write
from dllmquant.models import registered_adapters


def export_dequantized(model: PreTrainedModel, directory: Path) -> None:
    """Writes the dequantized weights as a checkpoint of the model's original class.

    Args:
        model: The quantized model; it stays as it is.
        directory: Target directory.

    Raises:
        ExportError: The model is not quantized, or more than its weights is.
        OSError: The target is a file or cannot be written.
    """
    content, dtype = Content.of(model), model.dtype
    content.check("dequantized", lambda layer: activation(layer.activation))
    tensors = content.state_dict(model, lambda layer: {"weight": layer.quantized_weight().dequantize(dtype)})
    adapter = registered_adapters().get(model.config.model_type)
    if adapter is not None and adapter.restore is not None:
        tensors = adapter.restore(tensors)
    write(model, directory, tensors, dtype=dtype)
