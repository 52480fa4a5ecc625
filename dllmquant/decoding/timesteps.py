"""Decoding along timesteps: Dream's ``diffusion_generate`` (Dream 7B, arXiv 2508.15487; also DiffuCoder's).

All masked positions compete at every step; there are no blocks. Between the times t and s = t − (1 − eps) / steps a
step commits the share 1 − s/t of the masked positions: as many of the best ranked, rounded down, or with "origin" each
with that probability; the last step commits all that are left.

Deviations from the published code, besides those of :mod:`dllmquant.decoding.ranking` and those that all samplers share
(:mod:`dllmquant.decoding.sampler`):

1. Steps at which a prompt commits nothing are skipped, and so is the forward pass if no prompt of the batch commits
   anything: the published code computes and discards them. With as many steps as tokens the very first is one, and with
   "origin" about a third are.
2. Numbers of tokens are counted per prompt, where the published code averages over the batch; the two agree, because
   all its rows hold equally many masks.
"""

import torch
from torch import Tensor

from dllmquant.decoding.canvas import Canvas, View
from dllmquant.decoding.config import DreamSamplerConfig
from dllmquant.decoding.ranking import propose_ranked
from dllmquant.decoding.remasking import Candidates, commit_most_confident
from dllmquant.decoding.schedule import transfer_fractions


def decode_timesteps(canvas: Canvas, config: DreamSamplerConfig) -> None:
    """Decode a batch to its end."""
    window = canvas.window
    for fraction in transfer_fractions(config.steps, config.eps).to(canvas.job.device):
        mask = canvas.mask
        if config.remasking == "origin":
            noise = _origin_noise(canvas, mask)
            counts = (noise < fraction).sum(dim=1)
        else:
            noise = None
            counts = (mask.sum(dim=1) * fraction).to(torch.int64)
        view = canvas.view(counts > 0)
        if not view.rows.numel():
            continue
        candidates = _candidates(canvas, view, config, None if noise is None else noise[view.rows][view.mask])
        result = commit_most_confident(view.ids[:, window], candidates, counts[view.rows])
        canvas.commit(view, result, torch.zeros_like(view.rows))


def _origin_noise(canvas: Canvas, mask: Tensor) -> Tensor:
    """A random number in [0, 1) for every masked position, infinity elsewhere: float64 ``[B, L]``."""
    noise = torch.full(mask.shape, torch.inf, dtype=torch.float64, device=mask.device)
    noise[mask] = canvas.uniform(torch.arange(len(mask)), mask.sum(dim=1))
    return noise


def _candidates(canvas: Canvas, view: View, config: DreamSamplerConfig, noise: Tensor | None) -> Candidates:
    """Candidates of the masked positions; with "origin", ``noise`` are their random numbers."""
    mask = view.mask[:, canvas.window]
    masked = mask.sum(dim=1)
    logits = canvas.logits(view)
    uniform = canvas.uniform(view.rows, masked) if config.temperature > 0 else None
    if config.remasking_temperature > 0:
        noise = canvas.uniform(view.rows, masked)
    return propose_ranked(
        logits,
        mask,
        config.remasking,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        uniform=uniform,
        ranking_temperature=config.remasking_temperature,
        noise=noise,
    )
