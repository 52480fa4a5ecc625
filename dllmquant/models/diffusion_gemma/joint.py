"""DiffusionGemma in one pass: its encoder and its decoder are the same layers, so they can run side by side.

The published order is: the encoder reads the context causally and keeps keys and values; the decoder reads the canvas,
attends to them and to the whole canvas. Encoder and decoder share all weights of their layers, and all but attention is
computed token by token. So the decoder's layers, run once on context and canvas together under a mask that says who
attends to whom, compute the hidden states of both: that is how the quantizer, which drives a model block by block, sees
all tokens that a weight sees. What the two do not share is a scalar per layer (`layer_scalar`): every token is
multiplied by that of its side.

The canvas are the last `config.canvas_length` columns, or all if there are no more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as gemma

from dllmquant.models.diffusion_gemma.arrange import DECODER_LAYERS, ENCODER_LAYERS


@dataclass(frozen=True, eq=False)
class JointInputs:
    """What the layers of a joint pass are given besides the hidden states: the same for all, each takes what is its.

    Attributes:
        rotary: By kind of layer, cosines and sines [1, L, head_dim].
        masks: By kind of layer, who attends to whom, bool [B, 1, L, L].
        context: Columns that are context; the others are the canvas.
        encoder_scalars: Per layer, what multiplies the context's hidden states, [1].
    """

    rotary: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]
    context: int
    encoder_scalars: tuple[Tensor, ...]


class DiffusionGemmaDecoderTextLayer(gemma.DiffusionGemmaDecoderTextLayer):
    """A decoder layer that can also run on context and canvas together.

    It bears the name of the class it extends: transformers places layers by that name.
    """

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Maps hidden states [B, L, width] to the next ones.

        Args:
            hidden_states: Of the canvas; with `JointInputs`, of context and canvas.
            position_embeddings: As transformers has it, or `JointInputs`.
            *args: As for transformers' layer; none with `JointInputs`.
            **kwargs: Likewise, but for `preliminary`, which is for those who watch a model's calls.
        """
        if not isinstance(position_embeddings, JointInputs):
            plain: Tensor = super().forward(hidden_states, position_embeddings, *args, **kwargs)
            return plain
        joint, kind = position_embeddings, str(self.self_attn.layer_type)
        rotary: Any = joint.rotary[kind]
        with self._scalars(joint, hidden_states.shape[1]):
            out: Tensor = super().forward(hidden_states, position_embeddings=rotary, attention_mask=joint.masks[kind])
        return out

    @contextmanager
    def _scalars(self, joint: JointInputs, length: int) -> Iterator[None]:
        """While the context lasts, `layer_scalar` holds a scalar per token."""
        own = self.get_buffer("layer_scalar")
        theirs = joint.encoder_scalars[self.layer_idx].to(own)
        per_token = torch.cat((theirs.expand(joint.context), own.expand(length - joint.context)))
        self._buffers["layer_scalar"] = per_token[:, None]
        try:
            yield
        finally:
            self._buffers["layer_scalar"] = own


