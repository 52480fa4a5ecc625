"""TMAS (DLLMQuant, arXiv 2508.14090): states of recorded denoising runs, by trajectory segment and mask ratio."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.cache import Recording, cached_trajectory, trajectory_key
from dllmquant.calibration.distributions.base import Cost, Drawn, Request
from dllmquant.calibration.prompts import Prompt
from dllmquant.core.coverage import measure_coverage
from dllmquant.core.tmas import select_states
from dllmquant.decoding import StateBatch, Trajectory
from dllmquant.generation import encode_prompts, generate_tokens
from dllmquant.models import adapter_for


def trajectory_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], request: Request
) -> Drawn:
    """Decodes the prompts with the model's own sampler and selects states of the recorded runs; see `core.tmas`.

    Args:
        model: The model whose runs are recorded; nothing asks whether it is quantized.
        tokenizer: Its tokenizer.
        prompts: Prompts; all are decoded, completions are ignored.
        request: How many states, of which segments, and how to decode.

    Raises:
        ValueError: The runs hold fewer states than asked for, or a prompt or a sampler setting is invalid.
        OSError: The cache directory cannot be made.
    """
    trajectory, cost = record_trajectory(model, tokenizer, prompts, request)
    segments, buckets = len(request.quotas), request.mask_ratio_buckets
    selection = select_states(
        trajectory.mask_ratio,
        trajectory.valid,
        trajectory.block,
        num_states=request.num_states,
        quotas=request.quotas,
        mask_ratio_buckets=buckets,
        generator=torch.Generator().manual_seed(request.seed),
    )
    batch = trajectory.states([(state.trajectory, state.step) for state in selection.states])
    adapter = adapter_for(model)
    if adapter.attention == "block_causal":
        config = adapter.sampler_config(model.config, **request.sampler)
        batch = without_later_blocks(batch, config.block_length, trajectory.pad_token_id)
    coverage = measure_coverage(
        batch.mask,
        batch.attention_mask,
        batch.mask_ratio,
        torch.tensor(selection.segments),
        segments=segments,
        buckets=buckets,
        recorded=selection.recorded,
    )
    length = batch.ids.shape[1]
    prompts_of = torch.tensor([state.trajectory for state in selection.states])
    steps_of = torch.tensor([state.step for state in selection.states])
    tail = behind_the_end(trajectory, tokenizer.eos_token_id)[prompts_of, -length:]
    waiting = None  # a canvas of noise has no blocks
    if adapter.mask_token_id is not None:
        waiting = in_later_blocks(trajectory)[prompts_of, steps_of, -length:] & batch.mask
    notes = (*selection.notes, *coverage.notes(request.quotas))
    return Drawn(batch, coverage, cost, notes, tail, waiting)


def without_later_blocks(batch: StateBatch, block_length: int, pad_token_id: int) -> StateBatch:
    """Returns states of a block-causal model that end with the block being decoded: the rest becomes padding.

    Nothing attends to later blocks, and decoding never computes them; their mask tokens would only fill the statistics.

    Args:
        batch: States, each with a masked token; blocks are counted from a row's first real token.
        block_length: Tokens per block.
        pad_token_id: What takes their place.
    """
    block = (batch.attention_mask.cumsum(1) - 1).clamp(min=0) // block_length
    current = block.gather(1, batch.mask.to(torch.int8).argmax(1, keepdim=True))  # of the first masked token
    later = block > current
    return replace(
        batch,
        ids=batch.ids.masked_fill(later, pad_token_id),
        attention_mask=batch.attention_mask & ~later,
        mask=batch.mask & ~later,
        confidence=batch.confidence.masked_fill(later, 0.0),
        committed=batch.committed & ~later,
    )


def behind_the_end(trajectory: Trajectory, eos_token_id: int | None) -> Tensor:
    """Returns which positions of each prompt's generation come after its first EOS, bool [prompts, L].

    That is the EOS of the last recorded state; what the last step commits is not part of it.
    """
    last = trajectory.ids[torch.arange(trajectory.num_prompts), trajectory.num_steps - 1]
    generated = torch.arange(last.shape[1]) >= last.shape[1] - trajectory.gen_length
    ends = (last == (-1 if eos_token_id is None else eos_token_id)) & generated
    return ends.cumsum(1) - ends.to(torch.int64) > 0


def in_later_blocks(trajectory: Trajectory) -> Tensor:
    """Returns which masked positions of every state only a later block commits, bool [prompts, steps, L].

    The block of a position is that of the step which commits it; a masked position that no recorded step commits counts
    as one of a later block. A step that decodes block b cannot commit what lies behind b.
    """
    blocks = torch.where(trajectory.valid, trajectory.block, -1)
    last = int(blocks.max()) + 1
    own = torch.where(trajectory.committed, blocks[..., None], -1).amax(1)  # [prompts, L]; each is committed once
    own = torch.where(own < 0, last, own)
    later: Tensor = trajectory.mask & (own[:, None, :] > blocks[..., None])
    return later


def record_trajectory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], request: Request
) -> tuple[Trajectory, Cost]:
    """Decodes the prompts and records every state, or reads the record of the same runs from the cache.

    Raises:
        ValueError: A prompt or a sampler setting is invalid.
        OSError: The cache directory cannot be made.
    """
    start = time.perf_counter()
    texts = [prompt if isinstance(prompt, str) else prompt[0] for prompt in prompts]
    adapter = adapter_for(model)
    config = adapter.sampler_config(model.config, **request.sampler)
    recorded = False

    def record() -> Recording:
        nonlocal recorded
        recorded = True
        generation = generate_tokens(
            model,
            tokenizer,
            texts,
            batch_size=request.batch_size,
            seed=request.seed,
            record=True,
            progress=request.progress,
            **request.sampler,
        )
        assert generation.trajectory is not None
        return Recording(generation.trajectory, generation.forward_passes)

    if request.cache is None:
        recording = record()
    else:
        key = trajectory_key(
            model,
            encode_prompts(tokenizer, texts),
            config,
            seed=request.seed,
            batch_size=request.batch_size,
            # Whatever else of model and tokenizer the sampler reads.
            special_ids={
                "mask": None if adapter.mask_token_id is None else adapter.mask_id(model.config),
                "pad": tokenizer.pad_token_id,
                "eos": tokenizer.eos_token_id,
                "eot": None if adapter.eot_token is None else tokenizer.get_vocab().get(adapter.eot_token),
            },
        )
        recording = cached_trajectory(request.cache, key, record)
    trajectory = recording.trajectory
    calls = 2 if getattr(config, "cfg_scale", 0.0) > 0 else 1  # of the model, at every step
    lengths = trajectory.prompt_lengths + trajectory.gen_length
    cost = Cost(
        prompts=len(texts),
        forward_passes=recording.forward_passes,
        sequences=calls * len(trajectory),
        tokens=calls * int((trajectory.num_steps * lengths).sum()),
        seconds=time.perf_counter() - start,
        cached=not recorded,
    )
    return trajectory, cost
