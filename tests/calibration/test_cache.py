"""The cache of trajectories: what its key depends on, that a hit runs no model, and damage of every kind."""

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllmquant.calibration import (
    Recording,
    Request,
    builtin_prompts,
    cache,
    cache_directory,
    cached_trajectory,
    trajectory_key,
    trajectory_states,
)
from dllmquant.core.grid import Grid
from dllmquant.core.rtn import rtn
from dllmquant.decoding import SamplerConfig, Trajectory
from dllmquant.nn.activation import ActivationScheme
from dllmquant.nn.linear import QuantLinear
from dllmquant.nn.transform import InputTransform, TransformStep
from tests.tiny import tiny_llada, tiny_tokenizer

ROWS = [[5, 6, 7], [8, 9]]
CONFIG = SamplerConfig(steps=8, gen_length=8, block_length=4)
IDS = {"mask": 1, "pad": 2, "eos": 3, "eot": None}
LAYER = "model.transformer.blocks.0.ff_out"


def key(model=None, rows=ROWS, config=CONFIG, seed=0, batch_size=2, **special_ids):
    options = {"seed": seed, "batch_size": batch_size, "special_ids": IDS | special_ids}
    return trajectory_key(model or tiny_llada(), rows, config, **options)


def packed(activation):
    model = tiny_llada()
    weight = rtn(model.get_submodule(LAYER).weight.detach(), Grid(4, 16, False))
    model.set_submodule(LAYER, QuantLinear.from_quantized(weight, None, activation, torch.float32))
    return model


def changed(change):
    model = tiny_llada()
    with torch.no_grad():
        change(model)
    return model


def nudge(model):
    """The last bit of one weight."""
    weight = model.get_submodule(LAYER).weight
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


def swap(model):
    """The same numbers in other places."""
    weight = model.get_submodule(LAYER).weight
    weight[[0, 1]] = weight[[1, 0]]


def test_the_key_repeats():
    assert key() == key()
    assert len(key()) == 64
    assert set(key()) <= set("0123456789abcdef")


def keys_of_changes():
    yield "nothing", key()
    yield "bit", key(changed(nudge))
    yield "places", key(changed(swap))
    yield "dtype", key(tiny_llada().half())
    yield "config", key(tiny_llada(rope_theta=5000.0))
    yield "packed", key(packed(None))
    yield "activation", key(packed(ActivationScheme(8, None, True)))
    yield "activation bits", key(packed(ActivationScheme(4, None, True)))
    for seed in (0, 1):  # a Hadamard transform stores nothing: its steps are all there is
        model = tiny_llada()
        model.get_submodule(LAYER).add_module("extra", InputTransform(64, (TransformStep("hadamard", 64, seed),)))
        yield f"transform {seed}", key(model)
    yield "prompt", key(rows=[[5, 6, 7], [8, 10]])
    yield "order", key(rows=ROWS[::-1])
    yield "split", key(rows=[[5, 6], [7, 8, 9]])
    yield "fewer", key(rows=ROWS[:1])
    yield "seed", key(seed=1)
    yield "batch size", key(batch_size=1)
    for name, value in (
        ("steps", 4),
        ("gen_length", 16),
        ("block_length", 8),
        ("temperature", 0.5),
        ("cfg_scale", 0.5),
        ("remasking", "random"),
        ("threshold", 0.9),
        ("logits_eos_inf", True),
        ("confidence_eos_eot_inf", True),
    ):
        yield name, key(config=dataclasses.replace(CONFIG, **{name: value}))
    for name in IDS:
        yield name, key(**{name: 9})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "__version__", "0.0.0.other")
        yield "library", key()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "FORMAT_VERSION", 99)
        yield "format", key()


def test_every_ingredient_changes_the_key():
    keys = dict(keys_of_changes())
    assert len(set(keys.values())) == len(keys)
    assert set(dataclasses.asdict(CONFIG)) <= set(keys)


def test_where_a_model_was_loaded_from_does_not_change_the_key():
    model = tiny_llada()
    model.config._name_or_path = "somewhere"
    assert key(model.train()) == key()


def test_large_tensors_are_hashed_in_parts(monkeypatch):
    expected = key()
    monkeypatch.setattr(cache, "_CHUNK", 12)
    assert key() == expected


# files


def recording(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 3, 5, generator=generator) < 0.5
    trajectory = Trajectory(
        ids=torch.randint(0, 99, (2, 3, 5), generator=generator, dtype=torch.int32),
        mask=mask,
        confidence=torch.rand(2, 3, 5, generator=generator),
        committed=mask & (torch.rand(2, 3, 5, generator=generator) < 0.5),
        block=torch.tensor([[0, 0, 1], [0, 1, -1]]),
        valid=torch.tensor([[True, True, True], [True, True, False]]),
        prompt_lengths=torch.tensor([1, 2]),
        gen_length=3,
        pad_token_id=7,
    )
    return Recording(trajectory, 4 + seed)


