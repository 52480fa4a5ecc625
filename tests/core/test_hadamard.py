"""Hadamard matrices against their definition."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from dllmquant.core.hadamard import (
    hadamard_factors,
    hadamard_matrix,
    largest_hadamard_block,
    random_hadamard,
    random_signs,
)

# powers of two; Paley I with q = 11, 19, 139; Paley II with q = 13, 17, 73; products of a base and a power
ORDERS = [1, 2, 4, 8, 64, 256, 512, 12, 20, 28, 36, 140, 148, 24, 40, 56, 384, 640]


@pytest.mark.parametrize("order", ORDERS)
def test_entries_are_plus_or_minus_one_and_rows_orthogonal(order):
    matrix = hadamard_matrix(order).numpy()
    assert matrix.dtype == np.float64
    integers = np.round(matrix * order**0.5)
    assert np.abs(matrix * order**0.5 - integers).max() < 1e-12
    assert (np.abs(integers) == 1).all()
    assert np.array_equal(integers @ integers.T, order * np.eye(order))


@pytest.mark.parametrize("order", [2, 8, 128, 256, 512])
def test_powers_of_two_are_sylvesters(order):
    assert np.allclose(hadamard_matrix(order).numpy() * order**0.5, scipy.linalg.hadamard(order), atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_factors_multiply_to_the_matrix(order):
    factors = [factor.numpy() for factor in hadamard_factors(order)]
    assert all(np.abs(factor).min() == 1 == np.abs(factor).max() for factor in factors)
    product = np.ones((1, 1))
    for factor in factors:
        product = np.kron(product, factor)
    assert np.allclose(hadamard_matrix(order).numpy(), product / order**0.5, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "sizes"), [(12288, [12, 32, 32]), (14336, [28, 16, 32]), (18944, [148, 128]), (4096, [64, 64])]
)
def test_widths_of_real_models_have_small_factors(order, sizes):
    factors = hadamard_factors(order)
    assert [len(factor) for factor in factors] == sizes
    for factor in factors:
        assert torch.equal(factor @ factor.T, len(factor) * torch.eye(len(factor), dtype=torch.float64))


@pytest.mark.parametrize(
    ("order", "block"),
    [(11008, 256), (172, 4), (92, 4), (6, 2), (7, 1), (18, 2), (3 * 107, 1)],
    ids=str,
)
def test_orders_without_a_construction_are_errors_that_name_the_block_to_take(order, block):
    with pytest.raises(ValueError, match=rf"order {order} can.* block-diagonal ones of order {block}$"):
        hadamard_matrix(order)


def test_orders_below_one_are_errors():
    with pytest.raises(ValueError, match="n: 0"):
        hadamard_matrix(0)
    with pytest.raises(ValueError, match="n: -4"):
        largest_hadamard_block(-4)


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (2, 2), (96, 96), (12288, 12288), (18944, 18944), (11008, 256), (13696, 128), (72, 72)]
)
def test_largest_block(n, block):
    assert largest_hadamard_block(n) == block


def test_the_largest_block_is_the_largest_divisor_that_can_be_built():
    for n in range(1, 130):
        buildable = []
        for divisor in range(1, n + 1):
            if n % divisor == 0:
                try:
                    hadamard_factors(divisor)
                except ValueError:
                    continue
                buildable.append(divisor)
        assert largest_hadamard_block(n) == max(buildable)


def test_random_hadamard_flips_inputs():
    plain, signed = hadamard_matrix(24), random_hadamard(24, 3)
    signs = random_signs(24, 3)
    assert torch.equal(signed, torch.diag(signs) @ plain)
    assert torch.allclose(signed @ signed.T, torch.eye(24, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(1, 24, dtype=torch.float64)
    assert not torch.allclose((ones @ signed).abs(), (ones @ plain).abs())  # another rotation, not only other signs


def test_signs_are_fixed_by_the_seed_for_ever():
    """Checkpoints hold the seed only, so these may never change. SHAKE-256("0") begins with the bytes 7e 8b."""
    assert random_signs(12, 0).tolist() == [1, -1, -1, -1, -1, -1, -1, 1, -1, -1, 1, -1]
    assert random_signs(12, 1).tolist() != random_signs(12, 0).tolist()
    assert torch.equal(random_signs(8, 5), random_signs(30, 5)[:8])


def test_signs_are_balanced_and_differ_between_seeds():
    drawn = torch.stack([random_signs(4096, seed) for seed in range(8)])
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert drawn.mean(1).abs().max() < 0.1
    for a, b in itertools.combinations(range(8), 2):
        assert abs(float(drawn[a] @ drawn[b])) / 4096 < 0.1


def test_matrices_are_made_on_the_host_also_while_a_model_is_built_on_meta():
    with torch.device("meta"):
        assert hadamard_matrix(24).device.type == "cpu"
        assert hadamard_matrix(28).device.type == "cpu"
        assert random_signs(8, 0).device.type == "cpu"
