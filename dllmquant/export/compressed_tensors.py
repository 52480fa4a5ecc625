"""The format "compressed-tensors", which transformers, vLLM and SGLang read.

Codes and zero points are signed there, 2**(bits−1) less than ours, and the weight is (code − zero)·scale as here:

    weights       activations       stored as        tensors of a layer
    2, 3, 4, 8    as they are       pack-quantized   weight_packed, weight_scale, weight_shape
    2, 3, 4, 8    8 bits per token  int-quantized    weight (int8), weight_scale

and `weight_zero_point` on asymmetric grids. The package itself packs the weights and writes the configuration, which
has `dequantize` set for weights alone: transformers then dequantizes them while loading, from 5.23 on in float32, so
that they are ours bit by bit in every type (before, in bfloat16 up to its rounding). Without it, it would do so in the
first forward pass with scales of the model's type, and cannot read packed zero points (compressed-tensors 0.20). Scales
are stored in float32 for the same reason.

How activations are rounded is up to the reader. The compressed-tensors package simulates them with the step
absmax/127.5, as ours have with `full_range`; without it they have the step absmax/127 of vLLM's kernels, and the logits
differ by the rounding of inputs, of which a warning is logged.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.export.content import Content, ExportError, activation, irregular_grid
from dllmquant.export.writing import write
from dllmquant.nn.linear import QuantLinear

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

logger = logging.getLogger(__name__)

_FORM = "compressed-tensors"


def export_compressed_tensors(model: PreTrainedModel, directory: Path) -> None:
    """Writes a checkpoint in compressed-tensors' format.

    Args:
        model: The quantized model; it stays as it is.
        directory: Target directory.

    Raises:
        ExportError: The model is not quantized; more is quantized than weights of one width and, by 8 bits per token
            and symmetrically, their inputs; layers differ in that; or the package compressed-tensors is not installed.
        OSError: The target is a file or cannot be written.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor, ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    except ImportError as error:
        raise ExportError(f"format: {_FORM!r} needs compressed-tensors: pip install 'dllmquant[export]'") from error

    content = Content.of(model)
    content.check(_FORM, irregular_grid, _activation)
    layer = content.same_scheme(_FORM)
    if layer.activation is not None and not layer.activation.full_range:
        logger.warning(
            "format: %r: logits will differ slightly from this model's where transformers computes them: it rounds "
            "activations in steps of absmax/127.5, this model in steps of absmax/127, as vLLM does; for equal logits "
            "quantize with activations.full_range: true",
            _FORM,
        )
    scheme = _scheme(layer)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def compressed(layer: QuantLinear) -> dict[str, Tensor]:
        weight = layer.quantized_weight()
        zero = (weight.zero.to(torch.int16) - (1 << (layer.grid.bits - 1))).to(torch.int8)
        parameters = {"weight": weight.dequantize(), "weight_scale": weight.scale.float(), "weight_zero_point": zero}
        tensors: dict[str, Tensor] = compressor.compress(parameters, scheme)
        return tensors

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    )

    def write_config(staging: Path) -> None:
        ModelCompressor(quantization_config=config).update_config(str(staging))
        if scheme.input_activations is None:
            path = staging / "config.json"
            entries = json.loads(path.read_text(encoding="utf-8"))
            entries["quantization_config"]["dequantize"] = True
            path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    tensors = content.state_dict(model, compressed)
    write(model, directory, tensors, dtype=model.dtype, quantization_config=config.to_dict(), finish=write_config)


def _activation(layer: QuantLinear) -> str | None:
    scheme = layer.activation
    if scheme is None or (scheme.symmetric and (scheme.bits, scheme.group_size, scheme.group_bits) == (8, None, None)):
        return None
    return activation(scheme)


def _scheme(layer: QuantLinear) -> "QuantizationScheme":
    """Returns the package's scheme of all packed layers."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=layer.grid.bits,
        symmetric=layer.grid.symmetric,
        strategy="channel" if layer.grid.group_size is None else "group",
        group_size=layer.grid.group_size,
    )
    inputs = None if layer.activation is None else QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    scheme.format = infer_module_format(nn.Linear, scheme)
    return scheme
