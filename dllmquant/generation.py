"""Text generation with a model family's own sampler."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.decoding import Generation, UniformNoiseSamplerConfig, sample, sample_canvases
from dllmquant.models import adapter_for
from dllmquant.models.inference import inference


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Tokenizes prompts one by one, with the special tokens the tokenizer adds to a text of its own.

    Raises:
        ValueError: There is no prompt, a prompt is not a non-empty string, or `prompts` is a single string.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts: {prompts!r} is one string; give a list of strings")
    if not prompts:
        raise ValueError("prompts: empty; give at least one string")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompts[{index}]: {prompt!r} is not a non-empty string")
    rows: list[list[int]] = tokenizer(list(prompts)).input_ids
    return rows


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    seed: int = 0,
    record: bool = False,
    progress: bool = False,
    **sampler: Any,
) -> Generation:
    """Decodes prompts and returns token ids, counts of forward passes and, on request, the trajectory.

    Args:
        model: A diffusion LLM of a registered family.
        tokenizer: Its tokenizer; must have an EOS token.
        prompts: Texts of any lengths.
        batch_size: Prompts decoded together; changes the tokens at temperature 0 only through the rounding of the
            model's own arithmetic, which in 16 bits depends on the batch.
        seed: Seed of Gumbel noise and random remasking.
        record: Whether to record every denoising step.
        progress: Whether to show a progress bar.
        **sampler: Settings of the family's sampler that override the checkpoint's defaults; None keeps the default.

    Raises:
        ValueError: The model is not a registered diffusion LLM, a sampler setting is unknown or invalid, or a prompt
            is empty.
    """
    adapter_for(model).sampler_config(model.config, **sampler)  # wrong settings are found before the prompts are read
    rows = encode_prompts(tokenizer, prompts)
    options = {"batch_size": batch_size, "seed": seed, "record": record, "progress": progress, **sampler}
    return generate_from_ids(model, tokenizer, rows, **options)


def generate_from_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    seed: int = 0,
    record: bool = False,
    progress: bool = False,
    **sampler: Any,
) -> Generation:
    """Does what `generate_tokens` does with prompts that are token ids already.

    Args:
        model: A diffusion LLM of a registered family.
        tokenizer: Its tokenizer; must have an EOS token.
        rows: Token ids of each prompt; a prompt may be empty.
        batch_size: As for `generate_tokens`.
        seed: As for `generate_tokens`.
        record: As for `generate_tokens`.
        progress: As for `generate_tokens`.
        **sampler: As for `generate_tokens`.

    Raises:
        ValueError: The model is not a registered diffusion LLM, a sampler setting is unknown or invalid, there is no
            prompt, or a prompt contains the mask token.
    """
    adapter = adapter_for(model)
    config = adapter.sampler_config(model.config, **sampler)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer: it has no EOS token, so generations have no end")
    pad = tokenizer.pad_token_id
    device = next(model.get_submodule(adapter.embedding).parameters()).device
    with inference(model, adapter.block_list(model)):
        if isinstance(config, UniformNoiseSamplerConfig):
            return sample_canvases(
                adapter.refiner(model),
                rows,
                _fitting(config, model),
                vocab_size=model.get_submodule(adapter.embedding).get_parameter("weight").shape[0],
                pad_token_id=eos if pad is None else pad,
                eos_token_id=eos,
                eot_token_id=None if adapter.eot_token is None else tokenizer.get_vocab().get(adapter.eot_token),
                generator=torch.Generator().manual_seed(seed),
                device=device,
                batch_size=batch_size,
                record=record,
                progress=progress,
            )
        return sample(
            adapter.denoiser(model),
            rows,
            config,
            cached=adapter.cached_denoiser(model),
            mask_token_id=adapter.mask_id(model.config),
            pad_token_id=eos if pad is None else pad,
            eos_token_id=eos,
            eot_token_id=None if adapter.eot_token is None else tokenizer.get_vocab().get(adapter.eot_token),
            generator=torch.Generator().manual_seed(seed) if config.stochastic else None,
            device=device,
            batch_size=batch_size,
            record=record,
            progress=progress,
        )


def _fitting(config: UniformNoiseSamplerConfig, model: PreTrainedModel) -> UniformNoiseSamplerConfig:
    """Returns settings whose canvas is the model's."""
    if config.canvas_length != model.config.canvas_length:
        raise ValueError(f"canvas_length is {config.canvas_length}; valid: {model.config.canvas_length}, the model's")
    return config


def decode_completions(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> list[str]:
    """Turns generated ids into texts, cut at the first EOS or where the sampler ended them, without special tokens."""
    texts = []
    lengths = [None] * len(generation.tokens) if generation.lengths is None else generation.lengths.tolist()
    for tokens, length in zip(generation.tokens.tolist(), lengths, strict=True):
        row = tokens[:length]
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        texts.append(str(tokenizer.decode(row[:end], skip_special_tokens=True)))
    return texts


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    **options: Any,
) -> list[str]:
    """Generates a completion for every prompt with the model family's own sampler.

    Args:
        model: A diffusion LLM of a registered family, quantized or not.
        tokenizer: Its tokenizer.
        prompts: Texts of any lengths.
        **options: Sampler settings such as `steps`, `gen_length`, `block_length`, `temperature`, `cfg_scale`,
            `remasking`, `threshold`; and `batch_size`, `seed`, `progress` (see `generate_tokens`).

    Returns:
        The completions, in the order of the prompts, cut at the first EOS token.

    Raises:
        ValueError: As `generate_tokens`.
    """
    return decode_completions(tokenizer, generate_tokens(model, tokenizer, prompts, **options))
