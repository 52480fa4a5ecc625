"""The transformers plug-in: `from_pretrained` on a checkpoint of ours builds packed layers and loads into them.

Importing dllmquant registers `quant_method: "dllmquant"`. A process that does not import it never gets a model with
random weights: the packed codes are stored under the key `weight`, whose shape then does not fit, which is an error.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dllmquant.checkpoint import FORMAT_VERSION, CheckpointError, check_format_version
from dllmquant.core.grid import Grid
from dllmquant.integrations.saving import extend_saving
from dllmquant.models.adapters import registered_adapters
from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.attention import AttentionQuantizer, AttentionScheme, install, installed
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.transform import TransformStep
from dllmquant.recipe import Recipe, RecipeError

QUANT_METHOD = "dllmquant"


class DLLMQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: everything that says how it was made and how to read it.

    Args:
        modules: Full path of each packed layer -> {"weight": the fields of `Grid`, "activation": the fields of
            `ActivationScheme` or None, "input_transform": a list of the fields of each `TransformStep`}; fields that
            have their default may be absent.
        recipe: The resolved recipe.
        library_version: Version of dllmquant that wrote the checkpoint.
        seed: Seed the quantization ran with.
        states_hash: SHA-256 of the calibration states; None for data-free recipes.
        attention: Full path of each block whose attention is quantized -> {"scheme": the fields of `AttentionScheme`,
            "heads", "value_heads", "channels"}.
        coverage: Where in the denoising process the calibration states lie (`Coverage.to_dict`); None without states.
        cost: What it takes to make these states (`Cost.counts`); None without states, or if it is not known.
        allocation: The activation bits IA-AQ gave each site, with the errors it was decided by.
        attention_reports: What IA-AQ found in each block whose attention it fitted: the fields of `AttentionReport`.
        expert_tokens: Full path of each mixture layer -> the calibration tokens each expert read.
        base_model: Hub id of the original model; None if it was not loaded from the Hub.
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
        attention: dict[str, dict[str, Any]] | None = None,
        coverage: dict[str, Any] | None = None,
        cost: dict[str, int] | None = None,
        allocation: list[dict[str, Any]] | None = None,
        expert_tokens: dict[str, list[int]] | None = None,
        base_model: str | None = None,
        attention_reports: list[dict[str, Any]] | None = None,
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
        self.attention = attention or {}
        self.coverage = coverage
        self.cost = cost
        self.allocation = allocation or []
        self.attention_reports = attention_reports or []
        self.expert_tokens = expert_tokens or {}
        self.base_model = base_model
        for name in modules:
            self.scheme(name)
        for name in self.attention:
            self.attention_quantizer(name, "meta")

    def scheme(self, name: str) -> tuple[Grid, ActivationScheme | None, tuple[TransformStep, ...]]:
        """Returns the weight grid, activation scheme and input transform of a packed layer.

        Raises:
            CheckpointError: The stored scheme is malformed.
        """
        try:
            stored = dict(self.modules[name])
            grid, activation = Grid(**stored.pop("weight")), stored.pop("activation")
            steps = tuple(TransformStep(**step) for step in stored.pop("input_transform", ()))
            if stored:
                raise ValueError(f"unknown fields {sorted(stored)}")
            return grid, None if activation is None else ActivationScheme(**activation), steps
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config.modules[{name!r}] is malformed: {error}") from error

    def attention_quantizer(self, name: str, device: torch.device | str) -> AttentionQuantizer:
        """Returns an empty attention quantizer of a block, to load into.

        Raises:
            CheckpointError: The stored description is malformed.
        """
        try:
            stored = dict(self.attention[name])
            return AttentionQuantizer(AttentionScheme(**stored.pop("scheme")), **stored, device=device)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config.attention[{name!r}] is malformed: {error}") from error


def describe_layer(layer: QuantLinear) -> dict[str, Any]:
    """Returns what `DLLMQuantConfig.modules` keeps of a packed layer."""
    described: dict[str, Any] = {
        "weight": _set_fields(layer.grid),
        "activation": None if layer.activation is None else _set_fields(layer.activation),
    }
    if layer.input_transform is not None:
        described["input_transform"] = [_set_fields(step) for step in layer.input_transform.steps]
    return described


def describe_attention(quantizer: AttentionQuantizer) -> dict[str, Any]:
    """Returns what `DLLMQuantConfig.attention` keeps of a block's attention quantizer."""
    return {
        "scheme": asdict(quantizer.scheme),
        "heads": quantizer.heads,
        "value_heads": quantizer.value_heads,
        "channels": quantizer.channels,
    }


