"""SDAR and TraDo: configurations, modelling code and quantization adapters."""

from dllmquant.models.sdar.configuration import SDARConfig, SDARMoeConfig
from dllmquant.models.sdar.modeling import SDARForCausalLM, SDARMoeForCausalLM

__all__ = ["SDARConfig", "SDARForCausalLM", "SDARMoeConfig", "SDARMoeForCausalLM"]
