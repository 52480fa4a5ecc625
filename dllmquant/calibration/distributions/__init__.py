"""Distributions of calibration states, one file each; a new one is its file and one row of `DISTRIBUTIONS`."""

from dllmquant.calibration.distributions.base import Cost, Distribution, Drawn, DrawStates, Request
from dllmquant.calibration.distributions.clean import clean_states
from dllmquant.calibration.distributions.closed_loop import closed_loop_states
from dllmquant.calibration.distributions.mcs import mcs_states
from dllmquant.calibration.distributions.random_t import random_t_states
from dllmquant.calibration.distributions.trajectory import trajectory_states

DISTRIBUTIONS: dict[str, Distribution] = {
    "trajectory": Distribution(trajectory_states, prompt_per_state=False),
    "closed_loop": Distribution(closed_loop_states, prompt_per_state=False),
    "clean": Distribution(clean_states, prompt_per_state=True),
    "random_t": Distribution(random_t_states, prompt_per_state=True),
    "mcs": Distribution(mcs_states, prompt_per_state=True),
}

__all__ = [
    "DISTRIBUTIONS",
    "Cost",
    "Distribution",
    "DrawStates",
    "Drawn",
    "Request",
    "clean_states",
    "closed_loop_states",
    "mcs_states",
    "random_t_states",
    "trajectory_states",
]
