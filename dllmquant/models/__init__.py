"""Model families: native modelling code, and adapters that tell the quantizer where things are."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
)

from dllmquant.models.adapters import (
    ModelAdapter,
    Verification,
    adapter_for,
    register_adapter,
    registered_adapters,
)
from dllmquant.models.diffusion_gemma.adapter import ADAPTER as _DIFFUSION_GEMMA
from dllmquant.models.dream import DreamConfig, DreamModel, DreamTokenizer
from dllmquant.models.dream.adapter import ADAPTER as _DREAM
from dllmquant.models.fast_dllm import Fast_dLLM_QwenForCausalLM, FastDLLMConfig
from dllmquant.models.fast_dllm.adapter import ADAPTER as _FAST_DLLM
from dllmquant.models.llada import LLaDAConfig, LLaDAModelLM
from dllmquant.models.llada.adapter import ADAPTER as _LLADA
from dllmquant.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dllmquant.models.llada2.adapter import ADAPTER as _LLADA2
from dllmquant.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from dllmquant.models.llada_moe.adapter import ADAPTER as _LLADA_MOE
from dllmquant.models.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM
from dllmquant.models.sdar.adapter import ADAPTER as _SDAR
from dllmquant.models.sdar.adapter import MOE_ADAPTER as _SDAR_MOE

__all__ = [
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "FastDLLMConfig",
    "Fast_dLLM_QwenForCausalLM",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "ModelAdapter",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "Verification",
    "adapter_for",
    "register_adapter",
    "registered_adapters",
]

# The published checkpoints map AutoModel to the class with the head, and so do we.
for _config, _model in (
    (LLaDAConfig, LLaDAModelLM),
    (DreamConfig, DreamModel),
    (LLaDAMoEConfig, LLaDAMoEModelLM),
    (LLaDA2MoeConfig, LLaDA2MoeModelLM),
    (SDARConfig, SDARForCausalLM),
    (SDARMoeConfig, SDARMoeForCausalLM),
    (FastDLLMConfig, Fast_dLLM_QwenForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForMaskedLM.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)  # not causal, but what LLaDA's checkpoints map too
AutoTokenizer.register(DreamConfig, DreamTokenizer, exist_ok=True)
AutoModel.register(DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, exist_ok=True)  # theirs has no head
for _adapter in (_LLADA, _DREAM, _LLADA_MOE, _LLADA2, _SDAR, _SDAR_MOE, _FAST_DLLM, _DIFFUSION_GEMMA):
    register_adapter(_adapter, replace=True)
