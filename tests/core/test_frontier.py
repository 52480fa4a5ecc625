"""Frontier weights against their definition, token by token."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmquant.core.frontier import frontier_weights


@given(st.integers(0, 10_000), st.tuples(*[st.floats(0, 3, width=32)] * 3).filter(lambda c: max(c) > 0))
def test_is_the_sum_of_its_terms(seed: int, coefficients: tuple[float, float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(3, 7, generator=generator) < 0.6
    committed = masked & (torch.rand(3, 7, generator=generator) < 0.4)
    confidence = torch.rand(3, 7, generator=generator)
    context, frontier, reliability = coefficients
    got = frontier_weights(masked, committed, confidence, context=context, frontier=frontier, reliability=reliability)
    for row in range(3):
        for column in range(7):
            expected = context
            if committed[row, column]:
                expected += frontier
            if masked[row, column]:
                expected += reliability * float(confidence[row, column])
            assert float(got[row, column]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_frontier_outweighs_what_is_masked_and_that_outweighs_text() -> None:
    masked = torch.tensor([True, True, False])
    committed = torch.tensor([True, False, False])
    text, waiting, frontier = frontier_weights(masked, committed, torch.full((3,), 0.5)).flip(0).tolist()
    assert text < waiting < frontier


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masked": torch.ones(2)}, "masked: dtype"),
        ({"committed": torch.ones(3, dtype=torch.bool)}, "committed: shape"),
        ({"confidence": torch.tensor([0.5, 1.5])}, "confidence: valid values"),
        ({"confidence": torch.tensor([0.5, float("nan")])}, "confidence: valid values"),
        ({"masked": torch.zeros(2, dtype=torch.bool)}, "not masked"),
        ({"context": -1.0}, "not negative"),
        ({"context": 0.0, "frontier": 0.0, "reliability": 0.0}, "not all zero"),
    ],
)
def test_refuses_what_has_no_meaning(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "masked": torch.ones(2, dtype=torch.bool),
        "committed": torch.ones(2, dtype=torch.bool),
        "confidence": torch.full((2,), 0.5),
    }
    with pytest.raises(ValueError, match=message):
        frontier_weights(**(arguments | change))
