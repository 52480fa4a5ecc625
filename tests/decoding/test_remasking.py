import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from dllmquant.decoding import (
    Candidates,
    commit_above_threshold,
    commit_most_confident,
    forbid,
    guide,
    gumbel_argmax,
    propose,
)

INF = float("inf")
MASK = 4


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def everything(length: int) -> Tensor:
    return torch.ones((1, length), dtype=torch.bool)


def scores(*values: float) -> Candidates:
    tokens = torch.arange(len(values)).unsqueeze(0) + 10
    score = torch.tensor([values])
    return Candidates(tokens, torch.full_like(score, 0.5), score)


# guidance


def test_guide_is_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    given, free = torch.randn((2, 3, 5, 7), generator=generator, dtype=torch.float64)
    assert torch.equal(guide(given, free, 1.5), free + 2.5 * (given - free))
    torch.testing.assert_close(guide(given, free, 0.0), given)


def test_guide_keeps_impossible_tokens_impossible_and_widens() -> None:
    guided = guide(torch.tensor([1.0, -INF]).half(), torch.tensor([0.5, -INF]).half(), 1.0)
    assert guided.tolist() == [1.5, -INF]
    assert guided.dtype == torch.float32


def test_guide_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"unconditional has shape \(3,\); valid: .* \(2,\)"):
        guide(torch.zeros(2), torch.zeros(3), 1.0)


# forbidden tokens


def test_forbid_returns_a_changed_copy() -> None:
    logits = torch.zeros((1, 2, 4))
    assert forbid(logits, (1, 3)).tolist() == [[[0.0, -INF, 0.0, -INF]] * 2]
    assert torch.equal(logits, torch.zeros((1, 2, 4)))
    assert forbid(logits, ()) is logits


@pytest.mark.parametrize("token", [-1, 4])
def test_forbid_rejects_tokens_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(ValueError, match=rf"token_ids contains {token}; valid: 0 to 3"):
        forbid(torch.zeros((1, 2, 4)), (token,))


# Gumbel-max


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_gumbel_argmax_is_the_published_formula(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((500, 9), generator=generator, dtype=torch.float64)
    uniform = torch.rand((500, 9), generator=generator, dtype=torch.float64)
    published = (logits.exp() / (-torch.log(uniform)) ** temperature).argmax(-1)
    assert torch.equal(gumbel_argmax(logits, temperature, uniform), published)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_gumbel_argmax_samples_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.2, -0.5, 0.9, -1.5])
    draws = 40_000
    uniform = torch.rand((draws, 5), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    observed = gumbel_argmax(logits.expand(draws, 5), temperature, uniform).bincount(minlength=5)
    expected = (logits.double() / temperature).softmax(-1) * draws
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 0.01
    wrong = (logits.double() / (temperature * 1.1)).softmax(-1) * draws  # the test can tell temperatures apart
    assert stats.chisquare(observed.numpy(), wrong.numpy()).pvalue < 1e-6


def test_gumbel_argmax_survives_huge_logits_and_extreme_noise() -> None:
    logits = torch.tensor([[5000.0, 4000.0, 0.0], [1.0, 1.0, -INF]])
    uniform = torch.tensor([[0.5, 0.5, 0.5], [0.0, 1e-300, 1 - 2**-53]], dtype=torch.float64)
    assert gumbel_argmax(logits, 1.0, uniform).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("temperature", "uniform", "message"),
    [
        (0.0, torch.rand(2, dtype=torch.float64), r"temperature is 0.0; valid: a number above 0"),
        (math.nan, torch.rand(2, dtype=torch.float64), r"temperature is nan"),
        (
            1.0,
            torch.rand(3, dtype=torch.float64),
            r"uniform has shape \(3,\) .* valid: a float64 tensor of shape \(2,\)",
        ),
        (1.0, torch.rand(2), r"uniform has shape \(2,\) and dtype torch.float32"),
    ],
)
def test_gumbel_argmax_errors(temperature: float, uniform: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gumbel_argmax(torch.zeros(2), temperature, uniform)


# candidates


def test_candidates_confidence_and_score_by_hand() -> None:
    logits = logits_of([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.9, 0.05, 0.05]])
    mask = torch.tensor([[False, True, True, True]])
    active = torch.tensor([[True, True, True, False]])
    found = propose(logits, mask, active)
    assert found.tokens.tolist() == [[0, 1, 2, 0]]
    torch.testing.assert_close(found.confidence, torch.tensor([[0.7, 0.6, 0.5, 0.9]], dtype=torch.float64))
    assert found.score[0, [0, 3]].tolist() == [-INF, -INF]  # decoded; beyond the block
    assert torch.equal(found.score[0, 1:3], found.confidence[0, 1:3])


