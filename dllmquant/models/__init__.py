"""Model families: native modelling code, and adapters that tell the quantizer where things are."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from dllmquant.models.adapters import (
    ModelAdapter,
    Verification,
    adapter_for,
    register_adapter,
    registered_adapters,
)
from dllmquant.models.dream import DreamConfig, DreamModel
from dllmquant.models.dream.adapter import ADAPTER as _DREAM
from dllmquant.models.llada import LLaDAConfig, LLaDAModelLM
from dllmquant.models.llada.adapter import ADAPTER as _LLADA

__all__ = [
    "DreamConfig",
    "DreamModel",
    "LLaDAConfig",
    "LLaDAModelLM",
    "ModelAdapter",
    "Verification",
    "adapter_for",
    "register_adapter",
    "registered_adapters",
]

# The published checkpoints map AutoModel to the class with the head, and so do we.
for _config, _model in ((LLaDAConfig, LLaDAModelLM), (DreamConfig, DreamModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForMaskedLM.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)  # not causal, but what LLaDA's checkpoints map too
for _adapter in (_LLADA, _DREAM):
    register_adapter(_adapter, replace=True)
