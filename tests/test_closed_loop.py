"""Closed-loop states, and states handed from one quantizer to another."""

import copy

import pytest
import torch

from dllmquant import DLLMQuantizer, job
from dllmquant.nn.attention import installed
from dllmquant.nn.linear import QuantLinear
from tests.tiny import tiny_llada, tiny_recipe, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def run(recipe, **options):
    """Quantizes a tiny model and returns it with its quantizer."""
    model = tiny_llada()
    worker = DLLMQuantizer(recipe)
    worker.quantize(model, tokenizer=TOKENIZER, progress=False, **options)
    return model, worker


def closed(**changes):
    recipe = tiny_recipe(**changes)
    recipe["calibration"] = recipe["calibration"] | {"states": "closed_loop"}
    return recipe


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_states_come_from_the_quantized_model(monkeypatch):
    seen = []
    collect = job.collect_states

    def watched(model, *args, **kwargs):
        packed = sum(isinstance(module, QuantLinear) for module in model.modules())
        states = collect(model, *args, **kwargs)
        seen.append((packed, args[2].states, states.content_hash()))
        return states

    monkeypatch.setattr(job, "collect_states", watched)
    model, worker = run(closed())
    assert [entry[:2] for entry in seen] == [(0, "trajectory"), (14, "closed_loop")]
    assert seen[0][2] != seen[1][2] == worker.states.content_hash()
    assert model.config.quantization_config.states_hash == seen[1][2]


@pytest.mark.parametrize("attention", [None, {"search": True, "value_granularity": "channel"}])
def test_the_second_pass_starts_from_the_original(attention, monkeypatch):
    """Were the second pass given the first one's states, it would end where the first one did."""
    collect, first = job.collect_states, []

    def repeated(*args, **kwargs):
        if not first:
            first.append(collect(*args, **kwargs))
        return first[0]

    expected, _ = run(tiny_recipe(attention=attention))
    monkeypatch.setattr(job, "collect_states", repeated)
    model, _ = run(closed(attention=attention))
    assert same(model, expected)
    assert (installed(model.model.transformer["blocks"][0]) is None) == (attention is None)


def test_closed_loop_is_deterministic():
    assert same(run(closed())[0], run(closed())[0])


def test_given_states_are_used_instead_of_new_ones(monkeypatch):
    expected, worker = run(tiny_recipe())
    monkeypatch.setattr(job, "collect_states", None)  # would fail if it were called
    again, second = run(tiny_recipe(), states=worker.states)
    assert same(again, expected)
    assert second.states.content_hash() == worker.states.content_hash()


def test_given_states_get_the_recipes_token_weights():
    _, worker = run(tiny_recipe())
    uniform = tiny_recipe(token_weights={"kind": "uniform"})
    ours, second = run(uniform, states=worker.states)
    assert same(ours, run(uniform)[0])
    assert set(second.states.weights.unique().tolist()) <= {0.0, 1.0}


def test_data_free_recipes_refuse_states():
    _, worker = run(tiny_recipe())
    model = tiny_llada()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="uses no calibration data"):
        DLLMQuantizer("rtn-w4a4").quantize(model, states=worker.states, progress=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
