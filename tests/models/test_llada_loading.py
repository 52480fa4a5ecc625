import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from dllmquant.models import LLaDAConfig, LLaDAModelLM
from tests.models.published import LLADA_8B, llada_shapes
from tests.models.test_llada_modeling import draw_ids, run
from tests.models.toys import MASK, tiny_config, tiny_model

SMALL = LLADA_8B | {
    "d_model": 16,
    "embedding_size": 32,
    "vocab_size": 32,
    "mask_token_id": MASK,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "mlp_hidden_size": 24,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
}


def write_checkpoint(path: Path, weights: dict[str, Tensor], config: dict[str, Any] = SMALL) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def published_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in llada_shapes(SMALL).items()
    }


LOADERS = [AutoModel, AutoModelForMaskedLM, LLaDAModelLM]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_tying": True, "scale_logits": True},
        {"include_bias": True, "n_kv_heads": 1, "rms_norm_eps": 1e-3, "rope_theta": 77.0, "input_emb_norm": True},
        {"include_qkv_bias": True},
    ],
    ids=["plain", "tied", "biases", "qkv-bias"],
)
def test_round_trip_is_bit_identical(loader: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAModelLM
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(run(loaded, draw_ids()), run(model, draw_ids()))


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = tiny_config(rope_theta=77.0, include_qkv_bias=True, weight_tying=True, sampler_defaults={"steps": 4})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAConfig
    for key, value in config.to_dict().items():
        if key not in ("transformers_version", "_name_or_path"):
            assert loaded.to_dict()[key] == value, key
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "llada"
    assert saved["rope_theta"] == 77.0
    assert saved["sampler_defaults"] == {"steps": 4}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float16])
