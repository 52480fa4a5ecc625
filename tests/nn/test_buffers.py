"""Casting a model leaves codes and scales as they are; moving it takes them along."""

import pytest
import torch

from dllmquant.nn.buffers import FixedDtypeModule


class Holder(FixedDtypeModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.1, 3e-7], dtype=torch.float32))
        self.register_buffer("absent", None)
        self.weight = torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_reach_parameters_only(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(Holder())
    before = model[0].get_buffer("scale").clone()
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].get_buffer("scale"), before)
    assert model[0].get_buffer("scale").dtype == torch.float32


def test_moves_take_buffers_along() -> None:
    model = torch.nn.Sequential(Holder()).to("meta", torch.float16)
    assert model[0].get_buffer("scale").is_meta
    assert model[0].get_buffer("scale").dtype == torch.float32
