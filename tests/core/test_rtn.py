"""Round to nearest against the rounding of the float64 oracle."""

from typing import Any

import numpy as np
import pytest
import torch

from dllmquant.core.grid import Grid
from dllmquant.core.rtn import rtn
from tests.oracles import obs


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 4), (3, 6), (4, None), (8, 12)])
def test_equals_the_oracle(bits: int, group_size: int | None, symmetric: bool, clip: Any) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    importance = torch.rand(12, generator=generator, dtype=torch.float64)
    quantized = rtn(weight, Grid(bits, group_size, symmetric), clip=clip, importance=importance)
    width = group_size or 12
    for row in range(4):
        for group in range(12 // width):
            part = slice(group * width, (group + 1) * width)
            values = weight[row, part].numpy()
            scale, zero = obs.fit(values, bits, symmetric, clip, importance[part].numpy())
            assert float(quantized.scale[row, group]) == scale
            assert float(quantized.zero[row, group]) == zero
            np.testing.assert_array_equal(quantized.codes[row, part].numpy(), obs.snap(values, scale, zero, bits))


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mixed_widths_equal_the_oracle(symmetric: bool, clip: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    importance = torch.rand(12, generator=generator, dtype=torch.float64)
    group_bits = (3, 1, 2, 1, 8, 4)
    quantized = rtn(weight, Grid(2, 2, symmetric, group_bits), clip=clip, importance=importance)
    for row in range(4):
        for group, bits in enumerate(group_bits):
            part = slice(group * 2, (group + 1) * 2)
            values = weight[row, part].numpy()
            scale, zero = obs.fit(values, bits, symmetric, clip, importance[part].numpy())
            assert float(quantized.scale[row, group]) == scale
            assert float(quantized.zero[row, group]) == zero
            np.testing.assert_array_equal(quantized.codes[row, part].numpy(), obs.snap(values, scale, zero, bits))


def test_a_weight_on_its_grid_is_kept() -> None:
    codes = torch.tensor([[0, 15, 3, 8], [15, 0, 7, 9]])
    weight = (codes.float() - 8) * 0.25
    assert torch.equal(rtn(weight, Grid(4, None, False)).dequantize(), weight)


def test_errors_are_those_of_fit_scale() -> None:
    with pytest.raises(ValueError, match="finite"):
        rtn(torch.full((2, 4), float("nan")), Grid(4, 4, True))
    with pytest.raises(ValueError, match="does not divide"):
        rtn(torch.ones(2, 4), Grid(4, 3, True))
