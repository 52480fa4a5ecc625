import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from dllmquant.decoding import Denoiser
from dllmquant.decoding.likelihood import log_likelihoods
from tests.decoding.toys import MASK, PAD, VOCABULARY, MixingDenoiser

Pair = tuple[Sequence[int], Sequence[int]]
PAIRS: list[Pair] = [([3, 4, 5], [6, 7]), ([], [8]), ([9, 3, 3, 4], [5, 5, 9, 2]), ([7], [1, 4, 6]), ([2, 8], [3, 9])]


def run(denoiser: Denoiser, pairs: Sequence[Pair] = PAIRS, **options: Any) -> Tensor:
    return log_likelihoods(denoiser, pairs, **({"mask_token_id": MASK, "pad_token_id": PAD} | options))


def negative_cross_entropy(logits: list[float], token: int) -> float:
    return logits[token] - math.log(math.fsum(math.exp(value) for value in logits))


def enumerated(model: MixingDenoiser, prompt: Sequence[int], target: Sequence[int]) -> float:
    """The bound itself: the average over every count, and over every subset of that many target tokens."""
    length = len(target)
    per_count = []
    for count in range(1, length + 1):
        values = []
        for subset in itertools.combinations(range(length), count):
            ids = [*prompt, *(MASK if j in subset else token for j, token in enumerate(target))]
            logits = model.one(ids)
            terms = [negative_cross_entropy(logits[len(prompt) + j], target[j]) for j in subset]
            values.append(length / count * math.fsum(terms))
        per_count.append(math.fsum(values) / len(values))
    return math.fsum(per_count) / length


class CountingDenoiser:
    """Over two tokens: a masked token 0 costs `cost[m]` when m tokens are masked."""

    def __init__(self, cost: dict[int, float]) -> None:
        self.cost = cost

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        counts = (ids == MASK).sum(dim=1).tolist()
        # log(1 + e^d) = c  <=>  d = log(e^c - 1), which is c itself for a large c
        gaps = [cost + math.log1p(-math.exp(-cost)) for cost in (self.cost[count] for count in counts)]
        logits = torch.zeros((*ids.shape, 2), dtype=torch.float64)
        logits[..., 1] = torch.tensor(gaps, dtype=torch.float64)[:, None]
        return logits


