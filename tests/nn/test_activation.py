"""Dynamic activation quantization against a loop over single groups in float64."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmquant.nn.activation import ActivationScheme, quantize_activation

SCHEMES = [
    pytest.param(ActivationScheme(bits, group_size, symmetric), id=f"{bits}-{group_size}-{symmetric}")
    for bits in (2, 4, 5, 8)
    for group_size in (None, 1, 4, 12)
    for symmetric in (True, False)
]
SCHEMES += [
    pytest.param(ActivationScheme(bits, group_size, full_range=True), id=f"{bits}-{group_size}-full")
    for bits in (2, 4, 8)
    for group_size in (None, 4)
]


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x**3).to(dtype)


def reference(x: Tensor, scheme: ActivationScheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Restored values, steps, and distances from a rounding tie (in steps), one group at a time."""
    flat = x.double().reshape(-1, scheme.group_size or x.shape[-1]).numpy()
    restored, steps, margins = np.zeros_like(flat), np.zeros_like(flat), np.ones_like(flat)
    for index, group in enumerate(flat):
        if not group.any():
            continue
        if scheme.symmetric:
            step = np.abs(group).max() / (2 ** (scheme.bits - 1) - (0.5 if scheme.full_range else 1))
            zero = 0.0
        else:
            low, high = min(group.min(), 0.0), max(group.max(), 0.0)
            step = (high - low) / (2**scheme.bits - 1)
            zero = float(np.rint(-low / step))
        lowest = (0 if scheme.full_range else 1) - 2 ** (scheme.bits - 1) if scheme.symmetric else 0
        highest = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1
        codes = np.clip(np.rint(group / step) + zero, lowest, highest)
        restored[index], steps[index] = (codes - zero) * step, step
        margins[index] = np.abs(group / step - np.floor(group / step) - 0.5)
    shape = tuple(x.shape)
    return restored.reshape(shape), steps.reshape(shape), margins.reshape(shape)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_float64_group_by_group(scheme: ActivationScheme) -> None:
    x = tokens(3, 5, 12)
    x[0, 0] = x[0, 0].abs() + 0.1  # one-sided tokens: the range still holds 0
    x[0, 1] = -x[0, 1].abs() - 0.1
    x[1, 2, :4] = 0
    x[2, 4] = 0
    expected, _, _ = reference(x, scheme)
    np.testing.assert_allclose(quantize_activation(x, scheme).numpy(), expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_narrow_tokens_are_rounded_in_float32(scheme: ActivationScheme, dtype: torch.dtype) -> None:
    """Away from ties the result is the float64 one, rounded once to the tokens' own type."""
    x = tokens(40, 12, seed=1, dtype=dtype)
    result = quantize_activation(x, scheme)
    assert result.dtype == dtype
    assert result.shape == x.shape
    expected, steps, margins = reference(x, scheme)
    clear = margins > 1e-4
    assert clear.mean() > (0.7 if scheme.full_range else 0.9)  # a group's largest is a tie where the range is full
    expected, steps = expected[clear], steps[clear]
    error = np.abs(result.double().numpy()[clear] - expected)
    precision = max(1e-6, 1.001 * torch.finfo(dtype).eps / 2)
    assert (error <= precision * np.abs(expected) + 1e-6 * steps).all()


def test_by_hand() -> None:
    x = torch.tensor([[7.0, -3.4, 0.6, 0.4, 14.0, -3.0, 3.0, 1.0]])
    per_token = quantize_activation(
        x, ActivationScheme(4)
    )  # scale 14 / 7 = 2; 3.5 → 4 and ±1.5 → ±2 (to even), 0.5 → 0
    assert per_token.tolist() == [[8.0, -4.0, 0.0, 0.0, 14.0, -4.0, 4.0, 0.0]]
    per_group = quantize_activation(x, ActivationScheme(4, 4))  # scales 1 and 2
    assert per_group.tolist() == [[7.0, -3.0, 1.0, 0.0, 14.0, -4.0, 4.0, 0.0]]
    asymmetric = quantize_activation(torch.tensor([[-1.0, 0.4, 1.2, 2.0]]), ActivationScheme(2, None, False))
    assert asymmetric.tolist() == [[-1.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_and_groups_do_not_see_each_other(symmetric: bool) -> None:
    x = tokens(4, 12, seed=2)
    for scheme, outlier, same in (
        (ActivationScheme(4, None, symmetric), (1, slice(None)), (slice(2, None), slice(None))),
        (ActivationScheme(4, 4, symmetric), (1, slice(4)), (1, slice(4, None))),
    ):
        before = quantize_activation(x, scheme)
        changed = x.clone()
        changed[outlier] *= 1e6
        assert torch.equal(quantize_activation(changed, scheme)[same], before[same])
    alone = torch.stack([quantize_activation(token, ActivationScheme(4, 4, symmetric)) for token in x])
    assert torch.equal(alone, quantize_activation(x, ActivationScheme(4, 4, symmetric)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_tokens_stay_zero(scheme: ActivationScheme, dtype: torch.dtype) -> None:
    assert bool((quantize_activation(torch.zeros(2, 12, dtype=dtype), scheme) == 0).all())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 2, 6]),
    symmetric=st.booleans(),
    magnitude=st.floats(-30, 30),
    seed=st.integers(0, 999),
)
def test_error_is_at_most_half_a_step(
    bits: int, group_size: int | None, symmetric: bool, magnitude: float, seed: int
) -> None:
    """Up to one step at the ends of an asymmetric range, whose zero point is rounded; and twice is as good as once."""
    scheme = ActivationScheme(bits, group_size, symmetric)
    x = (tokens(3, 6, seed=seed) * 10**magnitude).float()
    result = quantize_activation(x, scheme)
    _, steps, _ = reference(x, scheme)
    error = (result.double() - x.double()).abs().numpy()
    assert (error <= (0.5 if symmetric else 1.0) * steps * (1 + 1e-4)).all()
    if symmetric:
        torch.testing.assert_close(quantize_activation(result, scheme), result, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_that_is_not_finite_becomes_nan_and_no_other(symmetric: bool, bad: float) -> None:
    """Never a plausible number: the broken token is visible downstream."""
    x = tokens(3, 12, seed=3).float()
    clean = quantize_activation(x, ActivationScheme(8, None, symmetric))
    x[1, 4] = bad
    result = quantize_activation(x, ActivationScheme(8, None, symmetric))
    assert bool(result[1].isnan().all())
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


@settings(max_examples=40, deadline=None)
@given(
    group_bits=st.lists(st.integers(2, 8), min_size=1, max_size=5),
    size=st.integers(1, 6),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_groups_of_several_widths_are_each_quantized_to_theirs(
    group_bits: list[int], size: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    x = tokens(2, 3, size * len(group_bits), seed=seed, dtype=dtype)
    scheme = ActivationScheme(4, size, symmetric, tuple(group_bits))
    alone = [
        quantize_activation(part, ActivationScheme(bits, None, symmetric))
        for part, bits in zip(x.split(size, dim=-1), group_bits, strict=True)
    ]
    result = quantize_activation(x, scheme)
    assert result.dtype == dtype
    assert torch.equal(result, torch.cat(alone, dim=-1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_mixed_groups_that_are_not_finite_become_nan(symmetric: bool) -> None:
    x = tokens(3, 12, seed=3).float()
    x[1, 4], x[2, 0] = float("nan"), float("inf")
    result = quantize_activation(x, ActivationScheme(8, 4, symmetric, (8, 2, 4)))
    broken = torch.zeros(3, 12, dtype=torch.bool)
    broken[1, 4:8] = broken[2, :4] = True
    assert torch.equal(result.isnan(), broken)


def test_errors_of_several_widths() -> None:
    with pytest.raises(ValueError, match="group_bits: given without a group_size"):
        ActivationScheme(4, None, True, (4, 8))
    for bits in (1, 9, 16, 4.0):
        with pytest.raises(ValueError, match=f"group_bits: {bits}; valid: 2 to 8"):
            ActivationScheme(4, 4, True, (8, bits))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_bits: 2 widths; valid: 3, one per group"):
        quantize_activation(tokens(2, 12), ActivationScheme(4, 4, True, (4, 8)))
    from_json = ActivationScheme(**json.loads(json.dumps(dataclasses.asdict(ActivationScheme(4, 4, True, (4, 8))))))
    assert from_json == ActivationScheme(4, 4, True, (4, 8))
    assert hash(from_json) == hash(ActivationScheme(4, 4, True, (4, 8)))


def test_errors() -> None:
    for bits in (0, 1, 9, 16):
        with pytest.raises(ValueError, match=f"bits: {bits}; valid: 2 to 8"):
            ActivationScheme(bits)
    with pytest.raises(ValueError, match="group_size: 0; valid: a positive integer or None"):
        ActivationScheme(4, 0)
    with pytest.raises(ValueError, match="full_range: True on an asymmetric grid"):
        ActivationScheme(8, symmetric=False, full_range=True)
    with pytest.raises(ValueError, match="group_size: 5 does not divide the 12 features"):
        quantize_activation(tokens(2, 12), ActivationScheme(4, 5))


def test_defaults_are_symmetric_per_token() -> None:
    fields: dict[str, Any] = {"bits": 4, "group_size": None, "symmetric": True}
    assert ActivationScheme(4) == ActivationScheme(**fields)
