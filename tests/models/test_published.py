"""Full-size models on the meta device against what is published: nothing is missing, nothing is missed."""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from dllmquant.core.grid import Grid
from dllmquant.core.hadamard import hadamard_factors
from dllmquant.models import ModelAdapter, registered_adapters
from tests.models.published import (
    DREAM_7B,
    FAST_DLLM_7B,
    LLADA2_MINI,
    LLADA_8B,
    LLADA_MOE_7B,
    SDAR_4B,
    SDAR_30B,
    Shapes,
    dream_shapes,
    llada2_shapes,
    llada_moe_shapes,
    llada_shapes,
    packed_size,
    qwen_shapes,
)


@dataclass(frozen=True)
class Published:
    """A row per family.

    Attributes:
        config: Its config.json.
        shapes: Names and shapes of its weights.
        weights: Number of tensors.
        total_size: `total_size` of the published model.safetensors.index.json, two bytes per parameter.
        mask_id: Id of the mask token.
        linears: For every block, the number of its linear layers to quantize.
        quantizable: Weights in these layers.
    """

    config: dict[str, Any]
    shapes: Shapes
    weights: int
    total_size: int
    mask_id: int
    linears: tuple[int, ...]
    quantizable: int


PUBLISHED = {
    "llada": Published(LLADA_8B, llada_shapes(LLADA_8B), 291, 16_031_162_368, 126336, (7,) * 32, 6_979_321_856),
    "Dream": Published(DREAM_7B, dream_shapes(DREAM_7B), 339, 15_231_233_024, 151666, (7,) * 28, 6_525_288_448),
    "lladamoe": Published(
        LLADA_MOE_7B,
        llada_moe_shapes(LLADA_MOE_7B),
        3 + 16 * (9 + 64 * 3),
        14_713_761_792,
        156895,
        (4 + 64 * 3,) * 16,
        6_710_886_400,
    ),
    "llada2_moe": Published(
        LLADA2_MINI,
        llada2_shapes(LLADA2_MINI),
        3 + (6 + 3) + 19 * (6 + 2 + 257 * 3),
        32_511_277_056,
        156895,
        (5,) + (2 + 257 * 3,) * 19,
        15_601_762_304,
    ),
    "sdar": Published(
        SDAR_4B, qwen_shapes(SDAR_4B, qk_norm=True), 399, 8_822_848_512, 151669, (7,) * 36, 3_633_315_840
    ),
    "sdar_moe": Published(
        SDAR_30B,
        qwen_shapes(SDAR_30B, qk_norm=True),
        3 + 48 * (9 + 128 * 3),
        61_064_245_248,
        151669,
        (4 + 128 * 3,) * 48,
        29_896_998_912,
    ),
    "Fast_dLLM_Qwen": Published(
        FAST_DLLM_7B,
        qwen_shapes(FAST_DLLM_7B, qkv_bias=True),
        339,
        15_231_233_024,
        151665,
        (7,) * 28,
        6_525_288_448,
    ),
}


def full_size(config: dict[str, Any], directory: Path) -> PreTrainedModel:
    """The model as AutoModel builds it from the config.json, without memory for its weights."""
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModel.from_config(AutoConfig.from_pretrained(directory))
    return model


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelAdapter, Published, PreTrainedModel]:
    published = PUBLISHED[request.param]
    model = full_size(published.config, tmp_path_factory.mktemp(request.param))
    return registered_adapters()[request.param], published, model


def test_full_size_has_the_published_weights(
    family: tuple[ModelAdapter, Published, PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, published, model = family
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published.shapes
    assert len(shapes) == published.weights
    assert 2 * sum(p.numel() for p in model.parameters()) == published.total_size
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers <= shapes.keys(), "a buffer that no checkpoint stores is garbage after loading"
    adapter.validate(model)
    assert type(model).__name__ in published.config["architectures"]
    assert adapter.mask_id(model.config) == published.mask_id

    found = dict(adapter.linears(model))
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = {name for name in inside if name.endswith(tuple(f".{leaf}" for leaf in adapter.kept))}
    assert sorted(found) == sorted(set(inside) - {adapter.head} - kept)
    matrices = {name for name, shape in published.shapes.items() if len(shape) == 2}
    sixteen_bits = {f"{name}.weight" for name in {adapter.embedding, adapter.head} | kept}
    assert matrices - {f"{name}.weight" for name in found} == sixteen_bits
    per_block = Counter(int(name.removeprefix(f"{adapter.blocks}.").partition(".")[0]) for name in found)
    assert tuple(per_block[index] for index in range(len(per_block))) == published.linears
    weights, packed = packed_size(found.values(), Grid(4, 128, symmetric=True))
    assert weights == published.quantizable
    assert packed == weights // 2 + 2 * weights // 128  # codes, and a float16 scale per group of 128
    with capsys.disabled():
        sys.stdout.write(
            f"\n{adapter.model_type}: {counted(published.linears)} = {len(found)} linears, "
            f"{weights:,} weights, {2 * weights:,} bytes in 16 bits, {packed:,} in 4 bits with groups of 128\n"
        )


def counted(linears: tuple[int, ...]) -> str:
    """The linear layers of the blocks in words, as "1 block x 5 + 19 blocks x 773"."""
    return " + ".join(f"{blocks} block{'s' * (blocks > 1)} x {each}" for each, blocks in Counter(linears).items())


def test_widths_fit_the_built_in_rotations_and_groups(family: tuple[ModelAdapter, Published, PreTrainedModel]) -> None:
    adapter, _, model = family
    widths = {linear.get_parameter("weight").shape[1] for _, linear in adapter.linears(model)}
    residual = model.get_submodule(adapter.embedding).get_parameter("weight").shape[1]
    assert adapter.heads is not None
    assert adapter.value_output is not None
    output = adapter.block_list(model)[0].get_submodule(adapter.value_output[1])
    heads = output.get_parameter("weight").shape[1] // int(getattr(model.config, adapter.heads[0]))
    for order in (residual, *widths, heads):
        assert order % 128 == 0
        assert len(hadamard_factors(order)) >= 1
