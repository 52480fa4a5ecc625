import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr
from scipy.special import softmax as scipy_softmax
from torch import Tensor

from dllmquant.decoding import StateBatch, Trajectory
from dllmquant.generation import generate_tokens
from dllmquant.lab.agreement import (
    BUCKETS,
    Agreement,
    chosen_positions,
    committed_tokens,
    divergence_summary,
    first_divergence,
    frontier_flips,
    kl_by_mask_ratio,
    kl_divergence,
    measure_agreement,
    record_agreement,
)
from dllmquant.models.llada import LLaDAModelLM
from tests.tiny import tiny_llada, tiny_tokenizer

PROMPTS = ["q: tom has 7 apples.", "x = 3", "q: what is 4+5? a:"]
SAMPLERS: list[dict[str, Any]] = [
    {},
    {"steps": 4},
    {"threshold": 0.2},
    {"cfg_scale": 1.5, "steps": 4},
    {"logits_eos_inf": True},
    {"confidence_eos_eot_inf": True},
]


def models() -> tuple[LLaDAModelLM, LLaDAModelLM]:
    """A model, and one a little off it."""
    original, other = tiny_llada(init_std=0.5), tiny_llada(init_std=0.5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return original, other


ORIGINAL, OTHER = models()


def trajectory_of(model: LLaDAModelLM, **sampler: Any) -> tuple[Trajectory, Tensor]:
    generation = generate_tokens(model, tiny_tokenizer(), PROMPTS, record=True, **sampler)
    assert generation.trajectory is not None
    return generation.trajectory, generation.tokens


def events(trajectory: Trajectory, tokens: Tensor, prompt: int) -> list[set[tuple[int, int]]]:
    """What each step of a prompt committed, read off the states before and after it."""
    final: Tensor = trajectory.ids[prompt, 0].clone().long()
    final[-trajectory.gen_length :] = tokens[prompt]
    states: list[Tensor] = [
        *(trajectory.ids[prompt, step].long() for step in range(int(trajectory.num_steps[prompt]))),
        final,
    ]
    return [
        {(position, int(after[position])) for position in range(len(after)) if before[position] != after[position]}
        for before, after in itertools.pairwise(states)
    ]


# the arrays


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_committed_tokens_are_what_turns_a_state_into_the_next(sampler: dict[str, Any]) -> None:
    trajectory, tokens = trajectory_of(ORIGINAL, **sampler)
    found = committed_tokens(trajectory, tokens)
    for prompt in range(trajectory.num_prompts):
        expected = events(trajectory, tokens, prompt)
        for step, row in enumerate(found[prompt].tolist()):
            pairs = {(position, token) for position, token in enumerate(row) if token != -1}
            assert pairs == (expected[step] if step < len(expected) else set())


def test_committed_tokens_needs_the_generations() -> None:
    trajectory, tokens = trajectory_of(ORIGINAL)
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 7\); valid: \(3, 8\)"):
        committed_tokens(trajectory, tokens[:, :-1])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_first_divergence_of_real_runs(sampler: dict[str, Any]) -> None:
    runs = [trajectory_of(model, **sampler) for model in (ORIGINAL, OTHER)]
    found = first_divergence(*(committed_tokens(*run) for run in runs)).tolist()
    for prompt, step in enumerate(found):
        a, b = (events(*run, prompt) for run in runs)
        differing = [index for index, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y]
        assert step == (differing[0] if differing else -1)
    assert max(found) >= 0


commitments = st.integers(1, 3).flatmap(
    lambda steps: st.lists(
        st.lists(st.lists(st.integers(-1, 1), min_size=2, max_size=2), min_size=steps, max_size=steps),
        min_size=2,
        max_size=2,
    )
)


@settings(max_examples=40)
@given(commitments, commitments)
def test_first_divergence_by_loops(a: list[Any], b: list[Any]) -> None:
    expected = []
    for x, y in zip(a, b, strict=True):
        padded = [rows + [[-1, -1]] * (3 - len(rows)) for rows in (x, y)]
        expected.append(next((step for step in range(3) if padded[0][step] != padded[1][step]), -1))
    assert first_divergence(torch.tensor(a), torch.tensor(b)).tolist() == expected
    assert first_divergence(torch.tensor(b), torch.tensor(a)).tolist() == expected
    assert first_divergence(torch.tensor(a), torch.tensor(a)).tolist() == [-1, -1]


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 2, 4), (2, 5)])
def test_first_divergence_of_other_prompts(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"valid: three dimensions with the prompts and positions of a, \(2, 3, 5\)"):
        first_divergence(torch.zeros(2, 3, 5), torch.zeros(shape))


