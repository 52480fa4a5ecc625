"""Post-training quantization for diffusion language models.

Importing this package registers the model families and the `dllmquant` quantization method with transformers.
"""

from dllmquant import models as _models  # noqa: F401 - registers the model families
from dllmquant._version import __version__
from dllmquant.assets import bundled
from dllmquant.checkpoint import CheckpointError
from dllmquant.export import ExportError, export_model
from dllmquant.generation import generate
from dllmquant.integrations import transformers as _plugin  # noqa: F401 - registers the quantization method
from dllmquant.models import ModelAdapter, register_adapter
from dllmquant.quantizer import DLLMQuantizer
from dllmquant.recipe import Recipe, RecipeError

__all__ = [
    "CheckpointError",
    "DLLMQuantizer",
    "ExportError",
    "ModelAdapter",
    "Recipe",
    "RecipeError",
    "__version__",
    "bundled",
    "export_model",
    "generate",
    "register_adapter",
]
