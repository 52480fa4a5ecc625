"""Closed-loop states, and states handed from one quantizer to another."""

import copy

import pytest
import torch

from dllmquant import DLLMQuantizer, job, pipeline
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


RTN = {"solver": "rtn", "act_order": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": RTN, "transforms": [{"kind": "awq", "grid_points": 5}]},
        {"weights": RTN, "transforms": [{"kind": "smoothquant"}], "token_weights": {"kind": "uniform"}},
        {"weights": RTN, "transforms": [{"kind": "wush", "block_size": 16}]},
        {
            "weights": RTN,
            "transforms": [{"kind": "duquant", "block_size": 16, "steps": 8}],
            "token_weights": {"kind": "uniform"},
        },
        {"weights": RTN, "activations": {"allocation": {"mean_bits": 5}}},
        {"transforms": [{"kind": "quarot"}, {"kind": "smoothquant"}], "token_weights": {"kind": "interaction"}},
    ],
    ids=["awq", "smoothquant", "wush", "duquant", "bits", "folded"],
)
def test_everything_is_fitted_to_the_closed_loop_states(changes):
    """The result is that of a direct quantization with exactly the closed-loop states, not that of the first pass."""
    model, worker = run(closed(**changes))
    expected, direct = run(tiny_recipe(**changes), states=worker.states)
    assert same(model, expected)
    assert worker.allocation == direct.allocation
    first, other = run(tiny_recipe(**changes))
    assert worker.allocation != other.allocation if "activations" in changes else not same(model, first)


@pytest.mark.parametrize("failing", ["recording", "preparing", "solving"])
def test_a_failure_of_the_second_pass_leaves_the_model_untouched(failing, monkeypatch):
    def failing_from(call, function):
        calls = []

        def limited(*args, **kwargs):
            calls.append(1)
            if len(calls) >= call:
                raise ValueError("enough")
            return function(*args, **kwargs)

        return limited

    if failing == "recording":
        monkeypatch.setattr(job, "collect_states", failing_from(2, job.collect_states))
    elif failing == "preparing":
        monkeypatch.setattr(job, "prepare", failing_from(2, job.prepare))
    else:
        monkeypatch.setitem(pipeline._SOLVERS, "gptq", failing_from(14 + 3, pipeline._SOLVERS["gptq"]))
    recipe = closed(transforms=[{"kind": "quarot"}, {"kind": "smoothquant"}], attention={"search": True})
    model = tiny_llada()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="enough"):
        DLLMQuantizer(recipe).quantize(model, tokenizer=TOKENIZER, progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert all(installed(block) is None for block in model.model.transformer["blocks"])


def test_the_cost_is_that_of_both_passes():
    cost = run(closed())[1].states.cost
    first = run(tiny_recipe())[1].states.cost
    assert (cost.prompts, cost.forward_passes) == (2 * first.prompts, 2 * first.forward_passes)
    assert (cost.sequences, cost.tokens) == (2 * first.sequences, 2 * first.tokens)


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