@pytest.mark.parametrize(
    ("first", "median", "never"),
    [
        ([0], 1.0, 0.0),
        ([-1], None, 1.0),
        ([4, 0, 2], 3.0, 0.0),
        ([4, 0, -1], 5.0, 1 / 3),
        ([4, -1], None, 0.5),
        ([1, 2, 3, -1], 3.5, 0.25),
    ],
)
def test_divergence_summary(first: list[int], median: float | None, never: float) -> None:
    found = divergence_summary(first)
    assert found[0] == median
    assert found[1] == pytest.approx(never)


def test_divergence_summary_of_nothing() -> None:
    with pytest.raises(ValueError, match="first is empty; valid: the first diverging step of at least one run"):
        divergence_summary([])


tables = st.lists(
    st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2), st.integers(0, 2)), min_size=3, max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40)
@given(tables)
def test_frontier_flips_by_loops(rows: list[list[tuple[int, int, int]]]) -> None:
    flips = position_flips = positions = token_flips = 0
    for row in rows:
        expected = {(position, token) for position, (token, _, _) in enumerate(row) if token >= 0}
        got = {(position, token) for position, (_, token, _) in enumerate(row) if token >= 0}
        flips += expected != got
        position_flips += {position for position, _ in expected} != {position for position, _ in got}
        positions += len(expected)
        token_flips += sum(row[position][2] != token for position, token in expected)
    found = frontier_flips(*torch.tensor(rows).permute(2, 0, 1))
    assert (found.states, found.flips, found.position_flips) == (len(rows), flips, position_flips)
    assert (found.positions, found.token_flips) == (positions, token_flips)


def test_kl_divergence() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (3 * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    found = kl_divergence(a.log_softmax(-1), b.log_softmax(-1))
    expected = rel_entr(scipy_softmax(a.numpy(), -1), scipy_softmax(b.numpy(), -1)).sum(-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert kl_divergence(a.log_softmax(-1), a.log_softmax(-1)).abs().max() == 0


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 9, width=32), st.integers(1, 16)), max_size=30))
def test_buckets_by_loops(pairs: list[tuple[float, int]]) -> None:
    """Ratios of a generation of 16 tokens, so that the ends of the buckets occur."""
    found = kl_by_mask_ratio(torch.tensor([kl for kl, _ in pairs]), torch.tensor([n / 16 for _, n in pairs]))
    assert [(bucket.low, bucket.high) for bucket in found] == list(BUCKETS)
    for index, bucket in enumerate(found):
        inside = [kl for kl, masked in pairs if 4 * index < masked <= 4 * (index + 1)]
        assert bucket.positions == len(inside)
        assert bucket.mean == (pytest.approx(math.fsum(inside) / len(inside)) if inside else None)


def test_chosen_positions() -> None:
    chosen = chosen_positions(1000, 100, seed=0)
    assert int(chosen.sum()) == 100
    assert all(5 <= int(part.sum()) <= 40 for part in chosen.split(200))
    assert torch.equal(chosen, chosen_positions(1000, 100, seed=0))
    assert not torch.equal(chosen, chosen_positions(1000, 100, seed=1))
    assert chosen_positions(7, 100, seed=0).all()


# models


