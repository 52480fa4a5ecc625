"""Exports of every family of ours, read by a process without dllmquant: the same logits, with the code beside them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from dllmquant.export import export_model
from tests.export.fresh import load_fresh
from tests.export.quantized import IDS, logits_of, quantized
from tests.tiny import (
    tiny_dream,
    tiny_fast_dllm,
    tiny_llada2,
    tiny_llada_moe,
    tiny_sdar,
    tiny_sdar_moe,
)

BUILDERS: tuple[Callable[[], PreTrainedModel], ...] = (
    tiny_dream,
    tiny_fast_dllm,
    tiny_llada2,
    tiny_llada_moe,
    tiny_sdar,
    tiny_sdar_moe,
)


def test_compressed_tensors_and_dequantized_weights_give_our_logits(tmp_path: Path) -> None:
    """All families in one fresh process, which starts slowly."""
    expected, directories = {}, {}
    for build in BUILDERS:
        model = quantized("rtn-w4a16", build(), weights={"group_size": 16})
        for form in ("compressed-tensors", "dequantized"):
            name = f"{build.__name__}-{form}"
            expected[name], directories[name] = logits_of(model), tmp_path / name
            export_model(model, directories[name], form)
    loaded = load_fresh(directories, IDS, tmp_path)
    for name, logits in expected.items():
        assert torch.equal(loaded[name].logits, logits), name
        assert "transformers_modules" in loaded[name].module


# What is skipped of a LLaDA2 whose first block of three is dense, and how many layers there are left.
MIXTURES: dict[str, tuple[Callable[[], PreTrainedModel], list[str], int]] = {
    "nothing but mixtures": (tiny_llada_moe, [], 2 * (4 + 3 * 4)),
    "a dense block": (lambda: tiny_llada2(num_hidden_layers=3), [], 3 * 2 + 3 + 2 * (3 * 6 + 3)),
    "all experts skipped": (lambda: tiny_llada2(num_hidden_layers=3), ["*.mlp.experts.*"], 3 * 2 + 3 + 2 * 3),
    "the dense block skipped": (lambda: tiny_llada2(num_hidden_layers=3), ["*.0.mlp.*"], 3 * 2 + 2 * (3 * 6 + 3)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_layouts_that_name_layers_once_for_all_blocks_have_the_blocks_of_a_mixture(name: str, tmp_path: Path) -> None:
    """GPTQ's. Of its readers, Optimum takes linear layers whose names end as listed, GPTQModel all that are not out."""
    build, skip, count = MIXTURES[name]
    model = quantized("rtn-w4a16", build(), weights={"group_size": 16}, skip=skip)
    export_model(model, tmp_path, "gptq")
    stored = {key.removesuffix(".qweight") for key in load_file(tmp_path / "model.safetensors") if "qweight" in key}
    assert len(stored) == count
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    blocks, kept = config["block_name_to_quantize"], [name for (name,) in config["modules_in_block_to_quantize"]]
    linears = {
        path for path, part in build().named_modules() if isinstance(part, nn.Linear) and path.startswith(blocks)
    }
    assert {path for path in linears if path.endswith(tuple(kept))} == stored
    out = [pattern.removeprefix("-:") for pattern in config["dynamic"]]
    assert {path for path in linears if not any(re.match(pattern, path) for pattern in out)} == stored


def test_layers_skipped_in_some_of_the_blocks_that_have_them_are_refused(tmp_path: Path) -> None:
    model = quantized("rtn-w4a16", tiny_llada2(num_hidden_layers=3), skip=["*.1.mlp.experts.4.down_proj"])
    with pytest.raises(ValueError, match=r"mlp\.experts\.4\.down_proj is quantized in 1 of the 2 blocks that have it"):
        export_model(model, tmp_path / "out", "gptq")
