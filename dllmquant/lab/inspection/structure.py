"""What a model's configuration says of its structure and of how it was quantized."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from dllmquant.integrations.transformers import QUANT_METHOD, DLLMQuantConfig
from dllmquant.models import adapter_for


@dataclass(frozen=True, eq=False)
class Structure:
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
    def of(cls, config: PretrainedConfig) -> "Structure":
        """Builds the model without memory for its weights."""
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


def quantization_of(config: PretrainedConfig) -> DLLMQuantConfig | None:
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


def leaf_of(path: str) -> str:
    """Returns the last part of a module path."""
    return path.rsplit(".", 1)[-1]
