"""What every test shares: no network, one thread, and the same random numbers whatever ran before."""

import os

# Before anything imports transformers or datasets: a test that reaches for the network fails instead.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import random

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: the first example of a property pays for warming up. Derandomized: the same examples in every run.
settings.register_profile("dllmquant", deadline=None, derandomize=True)
settings.load_profile("dllmquant")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seeds the global generators, so that a test gives the same result alone and in the suite."""
    random.seed(0)
    torch.manual_seed(0)
