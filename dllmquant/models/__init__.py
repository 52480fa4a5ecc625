"""Model families: native modelling code, and adapters that tell the quantizer where things are."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from dllmquant.models.adapters import ModelAdapter, adapter_for, register_adapter, registered_adapters
from dllmquant.models.llada import LLaDAConfig, LLaDAModelLM
from dllmquant.models.llada.adapter import ADAPTER as _LLADA

__all__ = [
    "LLaDAConfig",
    "LLaDAModelLM",
    "ModelAdapter",
    "adapter_for",
    "register_adapter",
    "registered_adapters",
]

AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
# The published checkpoints map AutoModel to the class with the head, and so do we.
AutoModel.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
register_adapter(_LLADA, replace=True)
