import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from dllmquant.decoding import certainty, draw_tokens, propose_ranked, restrict
from tests.oracles import dream_decoding as oracle

INF = float("inf")


def logits_of(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().squeeze(1).tolist() for row in logits]


# restricting


def test_top_p_keeps_the_likeliest_up_to_the_one_that_exceeds_it() -> None:
    logits = logits_of([0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01])
    assert kept(restrict(logits, top_p=0.39)) == [[1], [0]]
    assert kept(restrict(logits, top_p=0.45)) == [[1, 3], [0]]
    assert kept(restrict(logits, top_p=0.75)) == [[1, 2, 3], [0]]
    assert kept(restrict(logits, top_p=0.975)) == [[0, 1, 2, 3], [0, 1]]
    assert kept(restrict(logits, top_p=1.0)) == [[0, 1, 2, 3]] * 2


def test_top_k_keeps_ties_with_the_last() -> None:
    logits = logits_of([0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.4, 0.1])
    assert kept(restrict(logits, top_k=2)) == [[1, 3], [0, 1, 2]]
    assert kept(restrict(logits, top_k=1)) == [[1], [2]]
    assert kept(restrict(logits, top_k=9)) == [[0, 1, 2, 3]] * 2


def test_impossible_tokens_stay_impossible_and_logits_are_widened() -> None:
    logits = torch.tensor([[1.0, -INF, 0.5]]).half()
    found = restrict(logits, temperature=0.5, top_p=0.99, top_k=3)
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0, -INF, 1.0]]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.9])
@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_distributions_are_as_published(temperature: float, top_p: float | None, top_k: int | None) -> None:
    logits = torch.randn((40, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = restrict(logits, temperature=temperature, top_p=top_p, top_k=top_k).softmax(-1)
    expected = [oracle.distribution(row, temperature, top_p, top_k) for row in logits.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


# drawing


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_number() -> None:
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).expand(8, 5)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(probabilities, uniform).tolist() == [0, 0, 2, 2, 2, 3, 3, 3]


def test_rows_need_not_sum_to_one_and_impossible_ends_are_never_drawn() -> None:
    probabilities = torch.rand((2000, 7), generator=torch.Generator().manual_seed(0))
    probabilities[:, [0, 3, 6]] = 0.0
    for u in (0.0, 1 - 2**-53):
        drawn = draw_tokens(probabilities, torch.full((2000,), u, dtype=torch.float64))
        assert set(drawn.tolist()) == {1 if u == 0 else 5}


def test_tokens_follow_their_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.3, 0.25])
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    observed = draw_tokens(probabilities.expand(40_000, 4), uniform).bincount(minlength=4)
    assert stats.chisquare(observed.numpy(), (probabilities * 40_000).numpy()).pvalue > 0.01


# ranking


def test_certainty_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]], dtype=torch.float64)
    tokens = torch.tensor([1, 1])
    assert certainty(probabilities, tokens, "maskgit_plus").tolist() == [0.3, 1.0]
    torch.testing.assert_close(certainty(probabilities, tokens, "topk_margin"), torch.tensor([0.2, 1.0]).double())
    entropy = 0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)
    torch.testing.assert_close(certainty(probabilities, tokens, "entropy"), torch.tensor([entropy, 0.0]).double())
    with pytest.raises(ValueError, match="ranking is 'origin'; valid: 'maskgit_plus', 'topk_margin' or 'entropy'"):
        certainty(probabilities, tokens, "origin")


def test_masked_positions_are_ranked_and_the_confidence_stays_the_models() -> None:
    logits = logits_of([0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6]).unsqueeze(0)
    mask = torch.tensor([[False, True, True]])
    towards = torch.tensor([0.6, 0.0], dtype=torch.float64)
    found = propose_ranked(logits, mask, "maskgit_plus", temperature=0.5, uniform=towards)
    assert found.tokens.tolist() == [[0, 1, 0]]
    torch.testing.assert_close(found.confidence, torch.tensor([[0.7, 0.4, 0.1]], dtype=torch.float64))
    assert found.score[0, 0] == -INF
    torch.testing.assert_close(found.score[0, 1:], torch.tensor([16 / 42, 1 / 46], dtype=torch.float64))


