"""The packed layer against its dequantised float64 reference; what casting and loading may and may not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dllmquant.core.grid import Grid, QuantizedWeight
from dllmquant.core.rtn import rtn
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.packing import pack

IN, OUT = 24, 5
GRIDS = [
    pytest.param(Grid(bits, group_size, symmetric), id=f"{bits}-{group_size}-{'sym' if symmetric else 'asym'}")
    for bits, group_size in ((1, 8), (2, 8), (3, 8), (3, None), (4, 6), (8, 4))
    for symmetric in (False, True)
]
MIXED = [
    pytest.param(Grid(2, IN // len(bits), symmetric, bits), id=f"{bits}-{'sym' if symmetric else 'asym'}")
    for bits in ((3, 1), (8, 1, 2), (1, 1), (2, 2, 2), (1, 3, 2, 8, 4, 1, 2, 3))
    for symmetric in (False, True)
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(
    grid: Grid,
    *,
    bias: bool = True,
    activation: ActivationScheme | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[QuantLinear, QuantizedWeight]:
    weight = rtn(normal(OUT, IN), grid)
    vector = normal(OUT, seed=1) if bias else None
    return QuantLinear.from_quantized(weight, vector, activation, dtype), weight


def restored(weight: QuantizedWeight) -> Tensor:
    """(codes − zero)·scale in float64, element by element."""
    width = IN // weight.scale.shape[1]
    codes, zero, scale = (part.double() for part in (weight.codes, weight.zero, weight.scale))
    return torch.stack(
        [
            torch.stack([(codes[o, i] - zero[o, i // width]) * scale[o, i // width] for i in range(IN)])
            for o in range(OUT)
        ]
    )


def same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    for name in ("codes", "scale", "zero"):
        assert getattr(one, name).dtype == getattr(other, name).dtype
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.grid == other.grid


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_forward_is_the_dequantised_product(grid: Grid, bias: bool) -> None:
    layer, weight = layer_of(grid, bias=bias, dtype=torch.float64)
    x = normal(2, 3, IN, seed=2)
    expected = x @ restored(weight).T + (normal(OUT, seed=1) if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    narrow, _ = layer_of(grid, bias=bias)
    torch.testing.assert_close(narrow(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    assert narrow(x.float()).shape == (2, 3, OUT)


@pytest.mark.parametrize(
    "scheme",
    [ActivationScheme(4), ActivationScheme(8, 8, symmetric=False), ActivationScheme(8, 8, group_bits=(3, 8, 4))],
)
def test_forward_quantizes_the_input(scheme: ActivationScheme) -> None:
    layer, weight = layer_of(Grid(4, 8, False), activation=scheme, dtype=torch.float64)
    x = normal(6, IN, seed=3)
    expected = quantize_activation(x, scheme) @ restored(weight).T + normal(OUT, seed=1)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), x @ restored(weight).T + normal(OUT, seed=1))


def test_forward_in_bfloat16() -> None:
    layer, weight = layer_of(Grid(4, 8, False), dtype=torch.bfloat16)
    x = normal(6, IN, seed=4).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    rounded = restored(weight).bfloat16()
    expected = torch.nn.functional.linear(x, rounded, normal(OUT, seed=1).bfloat16())
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_packing_loses_nothing(grid: Grid) -> None:
    layer, weight = layer_of(grid)
    same(layer.quantized_weight(), weight)
    assert (layer.weight_zero_point is None) == (grid.symmetric or set(grid.bits_of_groups(IN)) == {1})


@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_nbytes_is_what_is_stored(grid: Grid) -> None:
    layer, _ = layer_of(grid)
    stored = {name: tensor.numel() * tensor.element_size() for name, tensor in layer.state_dict().items()}
    assert layer.nbytes == sum(size for name, size in stored.items() if name != "bias")
    bits = grid.bits_of_groups(IN)
    codes, zeros = 0, 0
    for width in set(bits):
        codes += math.ceil(bits.count(width) * (IN // len(bits)) * width / 8)
        zeros += 0 if grid.symmetric or width == 1 else math.ceil(bits.count(width) * width / 8)
    assert layer.nbytes == OUT * (codes + 2 * len(bits) + zeros)


@settings(max_examples=40, deadline=None)
@given(
    group_bits=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=7),
    size=st.integers(1, 9),
    rows=st.integers(1, 5),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_mixed_widths_of_any_shape_survive_saving(
    group_bits: list[int], size: int, rows: int, symmetric: bool, seed: int
) -> None:
    columns = size * len(group_bits)
    weight = rtn(normal(rows, columns, seed=seed), Grid(4, size, symmetric, tuple(group_bits)))
    source = QuantLinear.from_quantized(weight, None, None, torch.float32)
    target = QuantLinear(columns, rows, weight.grid, None, bias=False, device="meta").to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    same(target.quantized_weight(), weight)
    assert torch.equal(target.quantized_weight().dequantize(), weight.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_width_for_all_is_stored_as_if_it_were_not_mixed(bits: int, symmetric: bool) -> None:
    plain, _ = layer_of(Grid(bits, 8, symmetric))
    mixed, _ = layer_of(Grid(4, 8, symmetric, (bits,) * 3))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(mixed.state_dict()[name], tensor)
    assert torch.equal(plain.weight.view(OUT, -1), pack(plain.quantized_weight().codes, bits))
    if plain.weight_zero_point is not None:
        assert torch.equal(plain.weight_zero_point, pack(plain.quantized_weight().zero, bits))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("grid", [*GRIDS, *MIXED])
def test_state_dict_into_a_layer_made_on_meta(grid: Grid, assign: bool, bias: bool) -> None:
    scheme = ActivationScheme(8)
    source, weight = layer_of(grid, bias=bias, activation=scheme)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    no_zero_points = grid.symmetric or set(grid.bits_of_groups(IN)) == {1}
    keys = {"weight", "weight_scale"} | (set() if no_zero_points else {"weight_zero_point"})
    assert set(state) == keys | ({"bias"} if bias else set())
    target = QuantLinear(IN, OUT, grid, scheme, bias=bias, device="meta")
    assert all(tensor.is_meta for tensor in target.state_dict().values())
    assert {k: (t.shape, t.dtype) for k, t in target.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }
    if not assign:
        target = target.to_empty(device="cpu")
    target.load_state_dict(state, assign=assign)
    same(target.quantized_weight(), weight)
    x = normal(3, IN, seed=5).float()
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_casting_changes_the_bias_and_nothing_else(dtype: torch.dtype, symmetric: bool) -> None:
    layer, weight = layer_of(Grid(3, 8, symmetric))
    model = nn.Sequential(layer, nn.LayerNorm(OUT))
    for cast in (
        model.to(dtype),
        model.to("cpu", dtype),
        model.half(),
        model.bfloat16(),
        model.float(),
        model.to(dtype),
    ):
        assert cast is model
        same(layer.quantized_weight(), weight)
    assert layer.bias is not None
    assert layer.bias.dtype == model[1].weight.dtype == dtype
    assert layer.state_dict()["weight_scale"].dtype == torch.float16
    assert model(normal(2, IN).to(dtype)).dtype == dtype


def test_moving_moves_everything() -> None:
    layer, _ = layer_of(Grid(4, 8, False))
    layer.to(device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.weight_scale.dtype == torch.float16


def test_a_float_loader_meets_a_shape_that_does_not_fit() -> None:
    layer, _ = layer_of(Grid(4, 8, False))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(IN, OUT).load_state_dict(layer.state_dict(), strict=False)


def test_the_layer_owns_its_tensors() -> None:
    layer, weight = layer_of(Grid(4, 8, False))
    before = layer.quantized_weight().dequantize()
    weight.scale.mul_(2)
    weight.codes.zero_()
    assert torch.equal(layer.quantized_weight().dequantize(), before)


def test_nothing_is_trained() -> None:
    layer, _ = layer_of(Grid(4, 8, False))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_gradients_reach_the_input() -> None:
    layer, weight = layer_of(Grid(4, 8, False), dtype=torch.float64)
    x = normal(2, IN).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, restored(weight).sum(0).expand(2, IN))


def test_description_and_errors() -> None:
    layer, _ = layer_of(Grid(4, 8, False), activation=ActivationScheme(8))
    assert repr(layer).startswith("QuantLinear(24 -> 5, bits=4, group_size=8")
    with pytest.raises(ValueError, match="group_size: 7 does not divide the 24 input channels"):
        QuantLinear(IN, OUT, Grid(4, 7, False), None, bias=False)
    with pytest.raises(ValueError, match=r"activation\.group_size: 7 does not divide the 24 features"):
        QuantLinear(IN, OUT, Grid(4, 8, False), ActivationScheme(8, 7), bias=False)
    with pytest.raises(ValueError, match=r"activation\.group_bits: 2 widths; valid: 3, one per group"):
        QuantLinear(IN, OUT, Grid(4, 8, False), ActivationScheme(8, 8, group_bits=(4, 8)), bias=False)
    with pytest.raises(ValueError, match="group_bits: 2 widths; valid: 3, one per group"):
        QuantLinear(IN, OUT, Grid(4, 8, False, (1, 2)), None, bias=False)
    mixed, _ = layer_of(Grid(4, 8, False, (1, 2, 2)))
    assert repr(mixed).startswith("QuantLinear(24 -> 5, bits=1.66667 (mixed), group_size=8")
