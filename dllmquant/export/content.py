"""What a quantized model contains that a format must be able to express, and the sentences that refuse it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.attention import installed
from dllmquant.nn.linear import QuantLinear


class ExportError(ValueError):
    """A model that cannot be exported to a format; the message says why."""


@dataclass(frozen=True)
class Content:
    """The quantized parts of a model.

    Attributes:
        layers: The packed layers by their full paths, in the model's order; at least one.
        attention: Full paths of the blocks whose attention is quantized.
    """

    layers: dict[str, QuantLinear]
    attention: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Collects the quantized parts of a model.

        Raises:
            ExportError: The model has no packed layers.
        """
        named = list(model.named_modules())
        layers = {name: module for name, module in named if isinstance(module, QuantLinear)}
        if not layers:
            raise ExportError(f"model: {type(model).__name__} has no packed layers; quantize it by dllmquant first")
        return cls(layers, tuple(name for name, module in named if installed(module) is not None))

    def check(self, form: str, *problems: Callable[[QuantLinear], str | None]) -> None:
        """Checks that a format can express all there is; no format can express input transforms and attention.

        Args:
            form: Name of the format.
            *problems: Each returns what the format cannot express of a layer, or None.

        Raises:
            ExportError: It cannot; the message lists everything that is in the way, and where.
        """
        found: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            for problem in (_online, *problems):
                if (what := problem(layer)) is not None:
                    found.setdefault(what, []).append(name)
        if self.attention:
            found["quantized attention"] = list(self.attention)
        if found:
            reasons = "; ".join(f"{what} ({_places(names)})" for what, names in found.items())
            raise ExportError(f"format: {form!r} cannot express {reasons}")

    def same_scheme(self, form: str) -> QuantLinear:
        """Returns the first layer, after checking that all layers have its grid and its activations.

        Raises:
            ExportError: They differ.
        """
        first, *others = self.layers.values()
        kinds = {(layer.grid, layer.activation) for layer in (first, *others)}
        if len(kinds) > 1:
            raise ExportError(
                f"format: {form!r} cannot express layers that differ in bits or groups; here {len(kinds)} kinds"
            )
        return first

    def state_dict(self, model: nn.Module, exported: Callable[[QuantLinear], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns a model's tensors with its packed layers in another layout.

        Args:
            model: The model of this content; it stays as it is.
            exported: Returns the tensors of a packed layer, all but its bias, by the names they have in the layer.

        Returns:
            All tensors by full path.
        """
        tensors: dict[str, Tensor] = {}
        for key, tensor in model.state_dict().items():
            path, _, leaf = key.rpartition(".")
            if path not in self.layers or leaf == "bias":
                tensors[key] = tensor
        for name, layer in self.layers.items():
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in exported(layer).items()}
        return tensors


def irregular_grid(layer: QuantLinear) -> str | None:
    """Returns what formats of equidistant codes of one width cannot express of a layer's grid, or None."""
    if layer.grid.group_bits is not None:
        return "weights of several widths within a layer"
    return "1-bit weights, whose levels −scale and +scale leave out zero" if layer.grid.bits == 1 else None


def activation(scheme: ActivationScheme | None) -> str | None:
    """Describes how inputs are quantized, for a refusal; None if they are not."""
    if scheme is None:
        return None
    bits = f"{scheme.bits}-bit" if scheme.group_bits is None else "mixed-width"
    size = "per token" if scheme.group_size is None else f"in groups of {scheme.group_size} channels"
    return f"{bits} {'symmetric' if scheme.symmetric else 'asymmetric'} activations {size}"


def _online(layer: QuantLinear) -> str | None:
    if layer.input_transform is None:
        return None
    return f"input transforms computed at every call: {', '.join(step.kind for step in layer.input_transform.steps)}"


def _places(names: list[str]) -> str:
    others = len(names) - 1
    return names[0] + (f" and {others} other{'s' if others > 1 else ''}" if others else "")