def test_origin_ranks_by_its_numbers_the_smallest_first() -> None:
    logits, mask = torch.zeros((1, 3, 4)), torch.tensor([[True, False, True]])
    found = propose_ranked(logits, mask, "origin", noise=torch.tensor([0.25, 0.125], dtype=torch.float64))
    assert found.score.tolist() == [[-0.25, -INF, -0.125]]


def test_low_precision_logits_give_float32_confidence() -> None:
    logits = torch.randn((2, 3, 50), generator=torch.Generator().manual_seed(3)).bfloat16()
    found = propose_ranked(logits, torch.ones((2, 3), dtype=torch.bool), "entropy")
    assert found.confidence.dtype == found.score.dtype == torch.float32
    torch.testing.assert_close(found.confidence.double(), logits.double().softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_ranking_temperature_draws_positions_without_replacement(temperature: float) -> None:
    """The two best of four positions, against the probabilities of drawing one after the other."""
    draws = 20_000
    logits = logits_of([0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5]).expand(draws, 4, 2)
    noise = torch.rand(4 * draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones((draws, 4), dtype=torch.bool)
    found = propose_ranked(logits, mask, "maskgit_plus", ranking_temperature=temperature, noise=noise)
    observed = Counter(map(tuple, found.score.topk(2, dim=-1).indices.tolist()))
    weight = [math.exp(p / temperature) for p in (0.9, 0.8, 0.6, 0.5)]
    pairs = list(itertools.permutations(range(4), 2))
    expected = [draws * weight[i] / sum(weight) * weight[j] / (sum(weight) - weight[i]) for i, j in pairs]
    assert stats.chisquare([observed[pair] for pair in pairs], expected).pvalue > 0.01


def test_no_number_keeps_a_position_out() -> None:
    logits, noise = torch.zeros((1, 2, 3)), torch.zeros(2, dtype=torch.float64)
    found = propose_ranked(
        logits, torch.ones((1, 2), dtype=torch.bool), "entropy", ranking_temperature=1.0, noise=noise
    )
    assert bool(found.score.isfinite().all())


def test_propose_changes_no_argument() -> None:
    logits, uniform = torch.randn((1, 2, 3), generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5).double()
    kept_logits, kept_uniform = logits.clone(), uniform.clone()
    mask = torch.ones((1, 2), dtype=torch.bool)
    propose_ranked(logits, mask, "entropy", temperature=1.0, top_p=0.5, top_k=1, uniform=uniform)
    assert torch.equal(logits, kept_logits)
    assert torch.equal(uniform, kept_uniform)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros((2, 3))}, r"logits has shape \(2, 3\)"),
        ({"mask": torch.ones((1, 3), dtype=torch.bool)}, r"mask has shape \(1, 3\) .* shape \(1, 2\)"),
        ({"mask": torch.ones((1, 2))}, r"mask has shape \(1, 2\) and dtype torch.float32"),
        ({"temperature": 1.0}, r"uniform is missing at temperature 1.0; valid: given"),
        ({"uniform": torch.zeros(2, dtype=torch.float64)}, r"uniform is given at temperature 0.0; valid: None"),
        ({"temperature": 1.0, "uniform": torch.zeros(2)}, r"uniform has shape \(2,\) and dtype torch.float32"),
        ({"ranking": "origin"}, r"noise is missing with ranking 'origin' and ranking_temperature 0.0; valid: given"),
        ({"ranking_temperature": 0.5}, r"noise is missing with ranking 'entropy' and ranking_temperature 0.5"),
        ({"noise": torch.zeros(2, dtype=torch.float64)}, r"noise is given with ranking 'entropy'.*; valid: None"),
        (
            {"ranking": "origin", "noise": torch.zeros(3, dtype=torch.float64)},
            r"noise has shape \(3,\) .* shape \(2,\)",
        ),
    ],
)
def test_propose_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros((1, 2, 3)),
        "mask": torch.ones((1, 2), dtype=torch.bool),
        "ranking": "entropy",
    } | change
    with pytest.raises(ValueError, match=message):
        propose_ranked(**arguments)
