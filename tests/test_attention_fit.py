"""Quantized attention end to end: what is fitted, what is stored, and what a checkpoint brings back."""

import copy

import pytest
import torch
from transformers import AutoModel

from dllmquant import DLLMQuantizer
from dllmquant.nn.attention import installed
from tests.tiny import tiny_llada, tiny_recipe, tiny_tokenizer

SCHEMES = {
    "dynamic": {},
    "log2": {"probs_grid": "log2"},
    "static head": {"value_granularity": "head"},
    "row": {"probs_grid": "log_sqrt2", "probs_range": "row"},
    "searched": {"value_granularity": "channel", "search": True, "probs_grid": "search", "probs_range": "search"},
    "searched ends": {"search": True, "probs_grid": "search"},
    "queries and keys": {"query_key_bits": 8, "rotate_query_key": True},
    "values only": {"probs_bits": None, "value_bits": 8},
}


def quantized(attention, **changes):
    model = tiny_llada(n_kv_heads=2) if changes.pop("grouped", False) else tiny_llada()
    quantizer = DLLMQuantizer(tiny_recipe(attention=attention, **changes))
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    return model, quantizer


def logits(model, states):
    with torch.no_grad():
        return model(states.batch.ids, attention_mask=states.batch.attention_mask).logits


@pytest.mark.parametrize("grouped", [False, True], ids=["all heads", "grouped"])
@pytest.mark.parametrize("attention", SCHEMES.values(), ids=SCHEMES)
def test_checkpoints_bring_the_attention_back_bit_by_bit(attention, grouped, tmp_path):
    model, quantizer = quantized(attention, grouped=grouped)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(model, quantizer.states), logits(again, quantizer.states))
    for block, loaded in zip(model.model.transformer["blocks"], again.model.transformer["blocks"], strict=True):
        assert installed(loaded).scheme == installed(block).scheme


def test_attention_is_quantized_in_every_block_and_changes_the_logits():
    model, quantizer = quantized({})
    plain, _ = quantized(None)
    assert all(installed(block) is not None for block in model.model.transformer["blocks"])
    assert not torch.equal(logits(model, quantizer.states), logits(plain, quantizer.states))


def test_more_bits_come_closer():
    plain, quantizer = quantized(None)
    exact = logits(plain, quantizer.states)
    errors = []
    for bits in (4, 8):
        model, _ = quantized({"probs_bits": bits, "value_bits": bits, "value_granularity": "channel"})
        errors.append(float((logits(model, quantizer.states) - exact).norm()))
    assert errors[1] < errors[0] / 2


def test_the_layers_after_the_attention_are_solved_for_quantized_attention():
    with_attention, _ = quantized({"probs_bits": 4, "value_bits": 4})
    without, _ = quantized(None)
    first = "model.transformer.blocks.0."
    for name, same in (("q_proj", True), ("v_proj", True), ("attn_out", False)):
        ours, theirs = (m.get_submodule(first + name).weight for m in (with_attention, without))
        assert torch.equal(ours, theirs) == same, name


def test_searched_scales_are_no_worse_than_the_full_range(caplog):
    with caplog.at_level("INFO", logger="dllmquant.attention_fit"):
        quantized({"value_granularity": "channel", "search": True})
    lines = [record.args for record in caplog.records if "attention output error" in record.message]
    assert {line[0] for line in lines} == {"value scales", "softmax grid"}
    assert all(error <= full for _, error, full in lines)


def test_skipped_readers_do_not_keep_the_attention_from_being_quantized():
    model, _ = quantized(
        {}, skip=("model.transformer.blocks.*.attn_out", "model.transformer.blocks.*.ff_*", "*.up_proj")
    )
    assert all(installed(block) is not None for block in model.model.transformer["blocks"])


def test_failure_takes_the_quantizer_out_again(monkeypatch):
    from dllmquant import pipeline

    solver, calls = pipeline._SOLVERS["gptq"], []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("no solution")
        return solver(*args, **kwargs)

    monkeypatch.setitem(pipeline._SOLVERS, "gptq", failing)
    model = tiny_llada()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no solution"):
        DLLMQuantizer(tiny_recipe(attention={})).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert installed(model.model.transformer["blocks"][0]) is None
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_data_free_recipes_quantize_attention_too():
    model = tiny_llada()
    DLLMQuantizer("rtn-w4a4-av").quantize(model, progress=False)
    assert all(installed(block) is not None for block in model.model.transformer["blocks"])
