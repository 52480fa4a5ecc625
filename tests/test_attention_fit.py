"""Quantized attention end to end: what is fitted, what is stored, and what a checkpoint brings back."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from dllmquant import DLLMQuantizer
from dllmquant.attention_fit import AttentionReport
from dllmquant.capture import first_calls
from dllmquant.core.attention import PROBS_GRIDS
from dllmquant.models import adapter_for
from dllmquant.nn.attention import install, installed, uninstall
from dllmquant.nn.sdpa import capture_attention
from tests.oracles.attention_search import RATIOS, Call, search_softmax, search_values
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
    assert {line[1] for line in lines} == {"value scales", "softmax grid uniform fixed"}
    assert len(lines) == 4
    assert all(error <= full for *_, error, full in lines)


@torch.no_grad()
def attention_calls(model, states, weights):
    """By block, its attention calls as it was fitted to them: earlier blocks quantized, its own attention exact."""
    adapter = adapter_for(model)
    blocks, batch = adapter.block_list(model), states.batch
    calls = first_calls(model, blocks, adapter.denoiser(model), batch.ids, batch.attention_mask, 5)
    parts = list(zip(batch.attention_mask.split(5), weights.split(5), strict=True))
    found = []
    for block in blocks:
        quantizer = uninstall(block)
        seen = [capture_attention(block, lambda call=call, block=block: call.run(block)) for call in calls]
        install(block, quantizer)
        calls = [call.following(block) for call in calls]
        found.append(
            [
                Call(*(x.double().numpy() for x in (s.query, s.key, s.value)), real.numpy(), w.double().numpy())
                for s, (real, w) in zip(seen, parts, strict=True)
            ]
        )
    return found


GRIDS = {"probs_grid": "search", "probs_range": "search"}
FITS = {
    "head": ({"value_granularity": "head", "search": True}, 0.7),
    "channel": ({"value_granularity": "channel", "search": True, "probs_grid": "search"}, 0.7),
    "row": ({"value_granularity": "head", "search": True, "probs_range": "row"}, 0.0),
    "everything": ({"value_granularity": "channel", "search": True, **GRIDS}, 0.0),
    "queries and keys": (
        {"value_granularity": "channel", "search": True, "query_key_bits": 4, "rotate_query_key": True, **GRIDS},
        0.0,
    ),
    "queries and keys, fixed": ({"value_granularity": "head", "search": True, "query_key_bits": 4}, 0.7),
    "values alone": ({"probs_bits": None, "value_granularity": "channel", "search": True}, 0.7),
    "no search": ({"value_granularity": "channel"}, 0.0),
}


@pytest.mark.parametrize(("attention", "unmasked_base"), FITS.values(), ids=FITS)
def test_the_installed_quantizer_is_that_of_a_brute_force_search(attention, unmasked_base):
    """In every block: grid, range, ends, scales, and the reported errors, with 4 query heads and 2 value heads.

    With `unmasked_base` 0 the tokens that are decoded already count nothing as queries, but are read all the same.
    Errors are compared loosely: float32 takes ties of rounding the other way.
    """
    weighting = {"kind": "cgq", "unmasked_base": unmasked_base}
    model, quantizer = quantized(attention, grouped=True, token_weights=weighting)
    states, searches = quantizer.states, attention.get("search", False)
    padding = ~states.batch.attention_mask
    assert padding.any()
    assert (states.weights[padding] == 0).all()
    assert (states.weights[~padding] == 0).any() == (unmasked_base == 0)
    assert len(states.weights.unique()) > 10
    everything = attention_calls(model, states, states.weights)
    for block, calls, report in zip(
        model.model.transformer["blocks"], everything, quantizer.attention_reports, strict=True
    ):
        found = installed(block)
        exact = [
            call.probabilities(attention.get("query_key_bits"), attention.get("rotate_query_key", False))
            for call in calls
        ]
        signal = sum(c.error(a @ c.spread(c.value)).sum() for c, a in zip(calls, exact, strict=True))
        rounded = exact
        if attention.get("probs_bits", 4) is not None:
            grids = PROBS_GRIDS if attention.get("probs_grid") == "search" else ("uniform",)
            asked = attention.get("probs_range", "fixed")
            kinds = ("fixed", "row") if asked == "search" else (asked,)
            tried = [search_softmax(calls, exact, 4, grid, kind) for grid in grids for kind in kinds]
            best = min(tried, key=lambda choice: choice.error.sum())
            if searches:
                assert (found.scheme.probs_grid, found.scheme.probs_range) == (best.grid, best.range)
                errors = {f"{choice.grid} {choice.range}": choice.error.sum() / signal for choice in tried}
                assert report.softmax == pytest.approx(errors, rel=5e-3)
                assert report.chosen == f"{best.grid} {best.range}"
                assert report.softmax_full_range == pytest.approx(best.full_range_error.sum() / signal, rel=5e-3)
            else:
                best.ends[:] = 1
            if best.range == "row":
                assert found.probs_scale is None
            else:
                np.testing.assert_allclose(found.probs_scale.numpy(), best.ends, rtol=1e-6)
            rounded = [best.apply(probabilities, 4) for probabilities in exact]
        granularity = attention["value_granularity"]
        values = search_values(calls, rounded, 4, granularity, 2, RATIOS if searches else [1.0])
        np.testing.assert_allclose(found.value_scale.numpy(), values.step, rtol=1e-6)
        np.testing.assert_array_equal(found.value_zero.numpy(), values.zero)
        assert report.values == pytest.approx(values.error.sum() / signal, rel=5e-3)
        assert report.values_full_range == pytest.approx(values.full_range_error.sum() / signal, rel=5e-3)
        assert (len(np.unique(values.ratio)) > 1) == searches  # else the choice was hardly tested


def test_reports_are_in_the_checkpoint_and_the_same_for_the_same_seed(tmp_path):
    attention = {"value_granularity": "channel", "search": True, **GRIDS}
    texts = []
    for name in ("a", "b"):
        model, quantizer = quantized(attention)
        model.save_pretrained(tmp_path / name)
        texts.append((tmp_path / name / "config.json").read_text())
    assert texts[0] == texts[1]
    stored = json.loads(texts[0])["quantization_config"]["attention_reports"]
    assert [AttentionReport(**report) for report in stored] == quantizer.attention_reports
    assert [report.block for report in quantizer.attention_reports] == [f"model.transformer.blocks.{i}" for i in (0, 1)]
    assert [len(report.softmax) for report in quantizer.attention_reports] == [6, 6]


def test_nothing_fitted_nothing_reported():
    _, quantizer = quantized({})
    assert quantizer.attention_reports == []
    assert quantizer.states is not None


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
