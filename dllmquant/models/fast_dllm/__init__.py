"""Fast-dLLM v2: configuration, modelling code and quantization adapter."""

from dllmquant.models.fast_dllm.configuration import FastDLLMConfig
from dllmquant.models.fast_dllm.modeling import Fast_dLLM_QwenForCausalLM

__all__ = ["FastDLLMConfig", "Fast_dLLM_QwenForCausalLM"]
