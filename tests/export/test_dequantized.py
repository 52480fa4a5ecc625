"""Dequantized exports: plain checkpoints under the original names."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from dllmquant.export import export_model
from dllmquant.models import DreamModel, LLaDAModelLM
from dllmquant.nn.linear import QuantLinear
from tests.export.fresh import load_fresh
from tests.export.quantized import IDS, logits_of, quantized
from tests.tiny import tiny_dream, tiny_llada, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("make", "cls"), [(tiny_llada, LLaDAModelLM), (tiny_dream, DreamModel)])
def test_is_a_plain_checkpoint_with_the_same_logits(make, cls, dtype, tmp_path):
    original = make().to(dtype)
    names = {name: (tensor.shape, tensor.dtype) for name, tensor in original.state_dict().items()}
    model = quantized("rtn-w4a16", original)
    export_model(model, tmp_path, "dequantized")
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == names
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == [cls.__name__]
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    reloaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(reloaded) is cls
    assert not any(isinstance(module, QuantLinear) for module in reloaded.modules())
    assert torch.equal(logits_of(reloaded), logits_of(model))


def test_formats_that_have_no_widths_take_mixed_ones_and_one_bit(tmp_path):
    mixed = {"group_size": 16, "solver": "gptq", "mixed": {"choices": [1, 2, 4], "mean": 2}}
    model = quantized("gptq-w2a16", calibrated=True, weights=mixed)
    export_model(model, tmp_path, "dequantized")
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path).eval()), logits_of(model))


def test_loads_without_dllmquant(tmp_path):
    models = {
        "awq": quantized("awq-w4a16", calibrated=True),
        "tied": quantized("rtn-w4a16", tiny_llada(weight_tying=True)),
    }
    for name, model in models.items():
        export_model(model, tmp_path / name, "dequantized")
    loaded = load_fresh({name: tmp_path / name for name in models}, IDS, tmp_path)
    for name, model in models.items():
        assert torch.equal(loaded[name].logits, logits_of(model))


def test_the_tokenizer_is_saved_along(tmp_path):
    export_model(quantized("rtn-w4a16"), tmp_path, "dequantized", tokenizer=tiny_tokenizer())
    assert (tmp_path / "tokenizer.json").exists()


def test_a_reloaded_checkpoint_exports_alike(tmp_path):
    model = quantized("rtn-w4a16")
    model.save_pretrained(tmp_path / "packed")
    export_model(model, tmp_path / "a", "dequantized")
    export_model(AutoModel.from_pretrained(tmp_path / "packed"), tmp_path / "b", "dequantized")
    for name in ("model.safetensors", "config.json", "modeling_llada.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "b" / "README.md").exists()
