"""Tiny quantized models to export, and the numbers they are compared by."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dllmquant import DLLMQuantizer
from tests.tiny import tiny_llada, tiny_tokenizer

IDS = torch.randint(2, 90, (2, 12), generator=torch.Generator().manual_seed(0))

# What calibrated recipes change to be quick.
QUICK = {"num_states": 12, "num_prompts": 4, "batch_size": 5}


def quantized(
    recipe: str, model: PreTrainedModel | None = None, *, calibrated: bool = False, **changes: Any
) -> PreTrainedModel:
    """Quantizes a tiny model, a LLaDA if none is given, by a built-in recipe with changes."""
    settings: dict[str, Any] = {"extends": recipe, "name": "tiny"} | changes
    if calibrated:
        settings["calibration"] = QUICK
    model = tiny_llada() if model is None else model
    return DLLMQuantizer(settings).quantize(model, tokenizer=tiny_tokenizer(), progress=False).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Returns a model's logits on the ids."""
    logits: Tensor = model(IDS).logits
    return logits


def nmse(logits: Tensor, reference: Tensor) -> float:
    """Returns the mean squared difference, relative to the reference's mean square."""
    return float((logits.double() - reference.double()).square().mean() / reference.double().square().mean())
