"""LLaDA-MoE: configuration, modelling code and quantization adapter."""

from dllmquant.models.llada_moe.configuration import LLaDAMoEConfig
from dllmquant.models.llada_moe.modeling import LLaDAMoEModelLM

__all__ = ["LLaDAMoEConfig", "LLaDAMoEModelLM"]