def denoise(model: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Predicts every token of states whose step before is not known.

    Decoding gives the decoder the prediction of the step before (self-conditioning). Here it is given the one that it
    makes of the same state without: the model runs twice. Calls of the layers in the first pass say `preliminary=True`.

    Args:
        model: A `DiffusionGemmaForBlockDiffusion`, arranged or not.
        ids: int64 [B, L].
        attention_mask: [B, L], nonzero on real tokens.

    Returns:
        float32 [B, L, V]. Those of the canvas predict their own position. The encoder's predict the next one, so those
        of the context are moved by one; the first token of a row keeps those of its own position.

    Raises:
        ValueError: As `refine`.
    """
    canvas = slice(_context(model, ids), None)
    draft = _predict(model, ids, attention_mask, None, canvas, preliminary=True)
    return _predict(model, ids, attention_mask, draft, slice(None))


def refine(model: nn.Module, ids: Tensor, attention_mask: Tensor, previous: Tensor | None, window: slice) -> Tensor:
    """Predicts tokens of states whose step before is known, as decoding does.

    Args:
        model: A `DiffusionGemmaForBlockDiffusion`, arranged or not.
        ids: int64 [B, L].
        attention_mask: [B, L], nonzero on real tokens.
        previous: Logits of the canvas at the step before, [B, canvas, V]; None at the first step.
        window: The columns whose logits are wanted.

    Returns:
        float32 [B, window, V], aligned as those of `denoise`.

    Raises:
        ValueError: The model does not compute attention by `scaled_dot_product_attention`, or its encoder is not
            causal.
    """
    return _predict(model, ids, attention_mask, previous, window)


def _predict(
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    previous: Tensor | None,
    window: slice,
    **watched: bool,
) -> Tensor:
    assert isinstance(model, gemma.DiffusionGemmaForBlockDiffusion)
    config: Any = model.config.text_config
    decoder, real, context = model.model.decoder, attention_mask.bool(), _context(model, ids)
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"diffusion_gemma: attn_implementation={config._attn_implementation!r}; valid: 'sdpa', "
            "of a model loaded with attn_implementation='sdpa'"
        )
    if config.use_bidirectional_attention == "all":
        raise ValueError("diffusion_gemma config: use_bidirectional_attention='all'; valid: None or 'vision'")
    hidden = _embedded(decoder, ids, context, previous)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    kinds = set(config.layer_types)
    joint = JointInputs(
        rotary={kind: decoder.rotary_emb(hidden, positions, kind) for kind in kinds},
        masks={
            kind: joint_mask(real, context, config.sliding_window if kind == "sliding_attention" else None)
            for kind in kinds
        },
        context=context,
        encoder_scalars=tuple(layer.get_buffer("layer_scalar") for layer in _layers(model, ENCODER_LAYERS)),
    )
    for layer in _layers(model, DECODER_LAYERS):
        layer.__class__ = DiffusionGemmaDecoderTextLayer
        hidden = layer(hidden, joint, **watched)
    hidden = decoder.norm(_aligned(hidden, real, context)[:, window])
    cap = model.final_logit_softcapping
    logits: Tensor = model.lm_head(hidden).float()
    return logits.div_(cap).tanh_().mul_(cap)  # in place: they are the largest tensors there are


def joint_mask(real: Tensor, context: int, window: int | None) -> Tensor:
    """Returns who attends to whom in a joint pass.

    Context attends to context up to itself. Canvas attends to all canvas and to all context. Layers with a sliding
    window have their context tokens attend to the last `window` tokens, themselves among them, and keep keys and values
    of the last `window - 1` tokens for the canvas, all of which attends to all of these.

    Args:
        real: bool [B, L], False on padding, to which nobody attends.
        context: Columns that are context; the others are the canvas.
        window: Tokens of the sliding window; None without one.

    Returns:
        bool [B, 1, L, L], queries by keys.
    """
    position = torch.arange(real.shape[1], device=real.device)
    query, key = position[:, None], position[None]
    allowed = (key <= query) | (query >= context)
    if window is not None:
        reach = query.clamp(max=context)  # the whole canvas sees what its first token sees
        allowed &= (reach - key < window) | (key >= context)
    return (allowed & real[:, None, :])[:, None]


def _context(model: nn.Module, ids: Tensor) -> int:
    """Returns how many columns of ids are context."""
    config: Any = model.config
    return max(ids.shape[1] - int(config.canvas_length), 0)


def _layers(model: nn.Module, path: str) -> Iterator[nn.Module]:
    return model.get_submodule(path).children()


def _embedded(decoder: nn.Module, ids: Tensor, context: int, previous: Tensor | None) -> Tensor:
    """Returns what enters the first layer, [B, L, width]; the canvas with what was predicted of it."""
    table: Any = decoder.embed_tokens
    embeds: Tensor = table(ids)
    canvas = embeds[:, context:]
    signal = torch.zeros_like(canvas)
    if previous is not None:
        weights = previous.to(table.weight.dtype).softmax(-1, dtype=torch.float32).to(table.weight.dtype)
        signal = weights @ table.weight * table.embed_scale.to(embeds.dtype)
    conditioned: Tensor = decoder.get_submodule("self_conditioning")(canvas, signal)
    return torch.cat((embeds[:, :context], conditioned), dim=1)


def _aligned(hidden: Tensor, real: Tensor, context: int) -> Tensor:
    """Moves the hidden states of the context, which predict the next token, to the token they predict."""
    position = torch.arange(hidden.shape[1], device=hidden.device)
    follows = real & real.roll(1, dims=1) & (position > 0) & (position < context)
    return torch.where(follows[..., None], hidden.roll(1, dims=1), hidden)
