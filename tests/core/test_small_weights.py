"""Weights far below 1 keep their relative precision, and defaults of torch do not leak into results."""

import pytest
import torch

from dllmquant.core.cgq import token_weights
from dllmquant.core.grid import Grid
from dllmquant.core.rtn import rtn
from dllmquant.core.tmas import select_states


@pytest.mark.parametrize("magnitude", [1e-3, 3e-4])
def test_small_weights_keep_their_relative_precision(magnitude: float) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

    def relative_error(scaled: torch.Tensor) -> float:
        return float((rtn(scaled, Grid(8, 32, False)).dequantize() - scaled).norm() / scaled.norm())

    assert relative_error(weight * magnitude) < 1.1 * relative_error(weight)


def test_token_weights_do_not_depend_on_the_default_dtype() -> None:
    masked, confidence = torch.tensor([True, False]), torch.tensor([0.3, 0.5], dtype=torch.float32)
    expected = token_weights(masked, confidence)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(token_weights(masked, confidence), expected)
    finally:
        torch.set_default_dtype(default)


def test_bits_are_integers() -> None:
    with pytest.raises(ValueError, match=r"bits: 4\.0 is not supported"):
        Grid(4.0, 4, True)  # type: ignore[arg-type]


def test_blocks_may_be_shared_by_the_prompts() -> None:
    ratio = torch.linspace(1, 0.1, 8).repeat(3, 1)
    valid, block = torch.ones(3, 8, dtype=torch.bool), torch.arange(8) // 4
    shared, spelled = (
        select_states(ratio, valid, b, num_states=6, generator=torch.Generator().manual_seed(0))
        for b in (block, block.repeat(3, 1))
    )
    assert shared == spelled
