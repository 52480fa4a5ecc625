"""Decoding of masked diffusion language models: schedules, pure steps, the samplers' loops, their records."""

from dllmquant.decoding.block_diffusion import commit_in_block, frontier
from dllmquant.decoding.canvas import CachedDenoiser, CachedStep, Denoiser, Generation
from dllmquant.decoding.config import (
    AnySamplerConfig,
    BlockDiffusionSamplerConfig,
    BlockOrder,
    DreamSamplerConfig,
    Ranking,
    SamplerConfig,
    UniformNoiseSamplerConfig,
)
from dllmquant.decoding.ranking import certainty, draw_tokens, propose_ranked, restrict
from dllmquant.decoding.remasking import (
    Candidates,
    StepResult,
    commit_above_threshold,
    commit_dynamic,
    commit_most_confident,
    forbid,
    guide,
    gumbel_argmax,
    propose,
)
from dllmquant.decoding.sampler import greedy_candidates, sample
from dllmquant.decoding.schedule import transfer_counts, transfer_fractions
from dllmquant.decoding.trajectory import State, StateBatch, Trajectory
from dllmquant.decoding.uniform_noise import Refiner, sample_canvases

__all__ = [
    "AnySamplerConfig",
    "BlockDiffusionSamplerConfig",
    "BlockOrder",
    "CachedDenoiser",
    "CachedStep",
    "Candidates",
    "Denoiser",
    "DreamSamplerConfig",
    "Generation",
    "Ranking",
    "Refiner",
    "SamplerConfig",
    "State",
    "StateBatch",
    "StepResult",
    "Trajectory",
    "UniformNoiseSamplerConfig",
    "certainty",
    "commit_above_threshold",
    "commit_dynamic",
    "commit_in_block",
    "commit_most_confident",
    "draw_tokens",
    "forbid",
    "frontier",
    "greedy_candidates",
    "guide",
    "gumbel_argmax",
    "propose",
    "propose_ranked",
    "restrict",
    "sample",
    "sample_canvases",
    "transfer_counts",
    "transfer_fractions",
]
