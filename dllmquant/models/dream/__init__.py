"""Dream and DiffuCoder: configuration, tokenizer, modelling code and quantization adapter."""

from dllmquant.models.dream.configuration import DreamConfig
from dllmquant.models.dream.generation import DreamModelOutput
from dllmquant.models.dream.modeling import DreamModel
from dllmquant.models.dream.tokenization import DreamTokenizer

__all__ = ["DreamConfig", "DreamModel", "DreamModelOutput", "DreamTokenizer"]
