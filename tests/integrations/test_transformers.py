"""Loading packed checkpoints: devices, shards, types, memory; processes that know the plug-in, and that do not."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from dllmquant import DLLMQuantizer
from dllmquant.checkpoint import weight_bytes
from dllmquant.models import LLaDAModelLM
from dllmquant.models.diffusion_gemma.joint import denoise
from dllmquant.nn.linear import QuantLinear
from tests.models.test_end_to_end import shrunk
from tests.tiny import tiny_diffusion_gemma, tiny_llada, tiny_tokenizer

# Everything a checkpoint can hold: mixed widths, transforms with and without tensors, quantized attention, biases.
RICH = {
    "extends": "dllmquant-w4a4",
    "name": "rich",
    "weights": {"group_size": 16, "mixed": {"choices": [1, 2, 3], "mean": 2.0}},
    "transforms": [
        {"kind": "wush", "block_size": 8, "sites": ["ff_out"]},
        {"kind": "hadamard", "block_size": 16, "sites": ["attn_out"]},
    ],
    "attention": {"value_bits": 8, "value_granularity": "channel"},
    "calibration": {"num_states": 8, "num_prompts": 3},
}
IDS = torch.arange(2, 14)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    original = tiny_llada(include_bias=True)
    for parameter in original.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.1)
    return DLLMQuantizer(RICH).quantize(original, tokenizer=tiny_tokenizer(), progress=False)


@pytest.fixture(scope="module", params=["one file", "shards"])
def checkpoint(request, model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "out"
    model.save_pretrained(directory, **({"max_shard_size": "8KB"} if request.param == "shards" else {}))
    assert len(list(directory.glob("*.safetensors"))) == 1 or request.param == "shards"
    return directory


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, "auto", {"": torch.device("cpu")}], ids=str)
def test_every_device_map_gives_the_same_model(device_map, model, checkpoint):
    loaded = AutoModel.from_pretrained(checkpoint, device_map=device_map)
    assert torch.equal(logits(loaded), logits(model))
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_a_gpu_holds_packed_weights(device_map, model, checkpoint):
    loaded = AutoModel.from_pretrained(checkpoint, device_map=device_map)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    with torch.no_grad():
        found = loaded(IDS.cuda()).logits.cpu()
    # Sums run in another order, which may move an activation to the next level.
    assert torch.nn.functional.cosine_similarity(found.flatten(), logits(model).flatten(), dim=0) > 0.99


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM, LLaDAModelLM])
def test_every_class_that_knows_llada_loads_it(auto, model, checkpoint):
    assert torch.equal(logits(auto.from_pretrained(checkpoint)), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16, "auto"], ids=str)
def test_types_change_what_is_not_packed(dtype, checkpoint):
    loaded = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    assert loaded.dtype == wanted
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    stored = tensors(checkpoint)
    # Codes, scales, zero points and transforms are what the file holds, in its own types.
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == stored[name].dtype
        assert torch.equal(buffer, stored[name])
    assert logits(loaded).dtype == wanted
    assert bool(logits(loaded).isfinite().all())


def test_a_cast_model_is_the_one_quantized_in_that_type(tmp_path):
    """What `dtype=` gives equals quantizing the cast model, where rounding sees the same values."""
    rtn = {"weights": {"solver": "rtn", "bits": 4, "group_size": 16}, "calibration": None}
    half = DLLMQuantizer(rtn).quantize(tiny_llada().to(torch.bfloat16), progress=False)
    wide = DLLMQuantizer(rtn).quantize(tiny_llada().to(torch.bfloat16).float(), progress=False)
    wide.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path, dtype="bfloat16")), logits(half))


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_saved_again_every_file_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    AutoModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "first")


def test_shards_saved_again_are_the_same(checkpoint, tmp_path):
    """From the second time on: transformers deals the tensors of a loaded model to the shards in order of names."""
    for source, target in ((checkpoint, "second"), (tmp_path / "second", "third")):
        AutoModel.from_pretrained(source).save_pretrained(tmp_path / target, max_shard_size="8KB")
    assert len(list((tmp_path / "third").glob("*.safetensors"))) > 1
    assert files(tmp_path / "third") == files(tmp_path / "second")
    assert files(tmp_path / "third")["README.md"] == files(checkpoint)["README.md"]
    first, third = tensors(checkpoint), tensors(tmp_path / "third")
    assert first.keys() == third.keys()
    assert all(torch.equal(first[name], third[name]) and first[name].dtype == third[name].dtype for name in first)


def test_the_model_is_built_and_packed_without_memory(checkpoint, monkeypatch):
    """Packed layers take the place of float ones while all are on the meta device."""
    from dllmquant.integrations.transformers import DLLMQuantHfQuantizer

    swap = DLLMQuantHfQuantizer._process_model_before_weight_loading
    seen = []

    def watched(self, model, **kwargs):
        before = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
        swap(self, model, **kwargs)
        packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
        seen.append((before, {tensor.device.type for layer in packed for tensor in layer.buffers()}, len(packed)))

    monkeypatch.setattr(DLLMQuantHfQuantizer, "_process_model_before_weight_loading", watched)
    loaded = AutoModel.from_pretrained(checkpoint)
    assert seen == [({"meta"}, {"meta"}, 14)]
    size = weight_bytes(loaded)
    stored = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert stored == size.total_bytes


@pytest.mark.parametrize("name", ["wte.weight", "blocks.0.q_proj.weight", "blocks.1.ff_out.bias"])
def test_tensors_of_another_shape_are_an_error(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"model.transformer.{name}"] = stored[f"model.transformer.{name}"][:-1].clone()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"shape.*{name}|{name}.*shape"):
        AutoModel.from_pretrained(tmp_path)


PEAK = """
import sys
from pathlib import Path
import torch
import dllmquant
from transformers import AutoModel

