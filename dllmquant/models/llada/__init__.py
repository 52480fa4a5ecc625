"""LLaDA: configuration, modelling code and quantization adapter."""

from dllmquant.models.llada.configuration import LLaDAConfig
from dllmquant.models.llada.modeling import LLaDAModelLM

__all__ = ["LLaDAConfig", "LLaDAModelLM"]