def _set_fields(scheme: Grid | ActivationScheme | TransformStep) -> dict[str, Any]:
    """Returns a scheme's fields, those that were added to the format later left out where they have their default."""
    optional = {"group_bits": None, "seed": None, "full_range": False}
    return {name: value for name, value in asdict(scheme).items() if name not in optional or value != optional[name]}


def recipe_and_protocol(model: PreTrainedModel) -> tuple[str | None, str]:
    """Returns the name of the recipe a model was quantized by and its protocol (`Recipe.protocol`), for reports.

    A model that is not quantized has no recipe, and its precision instead of a protocol, such as "16-bit"; of one that
    something else quantized, its name is told. The protocol of a recipe that this version cannot read is "unknown".
    """
    stored = getattr(model.config, "quantization_config", None)
    if stored is None:
        return None, f"{8 * model.dtype.itemsize}-bit"
    if not isinstance(stored, DLLMQuantConfig):
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        return None, f"quantized by {getattr(method, 'value', method)}"
    name = str(stored.recipe.get("name", "custom"))
    try:
        return name, Recipe.load(stored.recipe).protocol
    except RecipeError:
        return name, "unknown"


class DLLMQuantHfQuantizer(HfQuantizer):
    """Swaps packed layers in before the weights are read, and checks them afterwards."""

    requires_calibration = True

    def __init__(self, quantization_config: DLLMQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: DLLMQuantConfig = quantization_config
        self._shapes: dict[str, torch.Size] = {}  # of the tensors, while they are loaded

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _arrange(model)
        for name in self.quantization_config.modules:
            grid, activation, steps = self.quantization_config.scheme(name)
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
                input_transform=steps,
            )
            model.set_submodule(name, packed)
        for name in self.quantization_config.attention:
            try:
                block = model.get_submodule(name)
            except AttributeError as error:
                raise CheckpointError(f"quantization_config.attention: the model has no module {name!r}") from error
            device = next(block.parameters()).device
            install(block, self.quantization_config.attention_quantizer(name, device))
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._check_shapes(model)
        _arrange(model)  # again: a checkpoint of an earlier version may not hold all that an arranged model has
        for name in self.quantization_config.modules:
            packed = model.get_submodule(name)
            assert isinstance(packed, QuantLinear)
            scale = packed.weight_scale
            if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
                raise CheckpointError(f"{name}.weight_scale holds values that are not positive finite numbers")
            if packed.input_transform is not None:
                _checked(f"{name}.input_transform", packed.input_transform.check)
        for name in self.quantization_config.attention:
            quantizer = installed(model.get_submodule(name))
            assert quantizer is not None
            _checked(f"{name}.attention_quantizer", quantizer.check_scales)
        extend_saving(model)

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """Checks that tensors have the shapes the configuration says.

        transformers 5.20 takes tensors of any shape where there is a quantizer.

        Raises:
            CheckpointError: A tensor has another shape.
        """
        expected, self._shapes = self._shapes, {}
        for name, tensor in model.state_dict().items():
            if tensor.shape != expected.get(name, tensor.shape):
                raise CheckpointError(f"{name} has the shape {tuple(tensor.shape)}; valid: {tuple(expected[name])}")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed models can always be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False


def _arrange(model: PreTrainedModel) -> None:
    adapter = registered_adapters().get(model.config.model_type)
    if adapter is not None and adapter.arrange is not None:
        adapter.arrange(model)


def _checked(name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # transformers refuses a second registration
    register_quantization_config(QUANT_METHOD)(DLLMQuantConfig)
    register_quantizer(QUANT_METHOD)(DLLMQuantHfQuantizer)