def test_weights_keep_their_dtype_unless_another_is_asked_for(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_model(dtype=stored).save_pretrained(tmp_path)
    assert {p.dtype for p in AutoModel.from_pretrained(tmp_path).parameters()} == {stored}
    for asked in (torch.float32, torch.bfloat16):
        loaded = AutoModel.from_pretrained(tmp_path, dtype=asked)
        assert {p.dtype for p in loaded.parameters()} == {asked}
        assert run(loaded, draw_ids()).dtype == asked


def test_other_processes_than_the_main_one_leave_the_directory_alone(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tiny_model(seed=2).save_pretrained(tmp_path, is_main_process=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sharded_checkpoints_reload(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(run(AutoModel.from_pretrained(tmp_path), draw_ids()), run(model, draw_ids()))


@pytest.mark.parametrize("loader", LOADERS)
def test_published_layout_loads_without_remote_code(loader: Any, tmp_path: Path) -> None:
    weights = published_weights()
    write_checkpoint(tmp_path, weights)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAModelLM
    assert loaded.config.rope_theta == 500000.0
    assert loaded.config.mask_token_id == MASK
    assert loaded.config.precision == "amp_bf16"
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == dict.fromkeys(
        weights, torch.bfloat16
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_published_weights_survive_a_round_trip(tmp_path: Path) -> None:
    weights = published_weights()
    LLaDAModelLM.from_pretrained(write_checkpoint(tmp_path / "in", weights)).save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_defaults_are_the_published_sizes() -> None:
    default, published = LLaDAConfig(mlp_hidden_size=12288), LLaDAConfig(**LLADA_8B)
    for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "embedding_size", "max_sequence_length"):
        assert getattr(default, key) == getattr(published, key), key
    for key in ("rope_theta", "rms_norm_eps", "weight_tying", "include_bias", "include_qkv_bias", "mask_token_id"):
        assert getattr(default, key) == getattr(published, key), key


# Weights that do not fit

HEAD = "model.transformer.ff_out.weight"
DOWN = "model.transformer.blocks.1.ff_out.weight"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [HEAD, DOWN, "model.transformer.ln_f.weight"])
def test_missing_weights_are_an_error(loader: Any, name: str, tmp_path: Path) -> None:
    weights = published_weights()
    del weights[name]
    with pytest.raises(ValueError, match=f"do not fit LLaDAModelLM .*; missing: {name}$"):
        loader.from_pretrained(write_checkpoint(tmp_path, weights))


@pytest.mark.parametrize("name", ["model.transformer.blocks.2.ff_out.weight", "model.transformer.ff_out.bias"])
def test_unexpected_weights_are_an_error(name: str, tmp_path: Path) -> None:
    weights = published_weights() | {name: torch.zeros(16)}
    with pytest.raises(ValueError, match=f"; unexpected: {name}$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, weights))


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    weights = published_weights() | {DOWN: torch.zeros(16, 25)}
    write_checkpoint(tmp_path, weights)
    with pytest.raises(ValueError, match=rf"; of another shape: {DOWN} \(16, 25\) \(valid: \(16, 24\)\)$"):
        AutoModel.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.get_submodule(DOWN.removesuffix(".weight")).weight.shape == (16, 24)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    weights = published_weights() | {DOWN: torch.zeros(16, 25), "extra": torch.zeros(1), "more": torch.zeros(1)}
    del weights[HEAD]
    with pytest.raises(ValueError, match=f"missing: {HEAD}; unexpected: extra, more; of another shape: {DOWN}"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, weights), output_loading_info=True)


def test_a_head_beside_tied_weights_is_an_error(tmp_path: Path) -> None:
    weights = published_weights()
    with pytest.raises(ValueError, match=f"; unexpected: {HEAD}$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, weights, SMALL | {"weight_tying": True}))


def test_loading_information_is_returned_when_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, published_weights())
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is LLaDAModelLM
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# Quantized checkpoints


class ScaledLinear(nn.Module):
    """int8 codes under the key `weight`, one scale per row."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(linear.out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.weight_scale).to(x.dtype).T


class ScaledConfig(QuantizationConfigMixin):
    def __init__(self, **unused: Any) -> None:
        self.quant_method = "toy-scaled"  # type: ignore[assignment]


class ScaledQuantizer(HfQuantizer):
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if name.endswith("up_proj"):
                model.set_submodule(name, ScaledLinear(module))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        pass

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@pytest.fixture
def toy_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "toy-scaled", ScaledConfig)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "toy-scaled", ScaledQuantizer)


def quantized_weights() -> dict[str, Tensor]:
    weights = {name: tensor.float() for name, tensor in published_weights().items()}
    for name in [name for name in weights if name.endswith("up_proj.weight")]:
        weights[f"{name}_scale"] = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name] / weights[f"{name}_scale"]).round().to(torch.int8)
    return weights


@pytest.mark.usefixtures("toy_quantization")
def test_quantized_checkpoints_load_through_their_quantizer(tmp_path: Path) -> None:
    weights = quantized_weights()
    write_checkpoint(tmp_path, weights, SMALL | {"quantization_config": {"quant_method": "toy-scaled"}})
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    up = model.get_submodule("model.transformer.blocks.1.up_proj")
    assert isinstance(up, ScaledLinear)
    assert torch.equal(up.weight, weights["model.transformer.blocks.1.up_proj.weight"])
    plain = LLaDAModelLM(LLaDAConfig(**SMALL))
    dequantized = {
        name: tensor * weights[f"{name}_scale"] if f"{name}_scale" in weights else tensor
        for name, tensor in weights.items()
        if not name.endswith("_scale")
    }
    plain.load_state_dict(dequantized)
    torch.testing.assert_close(run(model, draw_ids()), run(plain, draw_ids()))


@pytest.mark.usefixtures("toy_quantization")
def test_quantized_checkpoints_must_be_complete(tmp_path: Path) -> None:
    weights = quantized_weights()
    del weights["model.transformer.blocks.0.up_proj.weight_scale"]
    write_checkpoint(tmp_path, weights, SMALL | {"quantization_config": {"quant_method": "toy-scaled"}})
    with pytest.raises(ValueError, match=r"missing: model\.transformer\.blocks\.0\.up_proj\.weight_scale$"):
        AutoModel.from_pretrained(tmp_path)


def test_quantized_checkpoints_do_not_load_as_plain_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unexpected: .*up_proj\.weight_scale"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, quantized_weights()))
