"""Decoding of masked diffusion language models, whatever the sampler: prompts in, generations and trajectories out.

Deviations from the published samplers that all of them share here:

1. The mask token is never a candidate: its logit is set to ``-inf`` after guidance, so it has no share in any
   confidence either. The published code can "commit" a mask token, which wastes the step and leaves a hole.
2. Prompts of different lengths are left-padded and the padding is hidden by the attention mask. Models with relative
   positions (RoPE) see exactly what they would see without padding.
3. Random numbers come from one stream per prompt, seeded in prompt order from the given generator, so that the batch
   size does not change them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dllmquant.decoding.block_diffusion import decode_block_diffusion, propose_in_block
from dllmquant.decoding.blocks import decode_blocks
from dllmquant.decoding.canvas import CachedDenoiser, Canvas, Denoiser, Generation, Job
from dllmquant.decoding.config import (
    AnySamplerConfig,
    BlockDiffusionSamplerConfig,
    DreamSamplerConfig,
    SamplerConfig,
    UniformNoiseSamplerConfig,
)
from dllmquant.decoding.prompts import check_token_ids, required_eos, token_rows
from dllmquant.decoding.ranking import propose_ranked
from dllmquant.decoding.remasking import Candidates, propose
from dllmquant.decoding.timesteps import decode_timesteps
from dllmquant.decoding.trajectory import Trajectory

__all__ = ["Denoiser", "Generation", "SamplerConfig", "greedy_candidates", "sample"]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int] | Tensor],
    config: AnySamplerConfig,
    *,
    cached: CachedDenoiser | None = None,
    mask_token_id: int,
    pad_token_id: int,
    eos_token_id: int | None = None,
    eot_token_id: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    record: bool = False,
    progress: bool = False,
) -> Generation:
    """Generate a continuation of every prompt.

    The result does not depend on ``batch_size`` as long as the denoiser computes each row independently of the others
    and of left padding (to the rounding of its own arithmetic); where ``config.stochastic`` is False no random number
    is drawn and ``generator`` is not touched.

    Args:
        denoiser: The model, ``(ids int64 [B, L], attention_mask bool [B, L]) -> logits [B, L, V]`` in any floating
            dtype, aligned so that ``logits[:, j]`` predicts position ``j``. Called without gradients; its output is
            not changed in place.
        prompts: Token ids, one sequence or one-dimensional integer tensor per prompt; a prompt may be empty.
        config: How to decode; its class says by which sampler.
        cached: The same model with a cache, if it has one: block diffusion then shows it what changes, and the result
            is the same to the rounding of its arithmetic. Not used by other samplers, and not if ``record``: the
            confidences of a record are those of whole canvases.
        mask_token_id: The mask token. It may not occur in a prompt and is never generated.
        pad_token_id: Fills left padding; any token but the mask token.
        eos_token_id: Needed by ``logits_eos_inf`` and ``confidence_eos_eot_inf``. Ends a generation in block diffusion.
        eot_token_id: If given, deferred together with EOS by ``confidence_eos_eot_inf``, and ends a generation like it
            where EOS is given.
        generator: Source of the seeds of the prompts' random streams; torch's global generator if not given.
        device: Where the denoiser expects its inputs; the CPU if not given.
        batch_size: Prompts decoded together, at least 1. Prompts of like lengths go together unless ``record``.
        record: Whether to keep every state, for calibration. Confidences are then computed at prompt positions too.
        progress: Whether to show a progress bar that counts committed tokens.

    Returns:
        The generated tokens, with the trajectory if ``record``.

    Raises:
        ValueError: If a prompt or a token id is not as above, an option needs a token id that is not given, or the
            denoiser returns logits of the wrong shape or dtype, or logits that give no finite confidence (NaN).
    """
    device = torch.device("cpu" if device is None else device)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; valid: an integer of at least 1")
    if isinstance(config, UniformNoiseSamplerConfig):
        raise ValueError(f"config is {config}; valid: a sampler with a mask token (for this one: sample_canvases)")
    check_token_ids(mask_token_id, pad_token_id, eos_token_id, eot_token_id)
    rows = token_rows(prompts, mask_token_id)
    forbidden = (mask_token_id, *required_eos(config.logits_eos_inf, "logits_eos_inf", eos_token_id))
    deferred = (
        *required_eos(config.confidence_eos_eot_inf, "confidence_eos_eot_inf", eos_token_id),
        *((eot_token_id,) if config.confidence_eos_eot_inf and eot_token_id is not None else ()),
    )
    streams = random_streams(len(rows), generator, device) if config.stochastic else [None] * len(rows)
    in_blocks = isinstance(config, BlockDiffusionSamplerConfig)
    ends = (eos_token_id, eot_token_id) if in_blocks and eos_token_id is not None else ()
    order = list(range(len(rows)))
    if not record:
        order.sort(key=lambda index: rows[index].numel())  # prompts of like lengths need little padding
    place = torch.tensor(order).argsort()
    parts: list[Generation] = []
    with tqdm(total=len(rows) * config.gen_length, unit="token", disable=not progress) as bar:
        job = Job(
            denoiser=denoiser,
            cached=cached if in_blocks and not record else None,
            gen_length=config.gen_length,
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            forbidden=forbidden,
            deferred=deferred,
            ends=tuple(token for token in ends if token is not None),
            device=device,
            record=record,
            on_commit=bar.update,
        )
        for batch in (order[start : start + batch_size] for start in range(0, len(rows), batch_size)):
            canvas = Canvas(job, [rows[index] for index in batch], [streams[index] for index in batch])
            if isinstance(config, DreamSamplerConfig):
                decode_timesteps(canvas, config)
            elif isinstance(config, BlockDiffusionSamplerConfig):
                decode_block_diffusion(canvas, config)
            else:
                decode_blocks(canvas, config)
            parts.append(canvas.generation())
    recorded = [part.trajectory for part in parts if part.trajectory is not None]
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return Generation(
        tokens=torch.cat([part.tokens for part in parts])[place],
        forward_passes=sum(part.forward_passes for part in parts),
        steps_used=torch.cat([part.steps_used for part in parts])[place],
        trajectory=Trajectory.merge(recorded) if record else None,
        lengths=torch.cat(lengths)[place] if lengths else None,
    )


def greedy_candidates(
    logits: Tensor, mask: Tensor, active: Tensor, config: AnySamplerConfig, *, deferred: Sequence[int] = ()
) -> Candidates:
    """What a sampler that draws no random numbers would write at given states, and in which order.

    Args:
        logits: Floating tensor ``[B, L, V]``, guided and without forbidden tokens.
        mask: bool ``[B, L]``, True where the state still holds the mask token.
        active: bool ``[B, L]``, True inside the block that each row is decoding; in block diffusion what
            :func:`dllmquant.decoding.block_diffusion.frontier` says is eligible.
        config: The sampler; ``config.stochastic`` must be False.
        deferred: Tokens that are committed last.

    Raises:
        ValueError: If the sampler draws random numbers, or the shapes do not match.
    """
    if config.stochastic:
        raise ValueError(f"config is {config}; valid: a sampler that draws no random numbers")
    if isinstance(config, DreamSamplerConfig):
        return propose_ranked(logits, mask & active, config.remasking, top_p=config.top_p, top_k=config.top_k)
    if isinstance(config, BlockDiffusionSamplerConfig):
        return propose_in_block(logits, mask & active, config)
    return propose(logits, mask, active, deferred=deferred)


def random_streams(count: int, generator: torch.Generator | None, device: torch.device) -> list[torch.Generator]:
    """One generator per prompt on the sampling device, seeded in prompt order."""
    source = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=source)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
