"""What a packed layer refuses: casts of its codes, biases and zero points that do not fit, float weights as codes."""

import dataclasses

import pytest
import torch

from dllmquant.core.grid import Grid, QuantizedWeight
from dllmquant.core.rtn import rtn
from dllmquant.nn.linear import QuantLinear


def quantized(bits: int, symmetric: bool) -> QuantizedWeight:
    return rtn(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), Grid(bits, 8, symmetric))


def test_type_casts_no_buffer() -> None:
    layer = QuantLinear.from_quantized(quantized(4, False), torch.zeros(16), None, torch.float32)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.type(torch.float16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_biases_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"bias: shape \(1,\); valid: \(16,\)"):
        QuantLinear.from_quantized(quantized(4, True), torch.ones(1), None, torch.float32)


def test_symmetric_zero_points_are_not_dropped() -> None:
    weight = quantized(4, True)
    with pytest.raises(ValueError, match=r"weight\.zero: not 8 everywhere"):
        QuantLinear.from_quantized(
            dataclasses.replace(weight, zero=torch.full_like(weight.zero, 3)), None, None, torch.float32
        )


def test_zero_points_and_codes_of_one_bit_are_not_dropped() -> None:
    random = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    weight = rtn(random, Grid(4, 8, False, (2, 1, 4, 1)))
    zero, codes = weight.zero.clone(), weight.codes.clone()
    zero[3, 1] = 0
    with pytest.raises(ValueError, match=r"weight\.zero: not 1 everywhere in group 1"):
        QuantLinear.from_quantized(dataclasses.replace(weight, zero=zero), None, None, torch.float32)
    codes[3, 9] = 1
    with pytest.raises(ValueError, match="codes: a group of one bit has a code that is neither 0 nor 2"):
        QuantLinear.from_quantized(dataclasses.replace(weight, codes=codes), None, None, torch.float32)


def test_float_weights_are_not_taken_for_codes() -> None:
    layer = QuantLinear(32, 16, Grid(8, None, True), None, bias=False)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        layer.load_state_dict({"weight": torch.randn(16, 32), "weight_scale": layer.weight_scale})
