"""DiffusionGemma rearranged for quantization: experts as linear layers, and one module for what is shared.

In transformers' model the experts of a layer are two three-dimensional tensors, and every weight of the encoder's text
layers is tied to the decoder's. Tensors can be tied, packed layers cannot: `arrange` makes the encoder's layers call
the decoder's modules instead. Afterwards state dicts hold each weight of the layers once, under the decoder's name, and
whatever replaces a module of the decoder replaces it for the encoder too. What is computed stays the same; only
transformers' record of the encoder's router scores (`output_router_logits`) is lost.

transformers loads its own model even where it knows nothing of dllmquant, and takes weights it misses at random, with a
warning. So an arranged model also has tensors of one element under the names of the fused weights: in a checkpoint,
their shape does not fit, which is an error. `restore` takes the tensors of an arranged model back to where they were.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedModel

from dllmquant.models.experts import RoutedExperts

ENCODER_LAYERS = "model.encoder.language_model.layers"
DECODER_LAYERS = "model.decoder.layers"
FUSED = ("gate_up_proj", "down_proj")

_PLACEHOLDER = re.compile(rf"\.experts\.(?:{'|'.join(FUSED)})$")
_EXPERT = re.compile(rf"(.+\.experts)\.(\d+)\.({'|'.join(FUSED)})\.weight$")


class GatedExpert(nn.Module):
    """One expert: a gated feed-forward layer whose gate and values come from one projection."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        """Copies one expert out of fused weights.

        Args:
            gate_up: [2 * inner, width], the rows of the gate first.
            down: [width, inner].
            act_fn: Of the gate.
        """
        super().__init__()
        self.gate_up_proj = _linear(gate_up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens [n, width] to [n, width]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.act_fn(gate) * up)
        return out


class UnfusedExperts(RoutedExperts):
    """The experts of a layer, with a placeholder under the name of each fused weight."""

    def __init__(self, experts: Iterable[nn.Module], device: torch.device) -> None:
        super().__init__(experts)
        for name in FUSED:
            self.register_buffer(name, torch.zeros(1, dtype=torch.uint8, device=device))

    def reset_placeholders(self) -> None:
        """Gives placeholders their value, which they do not have where a checkpoint did not hold them."""
        for name in FUSED:
            self.get_buffer(name).zero_()


class Shared(nn.Module):
    """Calls a child of another module, whatever that child is at the time; holds no weights of its own."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)  # past nn.Module, which would register it as a child
        self._name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Does what the child does."""
        return getattr(self._owner, self._name)(*args, **kwargs)

    def extra_repr(self) -> str:
        """Says which child."""
        return self._name


def arrange(model: nn.Module) -> None:
    """Rearranges a model in place; a second time changes nothing. Works on the meta device.

    Raises:
        ValueError: The model has no head, or its encoder and decoder do not share their weights.
    """
    if not isinstance(model, DiffusionGemmaForBlockDiffusion):
        raise ValueError(f"diffusion_gemma: {type(model).__name__}; valid: DiffusionGemmaForBlockDiffusion")
    if not model.config.tie_word_embeddings:
        raise ValueError(
            "diffusion_gemma config: tie_word_embeddings=False gives encoder and decoder weights of their own; "
            "valid: True"
        )
    layers = (model.get_submodule(path) for path in (ENCODER_LAYERS, DECODER_LAYERS))
    for encoder, decoder in zip(*(layer.children() for layer in layers), strict=True):
        if not isinstance(decoder.experts, UnfusedExperts):
            decoder.experts = _unfused(decoder.get_submodule("experts"))
            for path in ("", "self_attn"):
                borrower, owner = encoder.get_submodule(path), decoder.get_submodule(path)
                for name, _ in list(borrower.named_children()):
                    if name != "self_attn":
                        setattr(borrower, name, Shared(owner, name))
        else:
            decoder.experts.reset_placeholders()
    _forget_ties(model)
    # Checkpoints of earlier versions do not hold the placeholders.
    missing = {rf"experts\.({'|'.join(FUSED)})$"}
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *missing}


def restore(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of an arranged model as that of the model before, with the experts of a layer fused again.

    Args:
        tensors: By full path, every layer with its float weight; emptied, so no layer's experts are in memory twice.

    Returns:
        By transformers' names, all but those of tied weights of the encoder.
    """
    restored, experts = {}, defaultdict[str, dict[int, Tensor]](dict)
    while tensors:
        name, tensor = tensors.popitem()
        if (found := _EXPERT.match(name)) is not None:
            experts[f"{found[1]}.{found[3]}"][int(found[2])] = tensor
        elif _PLACEHOLDER.search(name) is None:
            restored[name] = tensor
    while experts:
        name, by_index = experts.popitem()
        restored[name] = torch.stack([by_index[index] for index in range(len(by_index))])
    return restored


@torch.no_grad()
def _unfused(experts: nn.Module) -> UnfusedExperts:
    """Returns the experts of fused weights [experts, out, in]."""
    gate_up, down = (experts.get_parameter(name) for name in FUSED)
    act_fn = experts.get_submodule("act_fn")
    unfused = (GatedExpert(*weights, act_fn) for weights in zip(gate_up, down, strict=True))
    return UnfusedExperts(unfused, gate_up.device)


def _linear(weight: Tensor) -> nn.Linear:
    """Returns a linear layer with a copy of a weight: a view would keep the fused tensor in memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    return linear


def _forget_ties(model: PreTrainedModel) -> None:
    """Takes the encoder's layers out of transformers' lists of tied weights: they have none any more."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for table in ("_tied_weights_keys", "all_tied_weights_keys"):
                ties = getattr(module, table, None)
                if ties:
                    kept = {target: source for target, source in ties.items() if "language_model.layers" not in target}
                    setattr(module, table, kept)
