"""Decoding of masked diffusion language models: schedules, pure remasking steps, the sampling loop, its records."""

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
from dllmquant.decoding.sampler import Denoiser, Generation, SamplerConfig, sample
from dllmquant.decoding.schedule import transfer_counts
from dllmquant.decoding.trajectory import State, StateBatch, Trajectory

__all__ = [
    "Candidates",
    "Denoiser",
    "Generation",
    "SamplerConfig",
    "State",
    "StateBatch",
    "StepResult",
    "Trajectory",
    "commit_above_threshold",
    "commit_most_confident",
    "forbid",
    "guide",
    "gumbel_argmax",
    "propose",
    "sample",
    "transfer_counts",
]
