"""The GPTQ layout, read back by an independent reader; `test_gptqmodel.py` has the real one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllmquant.core.grid import Grid, QuantizedWeight, fit_scale, quantize_to_grid
from dllmquant.export import export_model
from dllmquant.export.gptq import gptq_tensors
from dllmquant.nn.linear import QuantLinear
from tests.export.quantized import quantized


def field(words: Tensor, index: int, bits: int) -> Tensor:
    """Reads code `index` of each column of a [words, columns] bit stream, bit by bit."""
    code = torch.zeros(words.shape[1], dtype=torch.int64)
    for bit in range(bits):
        word, place = divmod(index * bits + bit, 32)
        code |= ((words[word].long() >> place) & 1) << bit
    return code


def dequantized(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """Reads a weight [out, in] as the format's authors define it: (code − (stored zero + 1))·scale."""
    scales, groups = tensors["scales"].double(), tensors["g_idx"].tolist()
    out = scales.shape[1]
    zeros = torch.stack([field(tensors["qzeros"].T, index, bits) for index in range(out)], dim=1) + 1
    rows = [(field(tensors["qweight"], i, bits) - zeros[g]) * scales[g] for i, g in enumerate(groups)]
    return torch.stack(rows, dim=1)


def layer_of(bits: int, group_size: int | None, symmetric: bool) -> QuantLinear:
    """A layer [96, 128] in which some groups hold one sign only, so that zero points lie at both ends."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(bits))
    weight[:3], weight[3:6] = weight[:3].abs(), -weight[3:6].abs()
    grid = Grid(bits, group_size, symmetric)
    scale, zero = fit_scale(weight, grid)
    packed = QuantizedWeight(grid, quantize_to_grid(weight, scale, zero, grid), scale, zero)
    return QuantLinear.from_quantized(packed, None, None, torch.float32)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_tensors_mean_the_same_weight(bits, group_size, symmetric):
    layer = layer_of(bits, group_size, symmetric)
    weight, tensors = layer.quantized_weight(), gptq_tensors(layer)
    groups = 128 // (group_size or 128)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (128 * bits // 32, 96)),
        "qzeros": (torch.int32, (groups, 96 * bits // 32)),
        "scales": (torch.float16, (groups, 96)),
        "g_idx": (torch.int32, (128,)),
    }
    assert torch.equal(dequantized(tensors, bits), weight.dequantize(torch.float64))
    mirrored = weight.zero == 0
    assert bool(mirrored.any()) == (not symmetric)
    assert torch.equal(tensors["scales"].T < 0, mirrored)


def test_a_checkpoint_and_its_configuration(tmp_path):
    model = quantized("rtn-w4a16", skip=["*.ff_out"])
    export_model(model, tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "quantize_config.json").read_text())
    leaves = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj"]
    assert config["modules_in_block_to_quantize"] == [[leaf] for leaf in leaves]
    assert config["block_name_to_quantize"] == "model.transformer.blocks"
    assert list(config["dynamic"]) == [r"-:^model\.transformer\.blocks\.\d+\.ff_out$"]
    fields = ("quant_method", "checkpoint_format", "bits", "group_size", "sym", "desc_act")
    assert [config[field] for field in fields] == ["gptq", "gptq", 4, 32, False, False]
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.transformer.blocks.1.up_proj"
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(name)}
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    assert torch.equal(dequantized(own, 4).float(), layer.quantized_weight().dequantize())
    assert "model.transformer.blocks.0.ff_out.weight" in tensors


def test_per_channel_scales_are_group_size_minus_one(tmp_path):
    export_model(quantized("rtn-w4a16", weights={"group_size": None, "symmetric": True}), tmp_path, "gptq")
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert (config["group_size"], config["sym"]) == (-1, True)


def test_another_export_to_the_directory_leaves_no_stale_configuration(tmp_path):
    model = quantized("rtn-w4a16")
    export_model(model, tmp_path, "gptq")
    export_model(model, tmp_path, "dequantized")
    assert not (tmp_path / "quantize_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
