"""`diffusion_generate` of Dream's published code, over the sampler of `dllmquant.decoding.timesteps`.

This module attaches it to `DreamModel`: the modelling code itself imports no sampler, because it travels with exported
checkpoints.

Deviations from the published method, besides those of the sampler: the special tokens are those of the model's
configuration, prompts that hold the mask token are an error, and the history leaves out steps that commit nothing.
"""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from dllmquant.decoding import DreamSamplerConfig, Generation, sample
from dllmquant.models.adapters import adapter_for
from dllmquant.models.dream.modeling import DreamModel
from dllmquant.models.inference import inference

_LOGGER = logging.getLogger(__name__)
_DEFAULT_LENGTH = 20
# What the sampler calls the arguments, in its messages.
_NAMES = (("remasking_temperature", "alg_temp"), ("remasking", "alg"), ("gen_length", "max_new_tokens"))


@dataclass
class DreamModelOutput(ModelOutput):
    """What `diffusion_generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: Token ids [batch, prompt + new].
        history: The same after each step, if asked for; a row whose steps are over stays as it is.
    """

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None


def diffusion_generate(
    model: DreamModel,
    inputs: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    steps: int = 512,
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg: str = "origin",
    alg_temp: float | None = None,
    num_return_sequences: int = 1,
    return_dict_in_generate: bool = False,
    output_history: bool = False,
    **unsupported: Any,
) -> Tensor | DreamModelOutput:
    """Completes prompts that are token ids, with the names and defaults of Dream's published code.

    Random numbers come from torch's global generator: `torch.manual_seed` repeats a result.

    Args:
        model: The model, quantized or not.
        inputs: Token ids [batch, length] of the prompts, left-padded to one length.
        attention_mask: [batch, length], 0 at padding; None where there is none.
        max_new_tokens: Tokens to generate per prompt; 20 if neither this nor `max_length` is given.
        max_length: The same, counted with the prompt and its padding; `max_new_tokens` comes first.
        steps: Timesteps.
        eps: The last timestep.
        temperature: 0 takes the likeliest tokens; above 0 they are drawn.
        top_p: If given, tokens are drawn from the likeliest ones that reach this probability together.
        top_k: If given, from so many.
        alg: Which positions a step commits: "origin", "maskgit_plus", "topk_margin" or "entropy"; see
            `DreamSamplerConfig.remasking`.
        alg_temp: Above 0, positions are drawn by their rank; None or 0 takes the best.
        num_return_sequences: Completions of each prompt, in rows that follow each other.
        return_dict_in_generate: Whether to return a `DreamModelOutput` instead of the token ids.
        output_history: Whether that has a history.
        **unsupported: Must be None, such as the published hooks.

    Returns:
        Token ids [batch, prompt + new], on the device of `inputs`, not cut at the end of a text.

    Raises:
        ValueError: An argument is unknown, not supported or out of range.
    """
    unknown = [name for name, value in unsupported.items() if value is not None]
    if unknown:
        known = list(inspect.signature(diffusion_generate).parameters)[1:-1]
        raise ValueError(f"diffusion_generate: unsupported arguments {', '.join(unknown)}; valid: {', '.join(known)}")
    if not isinstance(num_return_sequences, int) or num_return_sequences < 1:
        raise ValueError(f"num_return_sequences is {num_return_sequences!r}; valid: an integer of at least 1")
    attended = _attended(model, inputs, attention_mask)
    length = inputs.shape[1]
    if max_new_tokens is None:
        max_new_tokens = _DEFAULT_LENGTH if max_length is None else max_length - length
        if max_new_tokens < 1:
            raise ValueError(f"max_length is {max_length}; valid: more than the {length} tokens of inputs")
    settings = {"steps": steps, "eps": eps, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    config = _sampler(
        settings | {"gen_length": max_new_tokens, "remasking": alg, "remasking_temperature": alg_temp or 0.0}
    )

    inputs, attended = (tensor.repeat_interleave(num_return_sequences, dim=0) for tensor in (inputs, attended))
    adapter = adapter_for(model)
    mask_id, pad_id = adapter.mask_id(model.config), model.config.pad_token_id
    with_history = return_dict_in_generate and output_history
    with inference(model, adapter.block_list(model)):
        generation = sample(
            adapter.denoiser(model),
            [row[keep] for row, keep in zip(inputs, attended, strict=True)],
            config,
            mask_token_id=mask_id,
            pad_token_id=int(mask_id == 0) if pad_id is None else pad_id,  # hidden: any token but the mask token
            device=model.get_submodule(adapter.embedding).get_parameter("weight").device,
            batch_size=len(inputs),
            record=with_history,
        )
    sequences = torch.cat([inputs, generation.tokens.to(inputs)], dim=1)
    if not return_dict_in_generate:
        return sequences
    return DreamModelOutput(sequences=sequences, history=_history(inputs, generation) if with_history else None)


DreamModel.diffusion_generate = diffusion_generate


def _attended(model: DreamModel, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask as bool, after checks of both."""
    if inputs.dim() != 2 or inputs.dtype.is_floating_point or inputs.dtype == torch.bool or not len(inputs):
        raise ValueError(
            f"inputs has shape {tuple(inputs.shape)} and dtype {inputs.dtype}; valid: token ids [batch, length]"
        )
    if attention_mask is None:
        if model.config.pad_token_id is not None and bool((inputs == model.config.pad_token_id).any()):
            _LOGGER.warning("inputs holds pad_token_id %d but there is no attention_mask", model.config.pad_token_id)
        return torch.ones_like(inputs, dtype=torch.bool)
    if attention_mask.shape != inputs.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; valid: {tuple(inputs.shape)}")
    attended = attention_mask.to(inputs.device).bool()
    if bool((attended[:, :-1] & ~attended[:, 1:]).any()):
        raise ValueError("attention_mask is 0 behind a 1; valid: left padding (the tokenizer's padding_side='left')")
    return attended


def _sampler(settings: dict[str, Any]) -> DreamSamplerConfig:
    """The sampler's settings; errors name the arguments by the published names."""
    try:
        return DreamSamplerConfig(**settings)
    except ValueError as error:
        message = str(error)
        for ours, published in _NAMES:
            message = message.replace(ours, published)
        raise ValueError(message) from None


def _history(inputs: Tensor, generation: Generation) -> tuple[Tensor, ...]:
    """The token ids [batch, prompt + new] after each step: the state that the next one saw, in the end the tokens."""
    trajectory, width = generation.trajectory, generation.tokens.shape[1]
    assert trajectory is not None
    taken = generation.steps_used.tolist()

    def after(row: int, step: int) -> Tensor:
        return trajectory.state(row, step).ids[-width:] if step < taken[row] else generation.tokens[row]

    frames = (torch.stack([after(row, step) for row in range(len(inputs))]) for step in range(1, max(taken) + 1))
    return tuple(torch.cat([inputs, frame.to(inputs)], dim=1) for frame in frames)
