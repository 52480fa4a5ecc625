"""The on-disk layout: its version, writing it so that half of it is never read, and what it weighs.

A checkpoint is a transformers directory. Layout version 1: a packed layer stores `weight` (uint8 codes, packed as
`dllmquant.nn.packing` draws them), `weight_scale` (float16 [out, groups]), for asymmetric grids `weight_zero_point`
(uint8, packed like the codes) and, if it has one, `bias`; `config.json` says which layers are packed and how.
"""

from dataclasses import dataclass

from torch import nn

from dllmquant.atomic import write_atomically as write_atomically
from dllmquant.nn.attention import AttentionQuantizer
from dllmquant.nn.linear import QuantLinear

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: corrupt, incomplete, or of another version."""


def check_format_version(version: object) -> None:
    """Raises `CheckpointError` unless `version` is a layout this library reads."""
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"quantization_config.format_version is {version!r}; this dllmquant reads {FORMAT_VERSION}. "
            "A newer checkpoint needs a newer dllmquant."
        )


@dataclass(frozen=True)
class WeightBytes:
    """What a model's weights take, in parameters and bytes.

    Attributes:
        quantized_parameters: Weights held in packed layers.
        quantized_bytes: Their codes, scales, zero points and input transforms.
        attention_bytes: Scales of quantized attention.
        other_parameters: All other parameters: embeddings, head, norms, biases.
        other_bytes: Their bytes.
    """

    quantized_parameters: int
    quantized_bytes: int
    attention_bytes: int
    other_parameters: int
    other_bytes: int

    @property
    def bytes_per_quantized_weight(self) -> float:
        """Bytes per packed weight, with all that `quantized_bytes` counts; 0 when nothing is packed."""
        return self.quantized_bytes / self.quantized_parameters if self.quantized_parameters else 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return self.quantized_bytes + self.attention_bytes + self.other_bytes


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Counts what a checkpoint of a model stores: weights, packed or not, and the scales of quantized attention."""
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    attention = [module for module in model.modules() if isinstance(module, AttentionQuantizer)]
    others = list(model.parameters())
    return WeightBytes(
        quantized_parameters=sum(module.in_features * module.out_features for module in packed),
        quantized_bytes=sum(module.nbytes for module in packed),
        attention_bytes=sum(buffer.nbytes for module in attention for buffer in module.buffers()),
        other_parameters=sum(parameter.numel() for parameter in others),
        other_bytes=sum(parameter.numel() * parameter.element_size() for parameter in others),
    )