def resident(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024

AutoModel.from_pretrained(sys.argv[1])  # whatever is set up once
for directory in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident("VmRSS")
    model = AutoModel.from_pretrained(directory)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()  # what is only mapped becomes resident
    print(resident("VmHWM") - before)
    del model, tensor
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peak memory")
def test_loading_never_holds_a_16_bit_copy(tmp_path):
    """Peak memory in a fresh process: that of the packed weights; the 16-bit model shows that a copy would be seen."""
    rtn = {"weights": {"solver": "rtn", "bits": 2, "group_size": 128}, "calibration": None}
    model = tiny_llada(d_model=1024, n_layers=4, n_heads=8, mlp_hidden_size=2048).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    full = sum(parameter.nbytes for parameter in model.parameters())
    DLLMQuantizer(rtn).quantize(model, progress=False).save_pretrained(tmp_path / "packed")
    DLLMQuantizer("rtn-w4a4").quantize(tiny_llada(), progress=False).save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("tiny", "packed", "full"))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    packed_peak, full_peak = map(int, done.stdout.split())
    assert full_peak > 0.9 * full
    assert packed_peak < 0.5 * full


LOAD = """
import sys
import torch
{setup}
from transformers import {auto}
model = {auto}.from_pretrained(sys.argv[1], device_map="auto")
assert torch.equal(model(torch.arange(2, 14)[None]).logits, torch.load(sys.argv[2]))
"""
UNREGISTERED = """
import dllmquant
from transformers.quantizers import auto
del auto.AUTO_QUANTIZER_MAPPING["dllmquant"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dllmquant"]
"""


@pytest.mark.parametrize(
    ("setup", "auto", "message"),
    [
        ("import dllmquant", "AutoModelForMaskedLM", None),
        ("", "AutoModel", "llada"),
        (UNREGISTERED, "AutoModel", "shape"),
    ],
    ids=["imported", "not imported", "family only"],
)
def test_fresh_processes_get_the_model_or_an_error(setup, auto, message, model, tmp_path):
    """Without network, from shards."""
    model.save_pretrained(tmp_path / "out", max_shard_size="8KB")
    torch.save(logits(model), tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(setup=setup, auto=auto), str(tmp_path / "out"), str(tmp_path / "logits.pt")],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if message is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "from_pretrained" in done.stderr
        assert message in done.stderr.splitlines()[-1] or message in done.stderr
        assert "AssertionError" not in done.stderr


# transformers knows DiffusionGemma by itself. Its experts are stored under other names than the fused ones it asks for.
EXPERTS_ONLY = shrunk("rtn-w4a16") | {"skip": ["*.self_attn.*", "*.mlp.*"]}
TWO_CLASSES = """
import sys
import torch
{setup}
from transformers import AutoModel, DiffusionGemmaForBlockDiffusion

torch.set_num_threads(1)
if {setup!r}:
    from dllmquant.models.diffusion_gemma.joint import denoise
    ids, expected = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    for cls in (AutoModel, DiffusionGemmaForBlockDiffusion):
        try:
            model = cls.from_pretrained(directory)
        except RuntimeError as error:
            print("refused", error)
        else:
            with torch.no_grad():
                print("loaded", {setup!r} and torch.equal(denoise(model, ids, ids >= 0), expected[directory]))
"""


@pytest.mark.parametrize("setup", ["import dllmquant", ""], ids=["imported", "not imported"])
def test_fresh_processes_never_get_random_experts(setup, tmp_path):
    directories, expected, ids = [], {}, torch.arange(2, 22)[None]
    for name, recipe in (("experts", EXPERTS_ONLY), ("whole", shrunk("rtn-w4a16"))):
        model = DLLMQuantizer(recipe).quantize(tiny_diffusion_gemma(), progress=False)
        packed = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
        assert all(".experts." in path for path in packed) == (name == "experts")
        directories.append(str(tmp_path / name))
        model.save_pretrained(directories[-1], max_shard_size="8KB")
        with torch.no_grad():
            expected[directories[-1]] = denoise(model, ids, ids >= 0)
    torch.save((ids, expected), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", TWO_CLASSES.format(setup=setup), str(tmp_path / "expected.pt"), *directories],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith(("loaded", "refused"))]
    if setup:
        assert answers == ["loaded True"] * 4
    else:
        assert len(answers) == 4
        assert all(answer.startswith("refused") and "ignore_mismatched_sizes" in answer for answer in answers)


def test_checkpoints_without_placeholders_for_experts_still_load(tmp_path):
    """Those of earlier versions; saved again they have them."""
    model, ids = DLLMQuantizer(EXPERTS_ONLY).quantize(tiny_diffusion_gemma(), progress=False), torch.arange(2, 22)[None]
    for directory in ("new", "old"):
        model.save_pretrained(tmp_path / directory)
    stored = tensors(tmp_path / "old")
    placeholders = [
        f"model.decoder.layers.{i}.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")
    ]
    assert [stored.pop(name).tolist() for name in placeholders] == [[0]] * 4
    save_file(stored, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModel.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(denoise(loaded, ids, ids >= 0), denoise(model, ids, ids >= 0))
    loaded.save_pretrained(tmp_path / "again")
    name = "model.safetensors"
    assert files(tmp_path / "again")[name] == files(tmp_path / "new")[name]
