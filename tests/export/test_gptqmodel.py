"""GPTQ exports in the programs that read them: GPTQModel, and transformers with Optimum and GPTQModel.

GPTQModel needs a NumPy of its own, so these tests run in another environment than the rest:

    pip install gptqmodel optimum pytest pytest-timeout hypothesis -e .
    pytest tests/export/test_gptqmodel.py
"""

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dllmquant.export import export_model
from dllmquant.export.gptq import gptq_tensors
from dllmquant.nn.linear import QuantLinear
from tests.export.fresh import environment
from tests.export.quantized import IDS, logits_of, nmse, quantized
from tests.export.test_gptq import layer_of
from tests.tiny import (
    tiny_dream,
    tiny_fast_dllm,
    tiny_llada,
    tiny_llada2,
    tiny_llada_moe,
    tiny_sdar,
    tiny_sdar_moe,
    tiny_tokenizer,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")

KERNELS = list(itertools.product((2, 3, 4, 8), (32, None), (True, False)))  # bits, group size, symmetric

DEQUANTIZE = """
import sys
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

cases, results = torch.load(sys.argv[1]), []
for bits, group_size, symmetric, tensors in cases:
    layer = TorchLinear(bits, group_size, symmetric, False, tensors["g_idx"].numel(), tensors["scales"].shape[1])
    layer.load_state_dict(tensors)
    convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.optimized = True  # no compilation
    layer.post_init()
    results.append(layer.eval().dequantize_weight().T)
torch.save(results, sys.argv[2])
"""

LOAD = """
import sys
import torch
from transformers import AutoModel, GPTQConfig
from gptqmodel import BACKEND, GPTQModel

(ids, jobs), results = torch.load(sys.argv[1]), {}
for name, (reader, directory, dtype) in jobs.items():
    if reader == "gptqmodel":
        model = GPTQModel.load(
            directory, trust_remote_code=True, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=dtype
        ).model
    else:
        options = GPTQConfig(bits=4, backend="gptq_torch")
        model = AutoModel.from_pretrained(
            directory, trust_remote_code=True, device_map="cpu", dtype=dtype, quantization_config=options
        )
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        results[name] = model.eval()(ids).logits
assert not any(name.partition(".")[0] == "dllmquant" for name in sys.modules)
torch.save(results, sys.argv[2])
"""


def answer(program: str, question: Any, scratch: Path) -> Any:
    """Runs a program in a process of its own, with a file in and a file out."""
    given, results = scratch / "given.pt", scratch / "results.pt"
    torch.save(question, given)
    # The first variable lets GPTQModel run on two cores, the second keeps it from compiling for minutes.
    own = {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, str(given), str(results)],
        check=False,
        capture_output=True,
        text=True,
        cwd=scratch,
        env=environment(scratch) | own,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return torch.load(results)


@pytest.fixture(scope="module")
def dequantized(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    layers = [(kernel, gptq_tensors(layer_of(*kernel))) for kernel in KERNELS]
    cases = [(bits, group_size or -1, symmetric, tensors) for (bits, group_size, symmetric), tensors in layers]
    results: list[Tensor] = answer(DEQUANTIZE, cases, tmp_path_factory.mktemp("layers"))
    return results


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_its_layer_holds_our_weight_in_float16(kernel, dequantized):
    weight = layer_of(*kernel).quantized_weight().dequantize(torch.float16)
    assert torch.equal(dequantized[KERNELS.index(kernel)], weight)


FAMILIES = (tiny_fast_dllm, tiny_llada2, tiny_llada_moe, tiny_sdar, tiny_sdar_moe)


def grouped(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return quantized("rtn-w4a16", build(), weights={"group_size": 16})


MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "LLaDA in transformers": ("transformers", lambda: quantized("rtn-w4a16")),
    "LLaDA by GPTQ in transformers": ("transformers", lambda: quantized("gptq-w4a16", calibrated=True)),
    "Dream in transformers": ("transformers", lambda: quantized("rtn-w4a16", tiny_dream())),
    **{f"{build.__name__} in transformers": ("transformers", partial(grouped, build)) for build in FAMILIES},
    "skipped layers in transformers": ("transformers", lambda: quantized("rtn-w4a16", tiny_llada(), skip=["*.ff_out"])),
    # GPTQModel knows Dream, and takes asymmetric weights in version 1 of the layout only from itself.
    "Dream in GPTQModel": ("gptqmodel", lambda: quantized("rtn-w4a16", tiny_dream(), weights={"symmetric": True})),
    "skipped layers in GPTQModel": (
        "gptqmodel",
        lambda: quantized("rtn-w4a16", tiny_dream(), weights={"symmetric": True}, skip=["*.mlp.down_proj"]),
    ),
}


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Per model: our logits with weights and biases rounded to float16, as the reader holds them, and the reader's."""
    scratch, ours, jobs = tmp_path_factory.mktemp("models"), {}, {}
    for index, (name, (reader, make)) in enumerate(MODELS.items()):
        model = make()
        export_model(model, scratch / str(index), "gptq", tokenizer=tiny_tokenizer())
        dtype = torch.float32 if reader == "transformers" else torch.float16
        jobs[name] = (reader, str(scratch / str(index)), dtype)
        for path, layer in [item for item in model.named_modules() if isinstance(item[1], QuantLinear)]:
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = layer.quantized_weight().dequantize(torch.float16).float()
            if layer.bias is not None:
                plain.bias.data = layer.bias.half().float()
            model.set_submodule(path, plain)
        ours[name] = logits_of(model)
    theirs = answer(LOAD, (IDS, jobs), scratch)
    return {name: (ours[name], theirs[name]) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours(name, logits):
    ours, theirs = logits[name]
    assert nmse(theirs, ours) < (1e-11 if MODELS[name][0] == "transformers" else 1e-5)