def same(a, b):
    fields = [(getattr(a.trajectory, f.name), getattr(b.trajectory, f.name)) for f in dataclasses.fields(Trajectory)]
    return a.forward_passes == b.forward_passes and all(
        torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs for ours, theirs in fields
    )


def never():
    raise AssertionError("recorded although it is stored")


def test_round_trip(tmp_path):
    directory = tmp_path / "new" / "folder"
    assert same(cached_trajectory(directory, "k", recording), recording())
    assert [path.name for path in directory.iterdir()] == ["k.safetensors"]
    assert same(cached_trajectory(directory, "k", never), recording())
    assert same(cached_trajectory(directory, "other", lambda: recording(1)), recording(1))
    assert not same(recording(), recording(1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x10" * 1000)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forget(path: Path) -> None:
    tensors = load_file(path)
    del tensors["block"]
    save_file(tensors, path, metadata={"format": "2"})


def rename(path: Path) -> None:
    """Another recording under this name."""
    cached_trajectory(path.parent, "other", lambda: recording(1))
    (path.parent / "other.safetensors").replace(path)


def anonymous(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [truncate, empty, garbage, flip, forget, rename, anonymous])
def test_damaged_files_are_recorded_anew(damage, tmp_path, caplog):
    cached_trajectory(tmp_path, "k", recording)
    damage(tmp_path / "k.safetensors")
    with caplog.at_level(logging.WARNING):
        assert same(cached_trajectory(tmp_path, "k", recording), recording())
    assert "k.safetensors is damaged" in caplog.text
    assert "recording anew" in caplog.text
    assert same(cached_trajectory(tmp_path, "k", never), recording())


def test_other_layouts_are_recorded_anew(tmp_path, monkeypatch, caplog):
    cached_trajectory(tmp_path, "k", recording)
    monkeypatch.setattr(cache, "FORMAT_VERSION", 3)
    assert same(cached_trajectory(tmp_path, "k", lambda: recording(1)), recording(1))
    assert "format is '2', expected '3'" in caplog.text


def test_an_interrupted_recording_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_trajectory(tmp_path, "k", interrupted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_no_half_file(error, tmp_path, monkeypatch, caplog):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error("disk full")

    monkeypatch.setattr(cache, "save_file", half)
    if error is OSError:  # what was recorded is not lost
        assert same(cached_trajectory(tmp_path, "k", recording), recording())
        assert "cannot be written (disk full); going on without" in caplog.text
    else:
        with pytest.raises(KeyboardInterrupt):
            cached_trajectory(tmp_path, "k", recording)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_an_error_before_recording(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        cached_trajectory(tmp_path / "file", "k", never)


def test_the_default_directory_lies_in_the_hugging_face_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path))
    assert cache_directory("default") == tmp_path / "dllmquant" / "trajectories"
    assert cache_directory("~/mine") == Path.home() / "mine"
    assert cache_directory("other") == Path("other")


# in use


def test_a_hit_runs_no_model(tmp_path, monkeypatch):
    model, tokenizer, prompts = tiny_llada(), tiny_tokenizer(), builtin_prompts(4, 0)
    request = Request(num_states=8, batch_size=3, cache=tmp_path)
    plain = trajectory_states(model, tokenizer, prompts, dataclasses.replace(request, cache=None))
    first = trajectory_states(model, tokenizer, prompts, request)
    assert (first.cost.cached, first.cost.forward_passes) == (False, plain.cost.forward_passes)
    assert plain.cost.forward_passes == 2 * 8

    def forward(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(model, "forward", forward)
    second = trajectory_states(model, tokenizer, prompts, request)
    assert second.cost.cached
    assert second.cost.counts() == first.cost.counts() == plain.cost.counts()
    assert "; read from the cache in " in second.cost.summary()
    assert second.coverage == first.coverage == plain.coverage
    for name in first.batch.__dataclass_fields__:
        assert torch.equal(getattr(first.batch, name), getattr(second.batch, name))
        assert torch.equal(getattr(first.batch, name), getattr(plain.batch, name))
    # Another selection of the same recording is a hit; another recording is not.
    assert trajectory_states(model, tokenizer, prompts, dataclasses.replace(request, num_states=5)).cost.cached
    for changes in ({"seed": 1}, {"sampler": {"steps": 4}}, {"batch_size": 4}):
        with pytest.raises(AssertionError, match="the model was run"):
            trajectory_states(model, tokenizer, prompts, dataclasses.replace(request, **changes))
    with pytest.raises(AssertionError, match="the model was run"):
        trajectory_states(model, tokenizer, prompts[:3], request)
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    with pytest.raises(AssertionError, match="the model was run"):
        trajectory_states(model, other, prompts, request)
    assert len(list(tmp_path.iterdir())) == 1
