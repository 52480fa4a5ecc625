import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from dllmquant.models import DreamConfig, DreamModel
from tests.models.published import DREAM_7B, dream_shapes
from tests.models.test_llada_modeling import draw_ids, run
from tests.models.toys import MASK, tiny_dream, tiny_dream_config

SMALL = DREAM_7B | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 32,
    "mask_token_id": MASK,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
LOADERS = [AutoModel, AutoModelForMaskedLM, DreamModel]


def write_checkpoint(path: Path, weights: dict[str, Tensor], config: dict[str, Any] = SMALL) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def published_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in dream_shapes(SMALL).items()
    }


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "rms_norm_eps": 1e-3, "rope_theta": 77.0}],
    ids=["plain", "tied", "sizes"],
)
def test_round_trip_is_bit_identical(loader: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_dream(**changes)
    model.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is DreamModel
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(run(loaded, draw_ids()), run(model, draw_ids()))


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = tiny_dream_config(rope_theta=77.0, sampler_defaults={"steps": 4, "remasking": "origin"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DreamConfig
    for key, value in config.to_dict().items():
        if key not in ("transformers_version", "_name_or_path"):
            assert loaded.to_dict()[key] == value, key
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "Dream"
    assert saved["rope_theta"] == 77.0
    assert saved["mask_token_id"] == MASK
    assert saved["sampler_defaults"] == {"steps": 4, "remasking": "origin"}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_keep_their_dtype_unless_another_is_asked_for(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_dream(dtype=stored).save_pretrained(tmp_path)
    assert {p.dtype for p in AutoModel.from_pretrained(tmp_path).parameters()} == {stored}
    for asked in (torch.float32, torch.bfloat16):
        loaded = AutoModel.from_pretrained(tmp_path, dtype=asked)
        assert {p.dtype for p in loaded.parameters()} == {asked}
        assert run(loaded, draw_ids()).dtype == asked


def test_sharded_checkpoints_reload(tmp_path: Path) -> None:
    model = tiny_dream()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(run(AutoModel.from_pretrained(tmp_path), draw_ids()), run(model, draw_ids()))


@pytest.mark.parametrize("loader", LOADERS)
def test_published_layout_loads_without_remote_code(loader: Any, tmp_path: Path) -> None:
    weights = published_weights()
    write_checkpoint(tmp_path, weights)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is DreamModel
    assert (loaded.config.rope_theta, loaded.config.mask_token_id) == (1000000.0, MASK)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == dict.fromkeys(
        weights, torch.bfloat16
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_positions_are_right_after_loading(device_map: dict[str, str] | None, tmp_path: Path) -> None:
    """No state that a checkpoint does not store: loaded twice and built by hand, the model computes the same."""
    weights = published_weights(torch.float32)
    write_checkpoint(tmp_path, weights)
    by_hand = DreamModel(DreamConfig(**{key: SMALL[key] for key in SMALL if key != "model_type"})).eval()
    by_hand.load_state_dict(weights, strict=True)
    assert not list(by_hand.buffers())
    for _ in range(2):
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, device_map=device_map)
        assert torch.equal(run(loaded, draw_ids()), run(by_hand, draw_ids()))


def test_published_weights_survive_a_round_trip(tmp_path: Path) -> None:
    weights = published_weights()
    DreamModel.from_pretrained(write_checkpoint(tmp_path / "in", weights)).save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


# Weights that do not fit

HEAD = "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [HEAD, DOWN, "model.norm.weight", "model.layers.0.self_attn.v_proj.bias"])
def test_missing_weights_are_an_error(loader: Any, name: str, tmp_path: Path) -> None:
    weights = published_weights()
    del weights[name]
    with pytest.raises(ValueError, match=f"do not fit DreamModel .*; missing: {name}$"):
        loader.from_pretrained(write_checkpoint(tmp_path, weights))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.bias"])
def test_unexpected_weights_are_an_error(name: str, tmp_path: Path) -> None:
    weights = published_weights() | {name: torch.zeros(16)}
    with pytest.raises(ValueError, match=f"; unexpected: {name}$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, weights))


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    weights = published_weights() | {DOWN: torch.zeros(16, 25)}
    write_checkpoint(tmp_path, weights)
    with pytest.raises(ValueError, match=rf"; of another shape: {DOWN} \(16, 25\) \(valid: \(16, 24\)\)$"):
        AutoModel.from_pretrained(tmp_path)
