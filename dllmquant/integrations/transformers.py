"""The transformers plug-in: `from_pretrained` on a checkpoint of ours builds packed layers and loads into them.

Importing dllmquant registers `quant_method: "dllmquant"`. A process that does not import it never gets a model with
random weights: the packed codes are stored under the key `weight`, whose shape then does not fit, which is an error.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dllmquant.checkpoint import FORMAT_VERSION, CheckpointError, check_format_version
from dllmquant.core.grid import Grid
from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.linear import QuantLinear

QUANT_METHOD = "dllmquant"


class DLLMQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: everything that says how it was made and how to read it.

    Args:
        modules: Full path of each packed layer -> {"weight": {"bits", "group_size", "symmetric"}, "activation":
            {"bits", "group_size", "symmetric"} or None}.
        recipe: The resolved recipe.
        library_version: Version of dllmquant that wrote the checkpoint.
        seed: Seed the quantization ran with.
        states_hash: SHA-256 of the calibration states; None for data-free recipes.
        format_version: Version of the on-disk layout.
        **unknown: Must be empty but for `quant_method`.

    Raises:
        CheckpointError: The format version is not one this library reads, a field is unknown, or a module's scheme is
            malformed.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]],
        recipe: dict[str, Any],
        library_version: str,
        seed: int,
        states_hash: str | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment] # annotated as transformers' own enum
        method = unknown.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD or unknown:
            raise CheckpointError(f"quantization_config: unknown fields {sorted(unknown)} (quant_method {method!r})")
        check_format_version(format_version)
        self.format_version = format_version
        self.library_version = library_version
        self.recipe = recipe
        self.seed = seed
        self.states_hash = states_hash
        self.modules = modules
        for name in modules:
            self.scheme(name)

    def scheme(self, name: str) -> tuple[Grid, ActivationScheme | None]:
        """Returns the weight grid and activation scheme of a packed layer.

        Raises:
            CheckpointError: The stored scheme is malformed.
        """
        try:
            stored = self.modules[name]
            activation = stored["activation"]
            return Grid(**stored["weight"]), None if activation is None else ActivationScheme(**activation)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config.modules[{name!r}] is malformed: {error}") from error


class DLLMQuantHfQuantizer(HfQuantizer):
    """Swaps packed layers in before the weights are read, and checks them afterwards."""

    requires_calibration = True

    def __init__(self, quantization_config: DLLMQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: DLLMQuantConfig = quantization_config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name in self.quantization_config.modules:
            grid, activation = self.quantization_config.scheme(name)
            try:
                linear = model.get_submodule(name)
            except AttributeError as error:
                raise CheckpointError(f"quantization_config.modules: the model has no module {name!r}") from error
            if not isinstance(linear, nn.Linear):
                raise CheckpointError(f"quantization_config.modules: {name!r} is a {type(linear).__name__}, not Linear")
            packed = QuantLinear(
                linear.in_features,
                linear.out_features,
                grid,
                activation,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name in self.quantization_config.modules:
            packed = model.get_submodule(name)
            assert isinstance(packed, QuantLinear)
            scale = packed.weight_scale
            if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
                raise CheckpointError(f"{name}.weight_scale holds values that are not positive finite numbers")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed models can always be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # transformers refuses a second registration
    register_quantization_config(QUANT_METHOD)(DLLMQuantConfig)
    register_quantizer(QUANT_METHOD)(DLLMQuantHfQuantizer)