class RecordingDenoiser(MixingDenoiser):
    """Keeps the rows it was given."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.rows: list[list[int]] = []

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.rows += ids.tolist()
        assert not torch.is_grad_enabled()
        return super().__call__(ids, attention_mask)


# against the definition


@pytest.mark.parametrize(
    ("target", "mc_num"),
    [([6, 7], 1), ([6, 7], 3), ([5, 9, 2], 1), ([5, 9, 2], 2), ([5, 5, 9, 2], 3), ([5, 5, 9, 2], 8)],
)
def test_unbiased(target: list[int], mc_num: int) -> None:
    model, prompt, copies = MixingDenoiser(4), [3, 8, 4], 2000
    found = run(model, [(prompt, target)] * copies, mc_num=mc_num, batch_size=1000)
    error = (found.mean() - enumerated(model, prompt, target)).item()
    standard_error = found.std().item() / math.sqrt(copies)
    assert standard_error > 0
    assert abs(error) < 4 * standard_error


def test_converges() -> None:
    model = MixingDenoiser(5)
    found = run(model, mc_num=20_000, batch_size=512)
    expected = [enumerated(model, *pair) for pair in PAIRS]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0.01, atol=0)


def test_one_target_token_is_exact() -> None:
    model = MixingDenoiser(6)
    expected = negative_cross_entropy(model.one([3, 4, MASK])[2], 7)
    assert run(model, [([3, 4], [7])], mc_num=5).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [2, 3, 5, 6])
def test_a_multiple_of_the_length_draws_every_count_equally_often(length: int) -> None:
    cost = {count: 0.3 + count**2 for count in range(1, length + 1)}
    found = run(CountingDenoiser(cost), [([1], [0] * length)] * 20, mc_num=3 * length)
    torch.testing.assert_close(found, torch.full((20,), -math.fsum(cost.values()), dtype=torch.float64))


@pytest.mark.parametrize(("length", "mc_num"), [(3, 2), (4, 6), (5, 4), (5, 2), (6, 4)])
def test_counts_are_stratified_and_uniform(length: int, mc_num: int) -> None:
    copies = 600
    # With costs of 100^l, the digits of -estimate * mc_num / length tell how often each count was drawn.
    model = CountingDenoiser({count: 100.0**count for count in range(1, length + 1)})
    found = run(model, [([1], [0] * length)] * copies, mc_num=mc_num, batch_size=4096)
    total = torch.zeros(length)
    for value in (-found * mc_num / length).round().long().tolist():
        digits = [value // 100**count % 100 for count in range(1, length + 1)]
        assert sum(digits) == mc_num
        assert all(mc_num // length <= drawn <= math.ceil(mc_num / length) for drawn in digits)
        total += torch.tensor(digits)
    # Stratified counts vary less than independent ones, so a good p-value is easy to have; a bad one is a bias.
    assert stats.chisquare(total.tolist()).pvalue > 0.01


# batching and random streams


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_independent_of_batching_and_padding(batch_size: int) -> None:
    alone = [run(MixingDenoiser(7), [pair], mc_num=10, streams=[i]).item() for i, pair in enumerate(PAIRS)]
    model = MixingDenoiser(7, dirty_padding=True)
    found = run(model, mc_num=10, batch_size=batch_size)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(alone, dtype=torch.float64), rtol=1e-12, atol=0)
    assert max(shape[0] for shape in model.calls) == min(batch_size, sum(shape[0] for shape in model.calls))


def test_independent_of_the_other_pairs() -> None:
    model = MixingDenoiser(8)
    whole = run(model, mc_num=6)
    order = [3, 0, 4, 2]
    part = run(model, [PAIRS[i] for i in order], mc_num=6, streams=order)
    torch.testing.assert_close(part, whole[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(run(model, PAIRS[:2], mc_num=6), whole[:2], rtol=1e-12, atol=0)


def test_repeats_and_depends_on_the_seed() -> None:
    state = torch.get_rng_state()
    one, same, other = (run(MixingDenoiser(9), mc_num=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert ((one != other) == torch.tensor([len(target) > 1 for _, target in PAIRS])).all()
    assert torch.equal(torch.get_rng_state(), state)


def masks_by_pair(streams: list[int] | None, seed: int = 0) -> list[set[tuple[bool, ...]]]:
    """The masks of five pairs with targets of six tokens, told apart by their prompts."""
    model = RecordingDenoiser(1)
    run(model, [([prompt], [9] * 6) for prompt in range(1, 6)], mc_num=4, streams=streams, seed=seed)
    found: list[set[tuple[bool, ...]]] = [set() for _ in range(5)]
    for row in model.rows:
        found[row[0] - 1].add(tuple(token == MASK for token in row[1:]))
    return found


def test_pairs_of_a_stream_share_their_masks() -> None:
    found = masks_by_pair([7, 7, 8, 8, 7])
    assert found[0] == found[1] == found[4]
    assert found[2] == found[3] != found[0]
    own = masks_by_pair(None)
    assert all(one != other for one, other in itertools.combinations(own, 2))
    assert own != masks_by_pair(None, seed=1)


def test_common_masks_make_comparisons_more_precise() -> None:
    copies = 200
    choices: list[Pair] = [([3, 8], [6, 7, 4, 2]), ([3, 8], [6, 7, 5, 2])]
    common, own = [i // 2 for i in range(2 * copies)], list(range(2 * copies))

    def spread(model: MixingDenoiser, streams: list[int]) -> float:
        first, second = run(model, choices * copies, mc_num=2, streams=streams, batch_size=4096).view(copies, 2).T
        return (first - second).std().item()

    ratios = []
    for seed in range(8):
        model = MixingDenoiser(seed)
        model.embedding[5] = model.embedding[4] + 0.2 * model.embedding[5]  # choices that mean nearly the same
        ratios.append(spread(model, common) / spread(model, own))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.6


def test_a_mask_is_evaluated_once() -> None:
    model = RecordingDenoiser(3)
    run(model, [([4], [6, 7, 8])], mc_num=500)
    assert len(model.rows) == 7
    assert all(row[0] == 4 for row in model.rows)
    assert len({tuple(row) for row in model.rows}) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropies_are_wide(dtype: torch.dtype) -> None:
    """Logits that are rounded are still normalised and summed without further rounding."""
    model = MixingDenoiser(10)
    found = run(lambda ids, mask: model(ids, mask).to(dtype), mc_num=6)
    expected = run(lambda ids, mask: model(ids, mask).to(dtype).double(), mc_num=6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_an_impossible_target_has_likelihood_zero() -> None:
    def never_seven(ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = torch.zeros((*ids.shape, VOCABULARY))
        logits[..., 7] = -math.inf
        return logits

    found = run(never_seven, [([1], [7, 6]), ([1], [6, 6])], mc_num=4)
    assert found[0] == -math.inf
    assert found[1].item() == pytest.approx(-2 * math.log(VOCABULARY - 1), rel=1e-6)


def test_progress_counts_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    run(MixingDenoiser(0), [([4], [6, 7, 8])], mc_num=500, batch_size=2, progress=True)
    assert "7/7" in capsys.readouterr().err
    run(MixingDenoiser(0), mc_num=2)
    assert capsys.readouterr().err == ""


# failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "pairs is empty; valid: at least one"),
        ({"pairs": [([1], [2]), ([1], [])]}, r"pairs\[1\] has an empty target; valid: at least one token"),
        ({"pairs": [([1, MASK], [2])]}, rf"pairs\[0\] contains {MASK}; valid: .* other than the mask token"),
        ({"pairs": [([1], [2, MASK])]}, rf"pairs\[0\] contains {MASK}"),
        ({"pairs": [([1], [-2])]}, r"pairs\[0\] contains -2; valid: token ids of at least 0"),
        ({"pairs": [([1], [VOCABULARY])]}, f"contains token {VOCABULARY}; valid: 0 to {VOCABULARY - 1}"),
        ({"mc_num": 0}, "mc_num is 0; valid: an integer of at least 1"),
        ({"batch_size": 0}, "batch_size is 0; valid: an integer of at least 1"),
        ({"pad_token_id": MASK}, f"pad_token_id is {MASK}; valid: any token other than mask_token_id"),
        ({"mask_token_id": -1}, "mask_token_id is -1; valid: a token id of at least 0"),
        ({"pad_token_id": -1}, "pad_token_id is -1; valid: a token id of at least 0"),
        ({"streams": [1, 2]}, "streams has 2 entries; valid: one for each of the 5 pairs"),
    ],
)
def test_invalid_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(MixingDenoiser(0), **options)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda ids: torch.zeros(ids.shape), "have shape .* valid: a floating tensor"),
        (lambda ids: torch.zeros((*ids.shape, VOCABULARY))[:, 1:], "have shape .* valid: a floating tensor"),
        (lambda ids: torch.zeros((*ids.shape, VOCABULARY), dtype=torch.int64), "dtype torch.int64; valid: a floating"),
        (lambda ids: torch.full((*ids.shape, VOCABULARY), math.nan), "NaN; valid: logits without NaN"),
        (lambda ids: torch.full((*ids.shape, VOCABULARY), math.inf), "NaN; valid: logits without NaN"),
    ],
)
def test_invalid_logits(logits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(lambda ids, attention_mask: logits(ids))
