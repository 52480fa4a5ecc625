"""Full-size models on the meta device against what is published: nothing is missing, nothing is missed."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from dllmquant.core.grid import Grid
from dllmquant.core.hadamard import hadamard_factors
from dllmquant.models import ModelAdapter, registered_adapters
from dllmquant.nn.linear import QuantLinear
from tests.models.published import DREAM_7B, LLADA_8B, Shapes, dream_shapes, llada_shapes


@dataclass(frozen=True)
class Published:
    """A row per family.

    Attributes:
        config: Its config.json.
        shapes: Names and shapes of its weights.
        weights: Number of tensors.
        total_size: `total_size` of the published model.safetensors.index.json, two bytes per weight.
        blocks: Number of blocks.
        quantizable: Weights in the linear layers of the blocks.
    """

    config: dict[str, Any]
    shapes: Shapes
    weights: int
    total_size: int
    blocks: int
    quantizable: int


PUBLISHED = {
    "llada": Published(LLADA_8B, llada_shapes(LLADA_8B), 291, 16_031_162_368, 32, 6_979_321_856),
    "Dream": Published(DREAM_7B, dream_shapes(DREAM_7B), 339, 15_231_233_024, 28, 6_525_288_448),
}


def full_size(config: dict[str, Any]) -> PreTrainedModel:
    """The model as AutoModel builds it, without memory for its weights."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **keys))
    return model


@pytest.fixture(scope="module", params=sorted(registered_adapters()))
def family(request: pytest.FixtureRequest) -> tuple[ModelAdapter, Published, PreTrainedModel]:
    published = PUBLISHED[request.param]
    return registered_adapters()[request.param], published, full_size(published.config)


def test_full_size_has_the_published_weights(
    family: tuple[ModelAdapter, Published, PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, published, model = family
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published.shapes
    assert len(shapes) == published.weights
    assert 2 * sum(p.numel() for p in model.parameters()) == published.total_size
    assert not list(model.buffers()), "a buffer that no checkpoint stores is garbage after loading"
    adapter.validate(model)
    assert type(model).__name__ in published.config["architectures"]
    assert adapter.mask_id(model.config) == published.config["mask_token_id"]

    found = dict(adapter.linears(model))
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(found) == sorted(set(inside) - {adapter.head})
    matrices = {name for name, shape in published.shapes.items() if len(shape) == 2}
    assert matrices - {f"{name}.weight" for name in found} == {f"{adapter.embedding}.weight", f"{adapter.head}.weight"}
    per_block = sum(map(len, adapter.linear_groups))
    assert (per_block, len(found)) == (7, 7 * published.blocks)
    weights, packed = packed_size(found.values(), Grid(4, 128, symmetric=True))
    assert weights == published.quantizable
    assert packed == weights // 2 + 2 * weights // 128  # codes, and a float16 scale per group of 128
    with capsys.disabled():
        sys.stdout.write(
            f"\n{adapter.model_type}: {per_block} linears x {published.blocks} blocks = {len(found)}, "
            f"{weights:,} weights, {2 * weights:,} bytes in 16 bits, {packed:,} in 4 bits with groups of 128\n"
        )


def packed_size(linears: Iterable[nn.Module], grid: Grid) -> tuple[int, int]:
    """Weights of the layers, and the bytes of their codes and scales."""
    weights, packed = 0, 0
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        layer = QuantLinear(linear.in_features, linear.out_features, grid, None, device="meta", bias=False)
        weights += linear.weight.numel()
        packed += layer.nbytes
    return weights, packed


def test_widths_fit_the_built_in_rotations_and_groups(family: tuple[ModelAdapter, Published, PreTrainedModel]) -> None:
    adapter, _, model = family
    widths = {linear.get_parameter("weight").shape[1] for _, linear in adapter.linears(model)}
    residual = model.get_submodule(adapter.embedding).get_parameter("weight").shape[1]
    assert adapter.heads is not None
    for order in (residual, *widths, residual // int(getattr(model.config, adapter.heads[0]))):
        assert order % 128 == 0
        assert len(hadamard_factors(order)) >= 1
