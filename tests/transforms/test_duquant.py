"""DuQuant against literal re-implementations in numpy, and on planted outliers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmquant.transforms.duquant import fit_duquant, greedy_rotation, uniform_first_row, zigzag


def planted(tokens=60, width=64, seed=0):
    """Tokens with three outlier channels, all in the first block of 16, and one massive entry."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x[:, [1, 5, 9]] *= 20
    x[7, 3] = 300
    return x


def literal_rotation(x, steps, draw):
    """One block, one matrix at a time: explicit switching matrices, every product kept, the best taken at the end."""
    size = x.shape[1]
    products, peaks = [np.eye(size)], [np.abs(x).max()]
    for _ in range(steps):
        current = x @ products[-1]
        channel = np.unravel_index(np.abs(current).argmax(), current.shape)[1]
        switch = np.eye(size)
        switch[[0, channel]] = switch[[channel, 0]]
        products.append(products[-1] @ switch @ draw() @ switch)
        peaks.append(np.abs(x @ products[-1]).max())
    return products[int(np.argmin(peaks))]


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_rotation_equals_the_literal_one(steps):
    x = planted().double()
    result = greedy_rotation(x, 16, steps, torch.Generator().manual_seed(3)).numpy()
    for block in range(4):
        generator = torch.Generator().manual_seed(3)  # a step's matrix is the same for all blocks
        columns = x[:, 16 * block : 16 * block + 16].numpy()
        expected = literal_rotation(columns, steps, lambda g=generator: uniform_first_row(16, g).numpy())
        assert np.allclose(result[block], expected, atol=1e-10)


def test_random_matrix_is_orthogonal_with_a_uniform_first_row():
    generator = torch.Generator().manual_seed(0)
    first, second = (uniform_first_row(12, generator) for _ in range(2))
    for matrix in (first, second):
        assert torch.allclose(matrix @ matrix.T, torch.eye(12, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(matrix[0], torch.full((12,), 12**-0.5, dtype=torch.float64), atol=1e-12)
    assert not torch.allclose(first, second)
    assert uniform_first_row(1, generator).tolist() == [[1.0]]


def test_random_rows_point_everywhere():
    """Uniform among the matrices with this first row: the mean of the others vanishes, entries have variance 1/size."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([uniform_first_row(6, generator)[1:] for _ in range(1500)])
    assert rows.mean(0).abs().max() < 0.06
    assert torch.allclose(rows.square().mean(0), torch.full((5, 6), 1 / 6, dtype=torch.float64), atol=0.02)


def literal_zigzag(magnitude, blocks):
    order = sorted(range(len(magnitude)), key=lambda channel: (-magnitude[channel], channel))
    dealt = [[] for _ in range(blocks)]
    place, step = 0, 1
    for channel in order:
        dealt[place].append(channel)
        if not 0 <= place + step < blocks:
            step = -step
        else:
            place += step
    return [channel for block in dealt for channel in block]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_zigzag_equals_the_literal_one(blocks, size, seed):
    magnitude = torch.randint(0, 8, (blocks * size,), generator=torch.Generator().manual_seed(seed)).float()  # has ties
    assert zigzag(magnitude, blocks).tolist() == literal_zigzag(magnitude.tolist(), blocks)


def test_zigzag_by_hand():
    assert zigzag(torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), 3).tolist() == [
        0,
        5,
        6,
        1,
        4,
        7,
        2,
        3,
        8,
    ]


def test_zigzag_evens_out_the_blocks():
    magnitude = torch.linspace(4, 0, 64).exp()  # the large channels are neighbours
    before = magnitude.view(4, 16)
    after = magnitude[zigzag(magnitude, 4)].view(4, 16)
    assert after.amax(1).var() < 0.05 * before.amax(1).var()
    assert after.mean(1).var() < 0.001 * before.mean(1).var()


def test_transform_is_rotation_permutation_rotation():
    x = planted()
    transform = fit_duquant(x, block_size=16, steps=20, seed=2)
    assert [(step.kind, step.size) for step in transform.steps] == [("block", 16), ("permute", None), ("block", 16)]
    matrix = transform.matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), atol=1e-6)
    generator = torch.Generator().manual_seed(2)
    first = torch.block_diag(*greedy_rotation(x, 16, 20, generator))
    rotated = x.double() @ first
    permutation = zigzag(rotated.abs().amax(0), 4)
    assert torch.equal(transform.get_buffer("step_1").long(), permutation)
    second = torch.block_diag(*greedy_rotation(rotated.float()[:, permutation], 16, 20, generator))
    assert torch.allclose(matrix, first[:, permutation] @ second, atol=1e-4)


def test_the_function_is_preserved():
    transform = fit_duquant(planted(), block_size=16, steps=20)
    weight = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = planted(seed=4).double()
    assert torch.allclose(transform(x) @ transform.inverse_transpose_weight(weight).T, x @ weight.T, atol=1e-9)


def test_planted_outliers_shrink_also_on_other_tokens():
    x, unseen = planted(), planted(seed=9)
    transform = fit_duquant(x, block_size=16, steps=60)
    assert transform(x).abs().max() < 0.4 * x.abs().max()
    assert transform(unseen).abs().max() < 0.6 * unseen.abs().max()
    assert transform(unseen).abs().amax(1).mean() < 0.6 * unseen.abs().amax(1).mean()  # the scale of a token


def test_no_block_gets_worse_and_more_steps_never_hurt():
    x = planted().double()
    peaks = [x.view(60, 4, 16).abs().amax((0, 2))]
    for steps in (1, 5, 30):
        rotation = greedy_rotation(x, 16, steps, torch.Generator().manual_seed(0))
        rotated = torch.einsum("ngi,gij->ngj", x.view(60, 4, 16), rotation)
        peaks.append(rotated.abs().amax((0, 2)))
        assert bool((peaks[-1] <= peaks[-2] * (1 + 1e-12)).all())
    assert bool((peaks[-1] < peaks[0]).any())


def test_a_block_that_no_step_improves_is_left_alone():
    uniform = torch.ones(3, 8)  # any rotation of a uniform token raises its peak
    transform = fit_duquant(uniform, block_size=8, steps=10)
    assert torch.equal(transform.matrix(), torch.eye(8, dtype=torch.float64))


def test_the_seed_decides():
    x = planted()
    first, again, other = (fit_duquant(x, block_size=16, steps=10, seed=seed).matrix() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_are_not_changed():
    x = planted()
    before = x.clone()
    fit_duquant(x, block_size=16, steps=3)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_samples_may_be_of_any_float_type(dtype):
    matrix = fit_duquant(planted().to(dtype), block_size=16, steps=5).matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.zeros(0, 64), {}, r"samples: shape \(0, 64\)"),
        (torch.zeros(2, 2, 64), {}, r"samples: shape \(2, 2, 64\)"),
        (torch.full((2, 64), torch.nan), {}, "finite"),
        (torch.ones(2, 64), {"block_size": 24}, "size: 24 of step block does not divide the 64"),
        (torch.ones(2, 64), {"block_size": 16, "steps": 0}, "steps: 0"),
    ],
    ids=["empty", "three dimensions", "nan", "block", "steps"],
)
def test_bad_arguments_are_errors(samples, options, message):
    with pytest.raises(ValueError, match=message):
        fit_duquant(samples, **options)
