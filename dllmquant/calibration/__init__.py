"""Calibration states: from prompts to the sequences, and the token weights, that the statistics are made of."""

from dllmquant.calibration.cache import Recording, cache_directory, cached_trajectory, trajectory_key
from dllmquant.calibration.collect import CalibrationStates, collect_states, prompts_needed
from dllmquant.calibration.confidence import with_confidence
from dllmquant.calibration.distributions import (
    DISTRIBUTIONS,
    Cost,
    Distribution,
    Drawn,
    DrawStates,
    Request,
    clean_states,
    closed_loop_states,
    mcs_states,
    random_t_states,
    trajectory_states,
)
from dllmquant.calibration.prompts import GivenPrompts, Prompt, builtin_prompts, check_prompts, load_prompts
from dllmquant.calibration.weights import weigh_tokens

__all__ = [
    "DISTRIBUTIONS",
    "CalibrationStates",
    "Cost",
    "Distribution",
    "DrawStates",
    "Drawn",
    "GivenPrompts",
    "Prompt",
    "Recording",
    "Request",
    "builtin_prompts",
    "cache_directory",
    "cached_trajectory",
    "check_prompts",
    "clean_states",
    "closed_loop_states",
    "collect_states",
    "load_prompts",
    "mcs_states",
    "prompts_needed",
    "random_t_states",
    "trajectory_key",
    "trajectory_states",
    "weigh_tokens",
    "with_confidence",
]
