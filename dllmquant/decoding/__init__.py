"""Decoding of masked diffusion language models: schedules, pure steps, the samplers' loops, their records."""

from dllmquant.decoding.canvas import Denoiser, Generation
from dllmquant.decoding.config import AnySamplerConfig, DreamSamplerConfig, Ranking, SamplerConfig
from dllmquant.decoding.ranking import certainty, draw_tokens, propose_ranked, restrict
from dllmquant.decoding.remasking import (
    Candidates,
    StepResult,
    commit_above_threshold,
    commit_most_confident,
    forbid,
    guide,
    gumbel_argmax,
    propose,
)
from dllmquant.decoding.sampler import greedy_candidates, sample
from dllmquant.decoding.schedule import transfer_counts, transfer_fractions
from dllmquant.decoding.trajectory import State, StateBatch, Trajectory

__all__ = [
    "AnySamplerConfig",
    "Candidates",
    "Denoiser",
    "DreamSamplerConfig",
    "Generation",
    "Ranking",
    "SamplerConfig",
    "State",
    "StateBatch",
    "StepResult",
    "Trajectory",
    "certainty",
    "commit_above_threshold",
    "commit_most_confident",
    "draw_tokens",
    "forbid",
    "greedy_candidates",
    "guide",
    "gumbel_argmax",
    "propose",
    "propose_ranked",
    "restrict",
    "sample",
    "transfer_counts",
    "transfer_fractions",
]
