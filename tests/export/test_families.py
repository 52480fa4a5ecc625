"""Exports of every family of ours, read by a process without dllmquant: the same logits, with the code beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize("build", [tiny_llada_moe, tiny_llada2])
def test_layouts_that_name_layers_once_for_all_blocks(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """GPTQ's: a model whose first block is dense does not fit, one of nothing but mixtures does."""
    model = quantized("rtn-w4a16", build(), weights={"group_size": 16})
    if build is tiny_llada2:
        with pytest.raises(ValueError, match=r"is quantized in \d of \d blocks only"):
            export_model(model, tmp_path / "out", "gptq")
    else:
        export_model(model, tmp_path / "out", "gptq")
        assert (tmp_path / "out" / "quantize_config.json").exists()
