"""Exports in compressed-tensors' format, loaded by transformers and compressed-tensors where dllmquant is forbidden."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dllmquant.export import ExportError, export_model
from dllmquant.nn import linear
from dllmquant.nn.linear import QuantLinear
from tests.export.fresh import Loaded, load_fresh
from tests.export.quantized import IDS, logits_of, nmse, quantized
from tests.tiny import tiny_dream, tiny_llada

pytest.importorskip("compressed_tensors")

WEIGHT_ONLY: dict[str, Callable[[], PreTrainedModel]] = {
    "rtn-w4a16": lambda: quantized("rtn-w4a16"),
    "rtn-w3a16": lambda: quantized("rtn-w3a16", weights={"group_size": 16}),
    "rtn-w2a16": lambda: quantized("rtn-w2a16"),
    "w8a16": lambda: quantized("rtn-w8a8", activations=None),
    "symmetric": lambda: quantized("rtn-w4a16", weights={"symmetric": True}),
    "per channel": lambda: quantized("rtn-w4a16", weights={"group_size": None}),
    "gptq-w4a16": lambda: quantized("gptq-w4a16", calibrated=True),
    "awq-w4a16": lambda: quantized("awq-w4a16", calibrated=True),
    "dllmquant-w4a16": lambda: quantized("dllmquant-w4a16", calibrated=True),
    "bfloat16": lambda: quantized("rtn-w4a16", tiny_llada().bfloat16()),
    "float16": lambda: quantized("rtn-w4a16", tiny_llada().half()),
    "skipped layers": lambda: quantized("rtn-w4a16", skip=["*.ff_out", "*.0.q_proj"]),
    "tied, with biases": lambda: quantized("rtn-w4a16", tiny_llada(weight_tying=True, include_bias=True)),
    "Dream": lambda: quantized("rtn-w4a16", tiny_dream()),
}
WITH_ACTIVATIONS: dict[str, Callable[[], PreTrainedModel]] = {
    "rtn-w8a8": lambda: quantized("rtn-w8a8"),
    "smoothquant-w8a8": lambda: quantized("smoothquant-w8a8", calibrated=True),
    "rtn-w4a8, full range": lambda: quantized("rtn-w4a8", activations={"full_range": True}),
}
OTHER_STEPS: dict[str, Callable[[], PreTrainedModel]] = {
    "rtn-w4a8": lambda: quantized("rtn-w4a8"),
    "vLLM's step": lambda: quantized("rtn-w8a8", activations={"full_range": False}),
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: make() for name, make in (WEIGHT_ONLY | WITH_ACTIVATIONS | OTHER_STEPS).items()}


@pytest.fixture(scope="module")
def exports(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    directories = {name: root / name.replace(" ", "-").replace(",", "").replace("'", "") for name in models}
    for name, model in models.items():
        export_model(model, directories[name], "compressed-tensors")
    return directories


@pytest.fixture(scope="module")
def loaded(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    return load_fresh(exports, IDS, tmp_path_factory.mktemp("fresh"))


def config_of(directory: Path) -> dict[str, object]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", WEIGHT_ONLY | WITH_ACTIVATIONS | OTHER_STEPS)
def test_the_modelling_code_travels_along(name, loaded):
    assert loaded[name].module.startswith("transformers_modules.")


@pytest.mark.parametrize("name", WEIGHT_ONLY | WITH_ACTIVATIONS | OTHER_STEPS)
def test_weights_are_those_of_the_model(name, loaded, models):
    model = models[name]
    layers = {path: part for path, part in model.named_modules() if isinstance(part, QuantLinear)}
    assert layers
    for path, layer in layers.items():
        assert torch.equal(loaded[name].weights[path], layer.quantized_weight().dequantize(model.dtype)), path


@pytest.mark.parametrize("name", WEIGHT_ONLY | WITH_ACTIVATIONS)
def test_logits_are_equal_bit_by_bit(name, loaded, models):
    ours = logits_of(models[name])
    assert loaded[name].logits.dtype == ours.dtype
    assert torch.equal(loaded[name].logits, ours)


def rounded_by_the_reader(x: Tensor, _: object) -> Tensor:
    """Activations as the compressed-tensors package rounds them: 255 steps over [−absmax, absmax]."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round() * scale


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_logits_with_other_steps_differ_by_the_readers_rounding_alone(name, loaded, models, monkeypatch):
    ours = logits_of(models[name])
    monkeypatch.setattr(linear, "quantize_activation", rounded_by_the_reader)
    theirs = logits_of(models[name])
    assert torch.equal(loaded[name].logits, theirs)
    assert not torch.equal(ours, theirs)
    assert nmse(theirs, ours) < 2e-3


WARNS = {"rtn-w4a16": False, "rtn-w8a8": False, "rtn-w4a8": True, "vLLM's step": True, "rtn-w4a8, full range": False}


@pytest.mark.parametrize("name", WARNS)
def test_of_other_steps_than_the_readers_it_warns(name, models, tmp_path, caplog):
    export_model(models[name], tmp_path, "compressed-tensors")
    ours = [record for record in caplog.records if record.name.startswith("dllmquant")]
    assert [record.levelname for record in ours] == ["WARNING"] * WARNS[name]
    assert all("activations.full_range: true" in record.getMessage() for record in ours)


@pytest.mark.parametrize(
    ("name", "form"),
    [("rtn-w4a16", "pack-quantized"), ("w8a16", "pack-quantized"), ("rtn-w8a8", "int-quantized")],
)
def test_the_layout_is_the_packages_own(name, form, exports):
    config = config_of(exports[name])
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == form
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["model.transformer.ff_out"]
    assert config.get("dequantize", False) == (form == "pack-quantized")


def test_layers_that_are_not_quantized_are_listed(exports):
    blocks = [f"model.transformer.blocks.{index}" for index in range(2)]
    kept = [f"{blocks[0]}.q_proj", *(f"{block}.ff_out" for block in blocks), "model.transformer.ff_out"]
    assert sorted(config_of(exports["skipped layers"])["ignore"]) == sorted(kept)


def test_the_model_stays_as_it_is(models, exports, tmp_path):
    model = models["rtn-w4a16"]
    before = logits_of(model)
    export_model(model, tmp_path / "out", "compressed-tensors")
    assert torch.equal(logits_of(model), before)
    assert model.config.quantization_config.quant_method == "dllmquant"
    assert not hasattr(model.config, "auto_map")


def test_without_the_package_it_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    with pytest.raises(ExportError, match=r"needs compressed-tensors: pip install 'dllmquant\[export\]'"):
        export_model(models["rtn-w4a16"], tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_importing_dllmquant_imports_no_compressed_tensors():
    program = "import sys, dllmquant.export; sys.exit('compressed_tensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
