"""Dream and DiffuCoder: configuration, modelling code and quantization adapter."""

from dllmquant.models.dream.configuration import DreamConfig
from dllmquant.models.dream.modeling import DreamModel

__all__ = ["DreamConfig", "DreamModel"]
