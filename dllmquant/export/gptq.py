"""The format "gptq", version 1: what GPTQModel, transformers, vLLM, SGLang and ExLlama read as `quant_method: gptq`.

A packed layer [out, in] with groups of g input channels is stored transposed, codes in 32-bit words along `in`:

    qweight   int32 [in·bits/32, out]     column o: the codes of output o as one little-endian bit stream
    qzeros    int32 [in/g, out·bits/32]   row j: the zero points of group j, minus one, as one such stream
    scales    float16 [in/g, out]
    g_idx     int32 [in]                  the group of each input channel: i div g

Since zero points are stored minus one, a zero point of 0 has no spelling. Such a group is stored mirrored, with the
codes 2**bits − 1 − code, the zero point 2**bits − 1 and the scale −scale, which is the same weight.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant._version import __version__
from dllmquant.export.content import Content, ExportError, activation, irregular_grid
from dllmquant.export.writing import write
from dllmquant.models import adapter_for
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.packing import pack

_FORM = "gptq"


def export_gptq(model: PreTrainedModel, directory: Path) -> None:
    """Writes a checkpoint in GPTQ's layout.

    Args:
        model: The quantized model; it stays as it is.
        directory: Target directory.

    Raises:
        ExportError: The model is not quantized, more than its weights is, its layers differ in their grids, some layer
            is quantized in some only of the blocks that have it, or a layer's channels do not fill whole 32-bit words.
        OSError: The target is a file or cannot be written.
    """
    content = Content.of(model)
    content.check(_FORM, irregular_grid, lambda layer: activation(layer.activation), _ragged)
    config = _config(model, content)

    def write_config(staging: Path) -> None:
        (staging / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write(
        model,
        directory,
        content.state_dict(model, gptq_tensors),
        dtype=model.dtype,
        quantization_config=config,
        finish=write_config,
    )


def gptq_tensors(layer: QuantLinear) -> dict[str, Tensor]:
    """Returns qweight, qzeros, scales and g_idx of a layer whose groups have one width of 2 bits or more."""
    weight, bits = layer.quantized_weight(), layer.grid.bits
    top, size = (1 << bits) - 1, layer.grid.width(layer.in_features)
    mirrored = weight.zero == 0
    codes = torch.where(mirrored.repeat_interleave(size, dim=1), top - weight.codes, weight.codes)
    zero = torch.where(mirrored, top, weight.zero)
    scale = torch.where(mirrored, -weight.scale, weight.scale)
    return {
        "qweight": _words(codes, bits).T.contiguous(),
        "qzeros": _words((zero - 1).T.contiguous(), bits),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(layer.in_features, dtype=torch.int32) // size,
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes [rows, columns] into int32 [rows, columns·bits/32]."""
    words: Tensor = pack(codes, bits).view(torch.int32)
    if sys.byteorder == "little":
        return words
    swapped: Tensor = words.view(torch.uint8).unflatten(1, (-1, 4)).flip(2).flatten(1).view(torch.int32)
    return swapped


def _ragged(layer: QuantLinear) -> str | None:
    bits, inputs, outputs = layer.grid.bits, layer.in_features, layer.out_features
    if inputs * bits % 32 or outputs * bits % 32:
        return f"{bits}-bit layers of {inputs} inputs and {outputs} outputs, whose codes do not fill 32-bit words"
    return None


def _config(model: PreTrainedModel, content: Content) -> dict[str, Any]:
    """Returns the `quantization_config`, where transformers finds what is quantized and GPTQModel what is not."""
    grid, adapter = content.same_scheme(_FORM).grid, adapter_for(model)
    blocks = adapter.block_list(model)
    present = Counter(leaf for block in blocks for _, group in adapter.sites(block) for leaf in group)
    leaves = Counter(name.removeprefix(f"{adapter.blocks}.").split(".", 1)[1] for name in content.layers)
    for leaf, count in leaves.items():
        if count != present[leaf]:
            raise ExportError(
                f"format: {_FORM!r} cannot express that {leaf} is quantized in {count} of the {present[leaf]} blocks "
                "that have it; skip it in all of them or in none"
            )
    named = (item for block in blocks for item in block.named_modules())
    skipped = dict.fromkeys(leaf for leaf, module in named if isinstance(module, nn.Linear))  # routers, too
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": -1 if grid.group_size is None else grid.group_size,
        "sym": grid.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": adapter.blocks,
        "modules_in_block_to_quantize": [[leaf] for leaf in leaves],
        "dynamic": {rf"-:^{re.escape(adapter.blocks)}\.\d+\.{re.escape(leaf)}$": {} for leaf in skipped},
        "meta": {"quantizer": [f"dllmquant:{__version__}"]},
    }
