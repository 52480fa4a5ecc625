"""Half-written, corrupt and foreign checkpoints are errors, never models."""

import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from dllmquant import CheckpointError, DLLMQuantizer
from dllmquant.checkpoint import write_atomically
from tests.tiny import tiny_llada, tiny_recipe, tiny_tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    model = DLLMQuantizer(tiny_recipe()).quantize(tiny_llada(), tokenizer=tiny_tokenizer(), progress=False)
    model.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def edit_config(checkpoint, change):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path):
    target = tmp_path / "out"

    def write(staging):
        (staging / "config.json").write_text("{}")
        (staging / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, write)
    assert list(tmp_path.rglob("config.json")) == []
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModel.from_pretrained(target)


def test_a_write_killed_outright_leaves_no_checkpoint(tmp_path):
    """SIGKILL while weights are being written: no clean-up code runs."""
    program = """
import os, signal, sys
from pathlib import Path
from dllmquant.checkpoint import write_atomically
def write(staging):
    (staging / "config.json").write_text("{}")
    (staging / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), write)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModel.from_pretrained(tmp_path / "out")


def write_files(names, text):
    def write(staging):
        for name in names:
            path = staging / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return write


def contents(directory):
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def calls_of_replace(monkeypatch, act):
    """Counts renames, and does something before each."""
    replace, made = Path.replace, []

    def watched(self, target):
        made.append((Path(self), Path(target)))
        act(len(made), Path(self), Path(target))
        return replace(self, target)

    monkeypatch.setattr("pathlib.Path.replace", watched)
    return made


OLD = ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md", "part/a.py")
NEW = ("config.json", "model.safetensors", "README.md", "part/b.py")
RENAMES = 5 + 4  # of the old files and directories, of the new ones


@pytest.mark.parametrize("failing", range(1, RENAMES + 1))
@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_where_the_new_files_cannot_move_in_the_old_ones_stay(error, failing, tmp_path, monkeypatch):
    target = tmp_path / "out"
    write_atomically(target, write_files((*OLD, "notes.txt"), "old"))
    before = contents(target)

    def fail(call, _source, _target):
        if call == failing:
            raise error

    calls_of_replace(monkeypatch, fail)
    with pytest.raises(type(error)) as raised:
        write_atomically(target, write_files(NEW, "new"))
    complete = {path: text for path, text in contents(target).items() if path not in before}
    assert {path: text for path, text in contents(target).items() if path in before} == before
    if isinstance(error, OSError):  # what took hours to compute is not thrown away
        (kept,) = target.glob(".dllmquant-partial-*/new")
        assert f"its old files stay, the new ones, complete, are in {kept}: disk gone" in str(raised.value)
        assert contents(kept) == dict.fromkeys(NEW, "new")
        assert len(complete) == len(NEW)
    else:
        assert complete == {}


def test_where_nothing_moves_any_more_everything_is_still_there(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write_atomically(target, write_files(OLD, "old"))

    def fail(call, _source, _target):
        if call > 7:
            raise OSError("disk gone")

    calls_of_replace(monkeypatch, fail)
    with pytest.raises(OSError, match="neither could the new files move in"):
        write_atomically(target, write_files(NEW, "new"))
    assert not (target / "config.json").exists()
    assert sorted(contents(target).values()) == ["new"] * len(NEW) + ["old"] * len(OLD)


KILLED = """
import os, signal, sys
from pathlib import Path
from dllmquant.checkpoint import write_atomically
replace, calls = Path.replace, []
def killed(self, target):
    calls.append(self)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