def guided(model: LLaDAModelLM, ids: Tensor, attention: Tensor, sampler: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Logits of one state's generation, the mask token and, if so asked, EOS excluded."""
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        logits = model(input_ids=ids[None], attention_mask=attention[None]).logits[0].double().numpy()
        if sampler.get("cfg_scale"):
            hidden = ids.clone()
            hidden[:-8][attention[:-8]] = tokenizer.mask_token_id
            free = model(input_ids=hidden[None], attention_mask=attention[None]).logits[0].double().numpy()
            logits = free + (sampler["cfg_scale"] + 1) * (logits - free)
    never = [tokenizer.mask_token_id, *([tokenizer.eos_token_id] if sampler.get("logits_eos_inf") else [])]
    logits[:, never] = -np.inf
    result: np.ndarray[Any, Any] = logits[-8:]
    return result


def decisions(logits: np.ndarray[Any, Any], state: Any, sampler: dict[str, Any], count: int) -> set[tuple[int, int]]:
    """The (position, token) a greedy sampler commits, by sorting."""
    probabilities = scipy_softmax(logits, -1)
    eos = tiny_tokenizer().eos_token_id
    scored = []
    for position in range(8):
        if not state.mask[-8:][position] or position // 4 != state.block:
            continue
        token = int(logits[position].argmax())
        score = probabilities[position, token]
        if sampler.get("confidence_eos_eot_inf"):
            score = 0.0 if token == eos else score / (1 - probabilities[position, eos])
        scored.append((-score, position, token))
    scored.sort()
    if "threshold" in sampler:
        count = max(1, sum(-score >= sampler["threshold"] for score, _, _ in scored))
    return {(position, token) for _, position, token in scored[:count]}


def agreement_by_loops(sampler: dict[str, Any]) -> dict[str, Any]:
    trajectory, _ = trajectory_of(ORIGINAL, **sampler)
    found: dict[str, Any] = {"states": 0, "flips": 0, "position_flips": 0, "token_flips": 0, "positions": 0}
    kl: list[list[float]] = [[], [], [], []]
    for prompt, step in trajectory.valid.nonzero().tolist():
        state = trajectory.state(prompt, step)
        a, b = (guided(model, state.ids, state.attention_mask, sampler) for model in (ORIGINAL, OTHER))
        ours, theirs = (decisions(logits, state, sampler, int(state.committed.sum())) for logits in (a, b))
        found["states"] += 1
        found["flips"] += ours != theirs
        found["position_flips"] += {position for position, _ in ours} != {position for position, _ in theirs}
        found["positions"] += len(ours)
        found["token_flips"] += sum(int(b[position].argmax()) != token for position, token in ours)
        kept = np.isfinite(a[0])
        p, q = (log_softmax(logits[:, kept], -1) for logits in (a, b))
        for position in range(8):
            if state.mask[-8:][position]:
                index = math.ceil(4 * state.mask_ratio) - 1
                kl[index].append(float((np.exp(p[position]) * (p[position] - q[position])).sum()))
    return found | {"kl": kl}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("batch_size", [5, 64])
def test_agreement_by_loops(sampler: dict[str, Any], batch_size: int) -> None:
    tokenizer = tiny_tokenizer()
    reference = record_agreement(ORIGINAL, tokenizer, PROMPTS, batch_size=batch_size, **sampler)
    found = measure_agreement(reference, OTHER, tokenizer, batch_size=batch_size)
    expected = agreement_by_loops(sampler)
    kl = expected.pop("kl")
    assert vars(found.frontier) == expected
    assert found.frontier.flips > 0
    for bucket, values in zip(found.kl, kl, strict=True):
        assert bucket.positions == len(values)
        assert bucket.mean == (pytest.approx(np.mean(values), rel=1e-3) if values else None)
    runs = [committed_tokens(*trajectory_of(model, **sampler)) for model in (ORIGINAL, OTHER)]
    assert list(found.first_divergence) == first_divergence(*runs).tolist()


def test_the_original_agrees_with_itself() -> None:
    reference = record_agreement(ORIGINAL, tiny_tokenizer(), PROMPTS)
    ORIGINAL.train()
    found = measure_agreement(reference, ORIGINAL, tiny_tokenizer())
    assert ORIGINAL.training
    ORIGINAL.eval()
    assert found.first_divergence == (-1, -1, -1)
    assert (found.frontier.flips, found.frontier.position_flips, found.frontier.token_flips) == (0, 0, 0)
    assert [bucket.mean for bucket in found.kl] == [0, 0, 0, 0]


def masked(batches: Sequence[StateBatch]) -> int:
    return sum(int(batch.mask.sum()) for batch in batches)


def test_predictions_that_do_not_fit_are_sampled() -> None:
    tokenizer = tiny_tokenizer()
    reference, few = (
        record_agreement(ORIGINAL, tokenizer, PROMPTS, batch_size=5, prediction_bytes=size)
        for size in (2**30, 40 * 4 * len(tokenizer))
    )
    assert sum(len(part) for part in reference.log_probs) == masked(reference.batches) == 3 * 36
    assert sum(len(part) for part in few.log_probs) == 40
    everything, some = ({tuple(row.tolist()) for row in torch.cat(each.log_probs)} for each in (reference, few))
    assert some < everything
    found: Agreement = measure_agreement(few, ORIGINAL, tokenizer, batch_size=5)
    assert sum(bucket.positions for bucket in found.kl) == 40
    assert all(bucket.mean == 0 for bucket in found.kl)


@pytest.mark.parametrize("sampler", [{"temperature": 0.5}, {"remasking": "random"}], ids=str)
def test_random_samplers_have_no_agreement(sampler: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sampler draws random numbers .* valid: temperature 0 and 'low_confidence'"):
        record_agreement(ORIGINAL, tiny_tokenizer(), PROMPTS, **sampler)
