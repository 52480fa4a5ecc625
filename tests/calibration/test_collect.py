"""`collect_states`: from the recipe's settings to weighted states, and what it says about them."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from dllmquant.calibration import DISTRIBUTIONS, CalibrationStates, builtin_prompts, collect_states, prompts_needed
from dllmquant.calibration.distributions import base
from dllmquant.core.cgq import token_weights
from dllmquant.core.frontier import frontier_weights
from dllmquant.settings import CalibrationSettings, TokenWeightSettings
from tests.tiny import tiny_llada, tiny_tokenizer

SMALL = {"num_states": 8, "num_prompts": 4, "batch_size": 3}


def collect(settings=None, weighting=None, *, prompts=None, seed=0):
    settings = CalibrationSettings(**(SMALL | (settings or {})))
    return collect_states(
        tiny_llada(),
        tiny_tokenizer(),
        builtin_prompts(10, 0) if prompts is None else prompts,
        settings,
        TokenWeightSettings(**(weighting or {})),
        seed=seed,
        progress=False,
    )


def test_the_recipe_knows_every_distribution():
    assert set(CalibrationSettings.model_fields["states"].annotation.__args__) == set(DISTRIBUTIONS)


@pytest.mark.parametrize(
    ("states", "needed"), [("trajectory", 4), ("closed_loop", 4), ("clean", 8), ("random_t", 8), ("mcs", 8)]
)
def test_prompts_needed(states, needed):
    assert prompts_needed(CalibrationSettings(states=states, **SMALL)) == needed


@pytest.mark.parametrize("states", ["trajectory", "clean", "random_t", "mcs"])
def test_only_the_first_prompts_are_used(states):
    settings = {"states": states}
    prompts = builtin_prompts(10, 0)
    needed = prompts_needed(CalibrationSettings(**SMALL, **settings))
    states = collect(settings)
    assert len(states.batch) == 8
    assert states.cost.prompts == needed
    assert states.content_hash() == collect(settings, prompts=prompts[:needed]).content_hash()
    assert states.content_hash() != collect(settings, prompts=prompts[1:]).content_hash()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"states": "mcs"}, {"states": "mcs", "visible_prefix": 0.5}),
        ({"states": "random_t"}, {"states": "mcs"}),
        ({}, {"quotas": (0.0, 0.5, 0.5, 0.0)}),
        ({}, {"sampler": {"steps": 4}}),
    ],
)
def test_settings_reach_the_states(one, other):
    assert collect(one).content_hash() != collect(other).content_hash()


def test_seeds_reach_the_states():
    for states in ("trajectory", "random_t", "mcs"):
        assert collect({"states": states}).content_hash() == collect({"states": states}).content_hash()
        assert collect({"states": states}).content_hash() != collect({"states": states}, seed=1).content_hash()


def test_buckets_and_quotas_shape_the_coverage():
    coverage = collect({"mask_ratio_buckets": 3, "quotas": (0.5, 0.5)}).coverage
    assert (coverage.segments, coverage.buckets) == (2, 3)


def test_the_cache_is_used(tmp_path):
    first, second = (collect({"cache": str(tmp_path / "trajectories")}) for _ in range(2))
    assert (first.cost.cached, second.cost.cached) == (False, True)
    assert first.cost.counts() == second.cost.counts()
    assert first.content_hash() == second.content_hash()
    assert list(tmp_path.glob("trajectories/*.safetensors"))


@pytest.mark.parametrize("states", ["trajectory", "random_t", "mcs"])
def test_weights(states):
    uniform = collect({"states": states})
    batch = uniform.batch
    assert torch.equal(uniform.weights, batch.attention_mask.float())
    cgq = collect({"states": states}, {"kind": "cgq", "unmasked_base": 0.5})
    expected = token_weights(batch.mask, batch.confidence, unmasked_base=0.5)
    assert torch.equal(cgq.weights, expected * batch.attention_mask)
    assert cgq.weights[batch.mask].min() > 1  # confidences are there
    frontier = collect({"states": states}, {"kind": "frontier", "frontier": 2.0})
    expected = frontier_weights(batch.mask, batch.committed, batch.confidence, frontier=2.0)
    assert torch.equal(frontier.weights, expected * batch.attention_mask)
    assert frontier.weights.max() > 2
    interaction = collect({"states": states}, {"kind": "interaction"})
    assert torch.equal(interaction.weights, uniform.weights)


def test_weights_of_the_text_count_its_tail_as_unmasked():
    states = collect({"states": "trajectory"})
    tail = torch.zeros_like(states.batch.mask)
    tail[::2, -3:] = True
    weighting = TokenWeightSettings(kind="cgq_text", unmasked_base=0.5)
    expected = token_weights(states.batch.mask & ~tail, states.batch.confidence, unmasked_base=0.5)
    found = replace(states, tail=tail).reweighted(weighting).weights
    assert torch.equal(found, expected * states.batch.attention_mask)
    assert not torch.equal(found, states.reweighted(weighting.model_copy(update={"kind": "cgq"})).weights)
    assert collect({"states": "trajectory"}, {"kind": "cgq_text"}).tail is not None
    with pytest.raises(ValueError, match=r"'cgq_text', but nothing says where the text .*ends; valid: 'cgq'"):
        replace(states, tail=None).reweighted(weighting)


def test_waiting_tokens_may_count_without_confidence():
    states = collect({"states": "trajectory", "sampler": {"steps": 4, "gen_length": 4, "block_length": 2}})
    assert states.waiting is not None
    assert states.waiting.any()
    weighting = TokenWeightSettings(kind="cgq", waiting_confidence="zero")
    expected = token_weights(states.batch.mask, torch.where(states.waiting, 0.0, states.batch.confidence))
    found = states.reweighted(weighting).weights
    assert torch.equal(found, expected * states.batch.attention_mask)
    assert bool((found[states.waiting] == 1).all())
    assert not torch.equal(found, states.reweighted(TokenWeightSettings(kind="cgq")).weights)
    with pytest.raises(ValueError, match=r"waiting_confidence: 'zero', but nothing says .*valid: 'model'"):
        replace(states, waiting=None).reweighted(weighting)


def test_cost_and_coverage_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        states = collect()
    assert states.cost.summary() in caplog.text
    assert states.coverage.summary() in caplog.text
    counts = r"4 prompts, 16 forward passes, 32 sequences, [\d,]+ tokens"
    assert re.fullmatch(rf"{counts}; \d+\.\d s \(\d+\.\d prompts/s\)", states.cost.summary())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_gaps_are_notes_and_warnings(caplog):
    states = collect({"num_states": 3})
    assert states.notes == ("recorded, but not selected, is segment 3 of 4 with 25 to 50% masked (8 states)",)
    assert [record.message for record in caplog.records] == [f"calibration states: {states.notes[0]}"]
    assert collect({"states": "clean"}).notes == ()


def test_closed_loop_states_are_not_those_of_the_original():
    with pytest.raises(ValueError, match="'closed_loop': the model holds no quantized layer"):
        collect({"states": "closed_loop"})


def test_states_made_by_hand_need_no_coverage():
    states = collect()
    by_hand = CalibrationStates(states.batch, states.weights)
    assert by_hand.content_hash() == states.content_hash()
    assert (by_hand.notes, by_hand.coverage, by_hand.cost) == ((), None, None)


def test_cost():
    cost = base.Cost(prompts=6, forward_passes=9, sequences=20, tokens=4000, seconds=1.5)
    assert cost.prompts_per_second == 4
    counts = {"prompts": 6, "forward_passes": 9, "sequences": 20, "tokens": 4000}
    assert cost.to_dict() == counts | {"seconds": 1.5, "cached": False}
    assert cost.counts() == counts
    assert cost.summary() == "6 prompts, 9 forward passes, 20 sequences, 4,000 tokens; 1.5 s (4.0 prompts/s)"
    assert replace(cost, cached=True).summary().endswith("4,000 tokens; read from the cache in 1.5 s")
    stored = base.Cost.from_counts(counts)
    assert stored == replace(cost, seconds=None)
    assert stored.summary() == "6 prompts, 9 forward passes, 20 sequences, 4,000 tokens"
    assert stored.prompts_per_second == base.Cost(6, 0, 0, 0, 0.0).prompts_per_second == 0
    both = cost + base.Cost(1, 2, 3, 4, 0.5, cached=True)
    assert both == base.Cost(7, 11, 23, 4004, 2.0)
    assert (cost + stored).seconds is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "cost: tokens: -1; valid: an integer of at least 0"),
        ({"tokens": 1.0}, "cost: tokens: 1.0; valid"),
        ({"tokens": True}, "cost: tokens: True; valid"),
        ({"seconds": 1}, "cost: .*; valid: a mapping of prompts, forward_passes, sequences, tokens"),
    ],
)
def test_counts_that_are_malformed(changes, message):
    counts = base.Cost(1, 2, 3, 4).counts()
    with pytest.raises(ValueError, match=message):
        base.Cost.from_counts(counts | changes)
    with pytest.raises(ValueError, match=r"cost: .*; valid: a mapping"):
        base.Cost.from_counts(list(counts))


def test_segments_of_quota_zero_are_not_missed():
    states = collect({"quotas": (0.5, 0.0, 0.0, 0.5)})
    assert [sum(row) for row in states.coverage.states] == [4, 0, 0, 4]
    assert states.notes == ()
