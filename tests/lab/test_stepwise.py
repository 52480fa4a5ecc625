import math

import numpy as np
import pytest
import torch

from dllmquant.generation import generate_tokens
from dllmquant.lab import stepwise
from dllmquant.lab.stepwise import Reference, record_reference, step_errors
from dllmquant.tasks import take
from tests.tiny import tiny_llada, tiny_tokenizer

PROMPTS = [item.prompt for item in take("math", "heldout", 3)]


@pytest.fixture(scope="module")
def model():
    return tiny_llada(init_std=0.5)


@pytest.fixture(scope="module")
def other():
    changed = tiny_llada(init_std=0.5)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return changed


@pytest.fixture(scope="module")
def reference(model) -> Reference:
    return record_reference(model, tiny_tokenizer(), PROMPTS, batch_size=5)


def test_reference_holds_every_state(reference: Reference) -> None:
    assert (reference.prompts, reference.steps, reference.block_starts) == (3, 8, (4,))
    assert reference.where == tuple((prompt, step) for prompt in range(3) for step in range(8))
    assert [len(batch) for batch in reference.batches] == [5, 5, 5, 5, 4]
    masked = torch.cat([batch.mask.sum(dim=1) for batch in reference.batches])
    assert masked.tolist() == [8 - step for _ in range(3) for step in range(8)]


def test_a_model_has_no_error_against_itself(reference: Reference, model) -> None:
    errors = step_errors(reference, model)
    for curve in (errors.kl, errors.disagreement):
        assert curve.mean == curve.low == curve.high == (0.0,) * 8


@torch.no_grad()
def _brute_force(p_model, q_model) -> tuple[np.ndarray, np.ndarray]:
    """KL and disagreement [prompts, steps]: one state, one masked position and one token at a time, in float64."""
    tokenizer = tiny_tokenizer()
    generation = generate_tokens(p_model, tokenizer, PROMPTS, record=True)
    trajectory = generation.trajectory
    assert trajectory is not None
    kl, differ = np.zeros((3, 8)), np.zeros((3, 8))
    vocabulary = [token for token in range(p_model.config.vocab_size) if token != tokenizer.mask_token_id]
    for prompt in range(3):
        for step in range(8):
            state = trajectory.state(prompt, step)
            ids = state.ids[state.attention_mask]  # without padding
            where = state.mask[state.attention_mask].nonzero().squeeze(1).tolist()
            p_logits, q_logits = (either(input_ids=ids[None]).logits[0].double() for either in (p_model, q_model))
            for position in where:
                p, q = (logits[position, vocabulary].softmax(0).tolist() for logits in (p_logits, q_logits))
                kl[prompt, step] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(where)
                differ[prompt, step] += (p.index(max(p)) != q.index(max(q))) / len(where)
    return kl, differ


def test_errors_match_brute_force(reference: Reference, model, other) -> None:
    kl, differ = _brute_force(model, other)
    errors = step_errors(reference, other)
    assert errors.kl.mean == pytest.approx(kl.mean(axis=0), rel=1e-4)
    assert errors.disagreement.mean == pytest.approx(differ.mean(axis=0))
    assert min(errors.kl.mean) > 0.05
    assert len(set(errors.disagreement.mean)) > 1
    for curve in (errors.kl, errors.disagreement):
        assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    assert all(low < high for low, high in zip(errors.kl.low, errors.kl.high, strict=True))


def test_batch_size_changes_nothing(reference: Reference, model, other) -> None:
    whole = record_reference(model, tiny_tokenizer(), PROMPTS, batch_size=64)
    assert step_errors(whole, other).kl.mean == pytest.approx(step_errors(reference, other).kl.mean, rel=1e-4)


def test_prompts_may_take_different_numbers_of_steps(model, other) -> None:
    reference = record_reference(model, tiny_tokenizer(), PROMPTS, threshold=0.25)
    counts = [sum(prompt == each for prompt, _ in reference.where) for each in range(3)]
    assert len(set(counts)) > 1
    assert reference.steps == max(counts)
    errors = step_errors(reference, other)
    assert len(errors.kl.mean) == reference.steps
    assert all(math.isfinite(value) for value in errors.kl.mean)


def test_the_interval_is_a_bootstrap_over_prompts() -> None:
    n = 400
    values = np.random.default_rng(0).normal(3.0, 2.0, size=n)
    reference = Reference((), (), tuple((prompt, 0) for prompt in range(n)), n, 1, ())
    curve = stepwise._curve(reference, values.tolist())
    error = values.std() / math.sqrt(n)
    assert curve.mean[0] == pytest.approx(values.mean())
    assert curve.low[0] == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert curve.high[0] == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_the_mode_of_the_model_is_restored(reference: Reference, other) -> None:
    other.train()
    try:
        step_errors(reference, other)
        assert other.training
    finally:
        other.eval()