def test_low_precision_logits_give_float32_confidence() -> None:
    logits = torch.randn((2, 3, 50), generator=torch.Generator().manual_seed(3)).bfloat16()
    mask = torch.ones((2, 3), dtype=torch.bool)
    found = propose(logits, mask, mask)
    assert found.confidence.dtype == torch.float32
    torch.testing.assert_close(found.confidence.double(), logits.double().softmax(-1).amax(-1))


def test_noise_moves_open_positions_only_and_confidence_stays_the_models() -> None:
    probabilities = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.8, 0.1, 0.1]]
    mask = torch.tensor([[False, True, True, True]])
    active = torch.tensor([[True, True, True, False]])
    towards = torch.tensor([[1e-9, 1e-9, 0.999999], [1e-9, 0.999999, 1e-9]], dtype=torch.float64)
    found = propose(logits_of(probabilities), mask, active, temperature=1.0, uniform=towards)
    assert found.tokens.tolist() == [[0, 2, 1, 0]]
    torch.testing.assert_close(found.confidence, torch.tensor([[0.7, 0.1, 0.4, 0.8]], dtype=torch.float64))


def test_random_scores_order_open_positions_and_leave_confidence() -> None:
    logits = logits_of([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    mask = torch.tensor([[True, False, True]])
    found = propose(logits, mask, everything(3), random_score=torch.tensor([0.25, 0.125], dtype=torch.float64))
    assert found.score.tolist() == [[0.25, -INF, 0.125]]
    torch.testing.assert_close(found.confidence, torch.tensor([[0.7, 0.6, 0.9]], dtype=torch.float64))


def test_deferred_candidates_score_zero_and_others_are_renormalised() -> None:
    logits = logits_of([[0.8, 0.1, 0.1], [0.4, 0.1, 0.5]])
    found = propose(logits, everything(2), everything(2), deferred=(0,))
    assert found.tokens.tolist() == [[0, 2]]
    torch.testing.assert_close(found.confidence, torch.tensor([[0.8, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(found.score, torch.tensor([[0.0, 0.5 / 0.6]], dtype=torch.float64))


def test_deferring_all_possible_tokens_still_lets_them_be_committed() -> None:
    logits = torch.tensor([[[0.0, 1.0, -INF]]])
    found = propose(logits, everything(1), everything(1), deferred=(0, 1))
    assert found.score.tolist() == [[0.0]]


def test_propose_changes_no_argument() -> None:
    logits, noise = torch.zeros((1, 2, 3)), torch.full((2, 3), 0.5, dtype=torch.float64)
    propose(logits, everything(2), everything(2), temperature=1.0, uniform=noise, deferred=(1,))
    assert torch.equal(logits, torch.zeros((1, 2, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros((2, 3))}, r"logits has shape \(2, 3\)"),
        ({"logits": torch.zeros((1, 2, 3), dtype=torch.int64)}, r"logits .* torch.int64; valid: a floating tensor"),
        ({"mask": everything(3)}, r"mask has shape \(1, 3\) .* shape \(1, 2\)"),
        ({"active": torch.ones((1, 2))}, r"active has shape \(1, 2\) and dtype torch.float32"),
        ({"temperature": 1.0}, r"uniform is missing at temperature 1.0"),
        ({"uniform": torch.zeros((2, 3), dtype=torch.float64)}, r"uniform is given at temperature 0.0"),
        (
            {"temperature": 1.0, "uniform": torch.zeros((1, 3), dtype=torch.float64)},
            r"uniform has shape \(1, 3\) .* shape \(2, 3\)",
        ),
        ({"random_score": torch.zeros(3, dtype=torch.float64)}, r"random_score has shape \(3,\) .* shape \(2,\)"),
        (
            {"random_score": torch.zeros(2, dtype=torch.float64), "deferred": (1,)},
            r"deferred is \(1,\) with random_score",
        ),
        ({"deferred": (3,)}, r"token_ids contains 3; valid: 0 to 2"),
    ],
)
def test_propose_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros((1, 2, 3)),
        "mask": everything(2),
        "active": everything(2),
    } | change
    with pytest.raises(ValueError, match=message):
        propose(**arguments)


# commitment


def test_each_row_commits_its_own_number_of_best_candidates() -> None:
    state = torch.tensor([[7, MASK, MASK, MASK]] * 3)
    tokens = torch.arange(12).view(3, 4)
    score = torch.tensor([[-INF, 0.2, 0.9, 0.5]] * 3)
    confidence = torch.rand((3, 4), generator=torch.Generator().manual_seed(0))
    result = commit_most_confident(state, Candidates(tokens, confidence, score), torch.tensor([0, 2, 5]))
    assert result.state.tolist() == [[7, MASK, MASK, MASK], [7, MASK, 6, 7], [7, 9, 10, 11]]
    assert result.committed.int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]]
    assert result.confidence is confidence
    assert state.tolist() == [[7, MASK, MASK, MASK]] * 3


def test_equal_scores_go_by_position() -> None:
    state = torch.full((1, 40), MASK)
    result = commit_most_confident(state, scores(*[0.5] * 40), torch.tensor([3]))
    assert result.committed.nonzero()[:, 1].tolist() == [0, 1, 2]


def test_state_keeps_its_dtype() -> None:
    state = torch.full((1, 2), MASK, dtype=torch.int32)
    result = commit_most_confident(state, scores(0.1, 0.2), torch.tensor([1]))
    assert result.state.dtype == torch.int32
    assert result.state.tolist() == [[MASK, 11]]


def test_threshold_commits_all_that_reach_it() -> None:
    state = torch.full((1, 4), MASK)
    result = commit_above_threshold(state, scores(0.5, 0.75, 0.49, -INF), 0.5)  # equality counts
    assert result.state.tolist() == [[10, 11, MASK, MASK]]


def test_threshold_always_commits_the_best_one_and_only_it() -> None:
    state = torch.full((1, 4), MASK)
    result = commit_above_threshold(state, scores(0.1, 0.2, 0.2, -INF), 0.9)
    assert result.committed.tolist() == [[False, True, False, False]]


def test_rows_without_open_positions_do_not_change() -> None:
    state = torch.tensor([[1, 2]])
    closed = scores(-INF, -INF)
    for result in (commit_above_threshold(state, closed, 0.1), commit_most_confident(state, closed, torch.tensor([2]))):
        assert torch.equal(result.state, state)
        assert not result.committed.any()


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01, math.nan])
def test_threshold_errors(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold is .*; valid: a probability in \(0, 1\]"):
        commit_above_threshold(torch.zeros((1, 1)), scores(0.1), threshold)


def test_shape_errors() -> None:
    with pytest.raises(ValueError, match=r"state has shape \(1, 3\); valid: .* \(1, 2\)"):
        commit_above_threshold(torch.zeros((1, 3)), scores(0.1, 0.2), 0.5)
    with pytest.raises(ValueError, match=r"state has shape \(1, 3\); valid: .* \(1, 2\)"):
        commit_most_confident(torch.zeros((1, 3)), scores(0.1, 0.2), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"counts has shape \(2,\); valid: \(1,\)"):
        commit_most_confident(torch.zeros((1, 2)), scores(0.1, 0.2), torch.tensor([1, 1]))
