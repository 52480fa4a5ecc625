"""The online Hadamard rotation."""

import pytest
import torch

from dllmquant.core.hadamard import hadamard_matrix, random_hadamard
from dllmquant.transforms.hadamard import fit_hadamard


@pytest.mark.parametrize(
    ("width", "block_size", "size"), [(48, None, 48), (44, 4, 4), (172, None, 4), (64, 16, 16), (11008, None, 256)]
)
def test_the_block_is_as_asked_or_the_largest(width, block_size, size):
    transform = fit_hadamard(width, block_size=block_size)
    (step,) = transform.steps
    assert (step.kind, step.size, step.seed) == ("hadamard", size, None)
    x = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (x.view(2, -1, size) @ hadamard_matrix(size)).flatten(1)
    assert torch.allclose(transform(x), expected, atol=1e-10)


def test_seeds_give_quarots_randomized_hadamard():
    assert torch.allclose(fit_hadamard(24, seed=5).matrix(), random_hadamard(24, 5), atol=1e-12)
    assert not torch.allclose(fit_hadamard(24, seed=5).matrix(), fit_hadamard(24, seed=6).matrix())


def test_an_outlier_channel_is_spread_over_all():
    x = torch.zeros(1, 384)
    x[0, 17] = 100.0
    assert torch.allclose(fit_hadamard(384)(x).abs(), torch.full((1, 384), 100 / 384**0.5), rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "block_size", "message"),
    [(24, 16, "does not divide"), (24, 6, "order 6"), (7, None, "in_features: 7"), (24, 1, "block_size: 1")],
)
def test_impossible_blocks_are_errors(width, block_size, message):
    with pytest.raises(ValueError, match=message):
        fit_hadamard(width, block_size=block_size)
