"""LLaDA2.0 and LLaDA2.1: configuration, modelling code and quantization adapter."""

from dllmquant.models.llada2.configuration import LLaDA2MoeConfig
from dllmquant.models.llada2.modeling import LLaDA2MoeModelLM

__all__ = ["LLaDA2MoeConfig", "LLaDA2MoeModelLM"]
