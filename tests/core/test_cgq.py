"""CGQ's weights by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmquant.core.cgq import token_weights

MASKED = torch.tensor([True, True, True, True, False, False, False])
CONFIDENCE = torch.tensor([0.0, 0.3, 0.25, 1.0, 0.0, 1.0, 0.25])


def test_numbers_by_hand() -> None:
    """(1 + 0)², (1 + √0.3)² = 2.395, (1 + 0.5)², (1 + 1)²; decoded: 0.7², and with the model's c 1.7², 1.2²."""
    masked_part = [1.0, 2.3954451, 2.25, 4.0]
    expected = torch.tensor([*masked_part, 0.49, 0.49, 0.49])
    torch.testing.assert_close(token_weights(MASKED, CONFIDENCE), expected)
    expected = torch.tensor([*masked_part, 0.49, 2.89, 1.44])
    torch.testing.assert_close(token_weights(MASKED, CONFIDENCE, decoded_confidence="model"), expected)


def test_the_order_of_importance() -> None:
    """A sure masked token leads; with "model", a decoded token (2.89) overtakes a masked one at c = 0.3 (2.40)."""
    model = token_weights(MASKED, CONFIDENCE, decoded_confidence="model")
    assert model.argmax() == 3
    assert model[5] > model[1]
    zero = token_weights(MASKED, CONFIDENCE)
    assert zero[MASKED].min() > zero[~MASKED].max()


def test_bases() -> None:
    weights = token_weights(MASKED, CONFIDENCE, masked_base=2.0, unmasked_base=0.0, decoded_confidence="model")
    torch.testing.assert_close(weights[[0, 3, 4, 5]], torch.tensor([4.0, 9.0, 0.0, 1.0]))


@given(
    masked=st.booleans(),
    confidence=st.floats(0, 1),
    bases=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    decoded=st.sampled_from(["zero", "model"]),
)
def test_formula(masked: bool, confidence: float, bases: tuple[float, float], decoded: Any) -> None:
    weight = token_weights(
        torch.tensor([[masked]]),
        torch.tensor([[confidence]], dtype=torch.float64),
        masked_base=bases[0],
        unmasked_base=bases[1],
        decoded_confidence=decoded,
    )
    c = confidence if masked or decoded == "model" else 0.0
    assert weight.item() == pytest.approx((bases[0 if masked else 1] + math.sqrt(c)) ** 2, rel=1e-5, abs=1e-12)
    assert weight.dtype == torch.float32
    assert weight.shape == (1, 1)


def test_narrow_confidence_is_widened() -> None:
    weights = token_weights(MASKED, CONFIDENCE.bfloat16())
    torch.testing.assert_close(weights, token_weights(MASKED, CONFIDENCE.bfloat16().float()))
    assert weights.dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"masked: dtype torch.int64, expected torch.bool"):
        token_weights(MASKED.long(), CONFIDENCE)
    with pytest.raises(ValueError, match=r"confidence: shape \(6,\), expected \(7,\)"):
        token_weights(MASKED, CONFIDENCE[1:])
    for bad in (-0.01, 1.01, float("nan"), -float("inf")):
        broken = CONFIDENCE.clone()
        broken[6] = bad
        with pytest.raises(ValueError, match=r"confidence: valid values lie in \[0, 1\]"):
            token_weights(MASKED, broken)
    with pytest.raises(ValueError, match=r"masked_base, unmasked_base: -1, 0.7"):
        token_weights(MASKED, CONFIDENCE, masked_base=-1)
    with pytest.raises(ValueError, match=r"masked_base, unmasked_base: 1.0, -0.1"):
        token_weights(MASKED, CONFIDENCE, unmasked_base=-0.1)
    with pytest.raises(ValueError, match="decoded_confidence: 'none' is unknown; valid: zero, model"):
        token_weights(MASKED, CONFIDENCE, decoded_confidence="none")  # type: ignore[arg-type]
