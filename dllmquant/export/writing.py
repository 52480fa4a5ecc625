"""Writing an export: weights, configuration and, for families that transformers does not know, modelling code."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.atomic import write_atomically
from dllmquant.export.content import ExportError
from dllmquant.export.remote_code import auto_map, is_ours, modelling_files, without_plugin

_GPTQ_CONFIG = "quantize_config.json"  # readers prefer it to config.json, so none may stay from an earlier export


def write(
    model: PreTrainedModel,
    directory: Path,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    quantization_config: dict[str, Any] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> None:
    """Writes a checkpoint of other tensors than the model's own; an interrupted write is never read.

    Args:
        model: The quantized model; it stays as it is.
        directory: Target directory; weights of an earlier checkpoint in it are replaced.
        tensors: The checkpoint's tensors by full path.
        dtype: Written to the configuration as the type of the model.
        quantization_config: Written to the configuration; None for a checkpoint that is not quantized, whose tensors
            must be those of the model before it was quantized; tied weights need not be among them.
        finish: Called with the directory of the files before they move in, to add to them.

    Raises:
        ExportError: The tensors of a checkpoint that is not quantized do not fit the model's class.
        OSError: The target is a file or cannot be written.
    """
    bare = _bare(model, dtype)
    if quantization_config is None:
        tied = bare.all_tied_weights_keys.keys()
        if unfit := (tensors.keys() ^ bare.state_dict().keys()) - (tied - tensors.keys()):
            raise ExportError(f"model: {min(unfit)!r} is in the model or in its class, but not in both")
    files = {}
    if is_ours(type(model)):
        bare.config.auto_map, files = auto_map(type(model)), modelling_files(type(model))
    if quantization_config is not None:
        bare.config.quantization_config = quantization_config

    def write_all(staging: Path) -> None:
        # The class's own `save_pretrained` may be that of a model quantized by dllmquant.
        PreTrainedModel.save_pretrained(bare, staging, state_dict=tensors)
        for path in staging.glob("*.py"):
            path.write_text(without_plugin(path.read_text(encoding="utf-8")), encoding="utf-8")
        for name, source in files.items():
            (staging / name).write_text(source, encoding="utf-8")
        if finish is not None:
            finish(staging)

        written.update(path.name for path in staging.iterdir())

    written: set[str] = set()
    write_atomically(directory, write_all)
    if _GPTQ_CONFIG not in written:
        (directory / _GPTQ_CONFIG).unlink(missing_ok=True)


def _bare(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model before it was quantized, without any weights."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        bare = type(model)(config)
        nn.Module.to(bare, dtype)
    if model.can_generate():
        bare.generation_config = model.generation_config
    return bare