def write(staging):
    for name in sys.argv[3:]:
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_text("new")
Path.replace = killed
write_atomically(Path(sys.argv[1]), write)
"""


def test_a_kill_while_files_move_in_leaves_no_checkpoint(tmp_path):
    target = tmp_path / "out"
    write_atomically(target, write_files(OLD, "old"))
    command = [sys.executable, "-c", KILLED, str(target), str(RENAMES - 1), *NEW]
    done = subprocess.run(command, check=False)
    assert done.returncode == -9
    assert not (target / "config.json").exists()
    assert sorted(contents(target).values()) == ["new"] * len(NEW) + ["old"] * len(OLD)
    write_atomically(target, write_files(NEW, "newer"))
    assert contents(target) == dict.fromkeys(NEW, "newer")


def test_config_moves_last(tmp_path, monkeypatch):
    moved = calls_of_replace(monkeypatch, lambda *_: None)
    names = ("config.json", "a.json", "model.safetensors", "zzz.json")
    write_atomically(tmp_path / "out", write_files(names, "{}"))
    assert sorted(target.name for _, target in moved) == sorted(names)
    assert moved[-1][1] == tmp_path / "out" / "config.json"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_config_moves_aside_first(tmp_path, monkeypatch):
    write_atomically(tmp_path, write_files(OLD, "old"))
    moved = calls_of_replace(monkeypatch, lambda *_: None)
    write_atomically(tmp_path, write_files(NEW, "new"))
    assert len(moved) == RENAMES
    assert moved[0][0] == tmp_path / "config.json"
    assert contents(tmp_path) == dict.fromkeys(NEW, "new")


def test_a_mount_point_is_written_without_leaving_it(tmp_path, monkeypatch):
    """Renames across the target's border fail, as between file systems, and beside the target nothing can be made."""
    target, mkdtemp = tmp_path / "mounted", tempfile.mkdtemp
    target.mkdir()

    def within(*, prefix, dir):
        if Path(dir).resolve() != target.resolve():
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return mkdtemp(prefix=prefix, dir=dir)

    def cross(_call, source, goal):
        if not (source.is_relative_to(target) and goal.is_relative_to(target)):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    monkeypatch.setattr("tempfile.mkdtemp", within)
    calls_of_replace(monkeypatch, cross)
    model = tiny_llada()
    for options in ({"max_shard_size": "20KB"}, {}):
        model.save_pretrained(target, **options)
        AutoModel.from_pretrained(target)
    assert [path.name for path in target.glob(".*")] == []
    assert [path.name for path in target.glob("model*")] == ["model.safetensors"]


def test_saving_over_a_sharded_checkpoint_leaves_no_stale_weights(tmp_path):
    model = tiny_llada()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    AutoModel.from_pretrained(tmp_path)


def test_a_file_as_target_is_an_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file"):
        tiny_llada().save_pretrained(tmp_path / "out")


def test_truncated_weights_are_an_error(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|metadata"):
        AutoModel.from_pretrained(checkpoint)


def test_missing_packed_tensors_are_an_error(checkpoint):
    name = "model.transformer.blocks.0.q_proj.weight_scale"
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"blocks\.0\.q_proj\.weight_scale"):
        AutoModel.from_pretrained(checkpoint)


def test_scales_that_are_not_positive_numbers_are_an_error(checkpoint):
    name = "model.transformer.blocks.1.ff_out.weight_scale"

    def corrupt(tensors):
        tensors[name][0, 0] = float("nan")

    edit_tensors(checkpoint, corrupt)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ff_out\.weight_scale"):
        AutoModel.from_pretrained(checkpoint)


def test_a_wrong_bit_width_in_the_config_is_an_error(checkpoint):
    def change(config):
        for scheme in config["quantization_config"]["modules"].values():
            scheme["weight"]["bits"] = 8

    edit_config(checkpoint, change)
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=99), "format_version is 99"),
        (lambda q: q.update(surprise=1), "surprise"),
        (lambda q: q["modules"].update({"model.nowhere": next(iter(q["modules"].values()))}), "model.nowhere"),
        (lambda q: next(iter(q["modules"].values()))["weight"].update(bits=7), "bits: 7"),
        (lambda q: next(iter(q["modules"].values())).pop("activation"), "malformed"),
        (lambda q: q["modules"].update({"model.transformer": next(iter(q["modules"].values()))}), "not Linear"),
    ],
)
def test_configs_that_do_not_make_sense_are_errors(checkpoint, change, message):
    edit_config(checkpoint, lambda config: change(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained(checkpoint)


UNREGISTERED = """
import dllmquant
from transformers.quantizers import auto
del auto.AUTO_QUANTIZER_MAPPING["dllmquant"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dllmquant"]
"""


@pytest.mark.parametrize("bits", [4, 8])
def test_without_the_plug_in_a_checkpoint_never_loads_with_other_weights(bits, tmp_path):
    """Fresh processes: one without dllmquant, one that knows LLaDA but not our quantization method, one with both."""
    recipe = {"weights": {"solver": "rtn", "bits": bits, "group_size": None}, "calibration": None}
    DLLMQuantizer(recipe).quantize(tiny_llada(), progress=False).save_pretrained(tmp_path)
    load = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    errors = {}
    for name, setup in (("nothing", ""), ("family only", UNREGISTERED), ("dllmquant", "import dllmquant")):
        done = subprocess.run([sys.executable, "-c", f"{setup}\n{load}"], check=False, capture_output=True, text=True)
        errors[name] = done.stderr if done.returncode else None
    assert errors["dllmquant"] is None
    assert errors["nothing"] is not None
    assert errors["family only"] is not None
    assert "shape" in errors["family only"]


def test_casting_a_reloaded_model_keeps_its_scales(checkpoint):
    model = AutoModel.from_pretrained(checkpoint)
    layer = model.model.transformer["blocks"][0].q_proj
    before = layer.weight_scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight_scale, before)
    assert layer.weight_scale.dtype == torch.float16
