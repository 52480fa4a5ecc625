import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmquant.decoding import (
    BlockDiffusionSamplerConfig,
    CachedDenoiser,
    CachedStep,
    Candidates,
    Denoiser,
    Generation,
    commit_dynamic,
    frontier,
    greedy_candidates,
    sample,
)
from tests.decoding.toys import EOS, EOT, MASK, PAD, VOCABULARY, FixedDenoiser, MixingDenoiser, certain
from tests.oracles import block_diffusion_decoding as oracle

# Whole blocks and parts of them, for blocks of 2, 3, 4 and 8.
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 3, 4, 2, 5, 5, 8], [], [5, 5, 3, 9], [4, 3, 8, 6, 7, 7, 2, 9]]


class BlockDenoiser(MixingDenoiser):
    """Random logits that depend on every token of the same and of earlier blocks, and on its relative distance."""

    def __init__(self, seed: int, block_length: int, *, shift: int = 0, eos: float = 0.0) -> None:
        super().__init__(seed)
        self.block_length, self.shift = block_length, shift
        self.head[:, EOS] += eos

    def raw(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(tuple(ids.shape))
        place = torch.arange(ids.shape[1])
        block = (attention_mask.cumsum(1) - 1).clamp(min=0) // self.block_length
        seen = (block[:, :, None] >= block[:, None, :]) & attention_mask[:, None, :]
        kernel = self.distance[place[:, None] - place[None, :] + 100] * seen
        return 3 * torch.tanh(torch.einsum("bqk,bkd->bqd", kernel, self.embedding[ids]) / 3) @ self.head

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert ids.dtype == torch.int64
        logits = self.raw(ids, attention_mask)
        if not self.shift:
            return logits
        first = attention_mask & ~attention_mask.roll(1, 1)
        first[:, 0] = attention_mask[:, 0]
        aligned = logits.roll(1, 1)
        aligned[first] = logits[first]
        return aligned

    def one(self, ids: list[int]) -> list[list[float]]:
        rows: list[list[float]] = self.raw(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0].tolist()
        return rows

    def open(self, attention_mask: Tensor) -> CachedStep:
        """A cache that remembers ids instead of what is made of them: those that were not shown are random."""
        canvas = torch.randint(VOCABULARY, attention_mask.shape, generator=torch.Generator().manual_seed(1))

        def step(rows: Tensor, columns: Tensor, ids: Tensor, wanted: int) -> Tensor:
            assert bool((columns.diff(dim=1) >= 0).all())
            assert bool(attention_mask[rows].gather(1, columns).all())
            canvas[rows[:, None], columns] = ids
            calls = len(self.calls)
            logits = self.raw(canvas[rows], attention_mask[rows])
            self.calls[calls:] = [tuple(ids.shape)]
            return logits.gather(1, columns[:, -wanted:, None].expand(-1, -1, VOCABULARY))

        return step


def run(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]] = ((),),
    *,
    cached: CachedDenoiser | None = None,
    batch_size: int = 8,
    seed: int | None = None,
    record: bool = False,
    eos: int | None = None,
    eot: int | None = None,
    **options: Any,
) -> Generation:
    return sample(
        denoiser,
        prompts,
        BlockDiffusionSamplerConfig(**options),
        cached=cached,
        mask_token_id=MASK,
        pad_token_id=PAD,
        eos_token_id=eos,
        eot_token_id=eot,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        batch_size=batch_size,
        record=record,
    )


def streams(seed: int, count: int) -> list[oracle.Noise]:
    """The random numbers of each prompt."""
    seeds = torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    generators = [torch.Generator().manual_seed(own) for own in seeds]

    def noise(generator: torch.Generator) -> oracle.Noise:
        return lambda n: torch.rand(n, generator=generator, dtype=torch.float64).tolist()

    return [noise(generator) for generator in generators]


def assert_same_run(found: Generation, row: int, expected: oracle.Run) -> None:
    """The row of a recorded generation equals the oracle's run, state by state."""
    trajectory = found.trajectory
    assert trajectory is not None
    assert found.tokens[row].tolist() == expected.tokens
    assert int(found.steps_used[row]) == len(expected.steps) == int(trajectory.num_steps[row])
    for s, step in enumerate(expected.steps):
        state = trajectory.states([(row, s)])
        assert state.ids[0].tolist() == step.ids
        assert state.committed[0].nonzero().squeeze(1).tolist() == step.committed
        assert int(state.block[0]) == step.block
        torch.testing.assert_close(state.confidence[0], torch.tensor(step.confidence))


# Against the slow re-implementations

SDAR: dict[str, dict[str, Any]] = {
    "dynamic": {"block_length": 4, "steps": 4, "threshold": 0.6},
    "dynamic, several per step": {"block_length": 8, "steps": 3, "threshold": 0.7},
    "LLaDA2": {"block_length": 8, "steps": 8, "threshold": 0.95},
    "eager": {"block_length": 8, "steps": 8, "threshold": 0.3},
    "one step": {"block_length": 4, "steps": 1},
    "static": {"block_length": 4, "steps": 4, "remasking": "low_confidence_static"},
    "static, uneven": {"block_length": 8, "steps": 3, "remasking": "low_confidence_static"},
    "sequential": {"block_length": 4, "steps": 4, "remasking": "sequential"},
    "sequential, uneven": {"block_length": 3, "steps": 2, "remasking": "sequential"},
    "blocks of one": {"block_length": 1, "steps": 1},
    "cut": {"block_length": 4, "steps": 4, "threshold": 0.8, "top_k": 3, "top_p": 0.7},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "dynamic": {"block_length": 4, "steps": 4, "threshold": 0.7, "temperature": 0.7},
    "static": {"block_length": 4, "steps": 2, "remasking": "low_confidence_static", "temperature": 1.0, "top_k": 4},
    "sequential": {"block_length": 4, "steps": 4, "remasking": "sequential", "temperature": 1.3, "top_p": 0.8},
    "cut": {"block_length": 8, "steps": 8, "threshold": 0.6, "temperature": 0.9, "top_p": 0.7, "top_k": 5},
}


@pytest.mark.parametrize("gen_length", [8, 9])
@pytest.mark.parametrize("name", SDAR)
@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_sdar(name: str, seed: int, gen_length: int) -> None:
    options = SDAR[name] | {"gen_length": gen_length}
    model = BlockDenoiser(seed, options["block_length"])
    found = run(model, PROMPTS, record=True, **options)
    for row, prompt in enumerate(PROMPTS):
        assert_same_run(found, row, oracle.sdar(model.one, prompt, mask_id=MASK, **options))


@pytest.mark.parametrize("name", SAMPLED)
def test_random_numbers_enter_as_in_sdar(name: str) -> None:
    options = SAMPLED[name] | {"gen_length": 9}
    model = BlockDenoiser(4, options["block_length"])
    found = run(model, PROMPTS, record=True, seed=11, **options)
    for row, (prompt, noise) in enumerate(zip(PROMPTS, streams(11, len(PROMPTS)), strict=True)):
        assert_same_run(found, row, oracle.sdar(model.one, prompt, mask_id=MASK, noise=noise, **options))


FAST: dict[str, dict[str, Any]] = {
    "sub-blocks": {"block_length": 8, "sub_block_length": 4, "threshold": 0.6},
    "small ones": {"block_length": 8, "sub_block_length": 2, "threshold": 0.9},
    "one sub-block": {"block_length": 4, "sub_block_length": 4, "threshold": 0.5},
    "one by one": {"block_length": 8, "sub_block_length": 4, "threshold": 1.0},
}


@pytest.mark.parametrize("gen_length", [8, 13])
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_fast_dllm(name: str, seed: int, gen_length: int) -> None:
    options = FAST[name] | {"gen_length": gen_length}
    model = BlockDenoiser(seed, options["block_length"], shift=1)
    found = run(model, PROMPTS, record=True, first_token_alone=True, **options)
    for row, prompt in enumerate(PROMPTS):
        assert_same_run(found, row, oracle.fast_dllm(model.one, prompt, mask_id=MASK, **options))


@pytest.mark.parametrize("name", FAST)
def test_random_numbers_enter_as_in_fast_dllm(name: str) -> None:
    """The first token of a block is not drawn."""
    options = FAST[name] | {"gen_length": 13, "temperature": 0.9, "top_p": 0.95}
    model = BlockDenoiser(5, options["block_length"], shift=1)
    found = run(model, PROMPTS, record=True, seed=3, first_token_alone=True, **options)
    for row, (prompt, noise) in enumerate(zip(PROMPTS, streams(3, len(PROMPTS)), strict=True)):
        assert_same_run(found, row, oracle.fast_dllm(model.one, prompt, mask_id=MASK, noise=noise, **options))


def test_the_options_of_the_variants_matter() -> None:
    """Otherwise the comparisons above would not see them."""
    base: dict[str, Any] = {"gen_length": 16, "block_length": 8, "threshold": 0.6}
    changes: list[dict[str, Any]] = [
        {"remasking": "low_confidence_static"},
        {"remasking": "sequential"},
        {"steps": 2},
        {"threshold": 0.95},
        {"sub_block_length": 4},
        {"first_token_alone": True},
        {"top_k": 2},
        {"top_p": 0.5},
    ]
    for change in changes:
        differs = [
            not torch.equal(
                run(BlockDenoiser(seed, 8), PROMPTS, **base).tokens,
                run(BlockDenoiser(seed, 8), PROMPTS, **base | change).tokens,
            )
            for seed in range(3)
        ]
        assert any(differs), change
    # Cutting by k before p is not the same as after.
    values = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]], dtype=torch.float64).log()
    config = BlockDiffusionSamplerConfig(top_k=2, top_p=0.55, remasking="low_confidence_static")
    eligible = torch.ones(1, 1, dtype=torch.bool)
    score = greedy_candidates(values, eligible, eligible, config).score
    # 0.4 does not exceed 0.55, but 0.4 / (0.4 + 0.3) does.
    torch.testing.assert_close(score, torch.tensor([[1.0]], dtype=torch.float64))


# Ends


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["sdar", "fast_dllm"])
def test_rows_end_where_the_published_code_does(family: str, seed: int) -> None:
    shift = int(family == "fast_dllm")
    model = BlockDenoiser(seed, 4, shift=shift, eos=1.0)
    options: dict[str, Any] = {"gen_length": 21, "block_length": 4, "threshold": 0.5}
    if shift:
        options |= {"sub_block_length": 2}
    found = run(model, PROMPTS, record=True, eos=EOS, eot=EOT, **options, first_token_alone=bool(shift))
    assert found.lengths is not None
    assert found.trajectory is not None
    assert min(found.lengths.tolist()) < 21
    for row, prompt in enumerate(PROMPTS):
        expected = (
            oracle.fast_dllm(model.one, prompt, mask_id=MASK, stops=(EOS, EOT), **options)
            if shift
            else oracle.sdar(model.one, prompt, mask_id=MASK, steps=4, stops=(EOS, EOT), **options)
        )
        ends = [place for place, token in enumerate(expected.tokens) if token in (EOS, EOT)]
        length = ends[0] + 1 if ends else 21
        assert int(found.lengths[row]) == length
        tokens = found.tokens[row].tolist()
        assert tokens[:length] == expected.tokens[:length]
        assert all(
            token == (EOS if there == MASK else token) for token, there in zip(tokens, expected.tokens, strict=True)
        )
        # What was decoded behind the end stays; what was not is filled in after the last step, which is none.
        steps = int(found.steps_used[row])
        assert steps <= len(expected.steps)
        assert_prefix(found, row, expected, steps)
    assert not (found.tokens == MASK).any()


def assert_prefix(found: Generation, row: int, expected: oracle.Run, steps: int) -> None:
    assert found.trajectory is not None
    for s in range(steps):
        state = found.trajectory.states([(row, s)])
        assert state.ids[0].tolist() == expected.steps[s].ids
        assert state.committed[0].nonzero().squeeze(1).tolist() == expected.steps[s].committed


def test_a_row_goes_on_until_everything_before_its_end_is_committed() -> None:
    model = certain([3, 4, EOS, 5, 6, 7, 8, 9], [1.0, 2.0, 5.0, 4.0, 9.0, 9.0, 9.0, 9.0])
    options: dict[str, Any] = {"gen_length": 8, "block_length": 4, "remasking": "low_confidence_static"}
    found = run(model, eos=EOS, record=True, **options)
    assert found.tokens.tolist() == [[3, 4, EOS, 5, EOS, EOS, EOS, EOS]]
    assert (found.forward_passes, found.steps_used.tolist()) == (4, [4])
    assert found.lengths is not None
    assert found.lengths.tolist() == [3]
    assert found.trajectory is not None
    assert found.trajectory.mask_ratio.tolist() == [[1.0, 0.875, 0.75, 0.625]]
    earlier = run(certain([3, 4, EOS, 5] * 2, [9.0, 8.0, 7.0, 1.0] * 2), eos=EOS, **options)
    assert (earlier.tokens.tolist(), earlier.forward_passes) == ([[3, 4, EOS, EOS, EOS, EOS, EOS, EOS]], 3)
    turn = run(certain([3, 4, EOT, 5] * 2, [9.0, 8.0, 7.0, 1.0] * 2), eos=EOS, eot=EOT, **options)
    assert turn.tokens.tolist() == [[3, 4, EOT, EOS, EOS, EOS, EOS, EOS]]
    assert turn.lengths is not None
    assert turn.lengths.tolist() == [3]
    for none in (
        run(model, **options),
        run(certain([3, 4, EOT, 5] * 2, [9.0, 8.0, 7.0, 1.0] * 2), eot=EOT, **options),
    ):
        assert none.lengths is None
        assert none.forward_passes == 8


def test_an_end_in_the_prompt_does_not_count() -> None:
    found = run(certain([3, 4, 5, 6], [1.0] * 4), [[EOS, 7, EOS]], eos=EOS, gen_length=4, block_length=2)
    assert found.tokens.tolist() == [[3, 4, 5, 6]]


# Batches, caches, records


OPTIONS: list[dict[str, Any]] = [
    {"block_length": 4, "threshold": 0.6},
    {"block_length": 8, "threshold": 0.6, "eos": EOS},
    {"block_length": 3, "remasking": "low_confidence_static", "steps": 2, "eos": EOS},
    {"block_length": 8, "sub_block_length": 2, "threshold": 0.6, "first_token_alone": True, "shift": 1},
    {"block_length": 8, "sub_block_length": 4, "threshold": 0.7, "shift": 1, "eos": EOS},
    {"block_length": 4, "threshold": 0.6, "temperature": 0.8, "top_p": 0.9, "eos": EOS},
    {"block_length": 4, "threshold": 0.6, "temperature": 0.8, "first_token_alone": True, "shift": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batches_caches_and_records_change_nothing(options: dict[str, Any]) -> None:
    options = {"gen_length": 21} | options
    shift = options.pop("shift", 0)
    model = BlockDenoiser(7, options["block_length"], shift=shift, eos=0.5)
    cached = CachedDenoiser(model.open, shift)
    expected = run(model, PROMPTS, batch_size=1, seed=5, **options)
    assert len({tuple(row) for row in expected.tokens.tolist()}) > 3
    for batch_size, cache in ((6, None), (1, cached), (2, cached), (6, cached)):
        found = run(model, PROMPTS, batch_size=batch_size, cached=cache, seed=5, **options)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.steps_used, expected.steps_used)
        assert (found.lengths is None) == (expected.lengths is None)
        if expected.lengths is not None and found.lengths is not None:
            assert torch.equal(found.lengths, expected.lengths)
    recorded = run(model, PROMPTS, batch_size=6, cached=cached, seed=5, record=True, **options)
    assert torch.equal(recorded.tokens, expected.tokens)
    assert recorded.trajectory is not None
    assert recorded.trajectory.committed.sum() <= expected.tokens.numel()


def test_a_cached_step_shows_the_block_and_what_was_finished_since() -> None:
    model = BlockDenoiser(0, 4)
    cached = CachedDenoiser(model.open)
    options: dict[str, Any] = {"gen_length": 10, "block_length": 4, "remasking": "sequential", "steps": 2}
    found = run(model, [[5] * 10], cached=cached, **options)
    # The prompt's two blocks with the third one; every later block with the one before it, then alone.
    assert model.calls == [(1, 12), (1, 8), (1, 4), (1, 8), (1, 4)]
    assert found.forward_passes == 5
    model.calls.clear()
    run(model, [[5] * 10], **options)
    assert model.calls == [(1, 20)] * 5
    model.calls.clear()
    shifted = CachedDenoiser(model.open, 1)
    run(model, [[5] * 10], cached=shifted, **options)
    assert model.calls == [(1, 12), (1, 8), (1, 5), (1, 8), (1, 5)]


def test_rows_that_are_finished_leave_the_batch() -> None:
    logits = torch.zeros((12, VOCABULARY))
    logits[:, 3] = 9.0
    sizes: list[int] = []

    def spy(ids: Tensor, attention_mask: Tensor) -> Tensor:
        sizes.append(len(ids))
        out = FixedDenoiser(logits)(ids, attention_mask)
        out[ids[:, 0] == 7, -12:, EOS] = 20.0
        return out

    found = run(spy, [[7], [8]], gen_length=12, block_length=4, remasking="sequential", eos=EOS)
    assert found.tokens.tolist() == [[EOS] * 12, [3] * 12]
    assert sizes == [2] + [1] * 11


def test_records_hold_the_states_that_the_model_saw() -> None:
    model = BlockDenoiser(2, 4, eos=1.0)
    found = run(model, PROMPTS, record=True, eos=EOS, gen_length=13, block_length=4, threshold=0.5)
    trajectory = found.trajectory
    assert trajectory is not None
    for i in range(len(PROMPTS)):
        states = [trajectory.state(i, s) for s in range(int(trajectory.num_steps[i]))]
        for before, after in itertools.pairwise(states):
            assert torch.equal(before.ids == after.ids, ~before.committed)
            assert before.block <= after.block
            assert after.mask_ratio == pytest.approx(float(after.mask.sum()) / 13)
        for state in states:
            assert bool((state.committed <= state.mask).all())
            assert bool((state.confidence[state.attention_mask] > 0).all())
            place = state.committed.nonzero().squeeze(1) - (len(state.ids) - 13 - len(PROMPTS[i]))
            assert {int(p) // 4 - len(PROMPTS[i]) // 4 for p in place} == {state.block}


def test_a_step_of_its_own_for_the_first_token_whatever_its_confidence() -> None:
    model = certain([3, 4, 5, 6, 7, 8], [0.1, 9.0, 9.0, 0.1, 9.0, 9.0])
    found = run(model, record=True, gen_length=6, block_length=3, threshold=0.5, first_token_alone=True)
    assert found.trajectory is not None
    order = [row.nonzero().squeeze(1).tolist() for row in found.trajectory.committed[0]]
    assert order == [[0], [1, 2], [3], [4, 5]]
    assert found.trajectory.block.tolist() == [[0, 0, 1, 1]]


# Parts


def test_the_frontier_is_counted_from_the_first_token() -> None:
    config = BlockDiffusionSamplerConfig(gen_length=6, block_length=4, sub_block_length=2, first_token_alone=True)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 6:] = True
    mask[2, 6] = False
    attended = torch.ones(3, 12, dtype=torch.bool)
    attended[1, :2] = False
    found = frontier(mask, attended, config)
    # Prompts of 6, 4 and 6 tokens: the middle of block 1, its beginning, the last but one of block 1.
    assert [row.nonzero().squeeze(1).tolist() for row in found.eligible] == [[6, 7], [6], [7]]
    assert found.alone.tolist() == [False, True, False]
    assert found.begin.tolist() == [4, 6, 4]
    assert found.block.tolist() == [0, 0, 0]
    assert found.unit.tolist() == [3, 2, 3]


def test_dynamic_commits_the_share_or_all_that_are_confident() -> None:
    score = torch.tensor([[0.9, 0.8, 0.7, -math.inf], [0.2, 0.1, 0.3, 0.15], [-math.inf] * 4, [0.5, 0.5, 0.5, 0.4]])
    tokens = torch.arange(16).reshape(4, 4)
    state = torch.full((4, 4), MASK)
    result = commit_dynamic(state, Candidates(tokens, score, score), 0.5, torch.tensor([1, 2, 2, 2]))
    chosen = [row.nonzero().squeeze(1).tolist() for row in result.committed]
    assert chosen == [[0, 1, 2], [0, 2], [], [0, 1]]  # exactly the threshold is not above it
    assert result.state[1].tolist() == [4, MASK, 6, MASK]
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold is"):
            commit_dynamic(state, Candidates(tokens, score, score), threshold, torch.tensor([1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"counts has shape \(3,\); valid: \(4,\)"):
        commit_dynamic(state, Candidates(tokens, score, score), 0.5, torch.tensor([1, 1, 1]))


def test_greedy_candidates_are_what_the_sampler_would_commit() -> None:
    model, config = BlockDenoiser(3, 4), BlockDiffusionSamplerConfig(gen_length=9, block_length=4, threshold=0.6)
    found = run(model, PROMPTS, record=True, gen_length=9, block_length=4, threshold=0.6)
    trajectory = found.trajectory
    assert trajectory is not None
    where = [(i, s) for i in range(len(PROMPTS)) for s in range(int(trajectory.num_steps[i]))]
    batch = trajectory.states(where)
    logits = model(batch.ids, batch.attention_mask)
    logits[..., MASK] = -math.inf
    eligible = frontier(batch.mask, batch.attention_mask, config).eligible
    candidates = greedy_candidates(logits, batch.mask, eligible, config)
    ones = torch.ones(len(where), dtype=torch.int64)
    result = commit_dynamic(batch.ids, candidates, 0.6, ones)
    assert torch.equal(result.committed, batch.committed)
    with pytest.raises(ValueError, match="draws no random numbers"):
        greedy_candidates(logits, batch.mask, eligible, dataclasses.replace(config, temperature=0.5))


# Settings and failures


def test_defaults_are_sdars() -> None:
    config = BlockDiffusionSamplerConfig()
    assert dataclasses.asdict(config) == {
        "steps": None,
        "gen_length": 128,
        "block_length": 4,
        "sub_block_length": None,
        "temperature": 0.0,
        "top_p": None,
        "top_k": None,
        "remasking": "low_confidence_dynamic",
        "threshold": 0.85,
        "first_token_alone": False,
    }
    assert (config.cfg_scale, config.logits_eos_inf, config.confidence_eos_eot_inf) == (0.0, False, False)
    assert not config.stochastic
    assert BlockDiffusionSamplerConfig(temperature=0.1).stochastic
    assert (config.unit_length, config.unit_steps) == (4, 4)
    parts = BlockDiffusionSamplerConfig(block_length=32, sub_block_length=8, steps=16)
    assert (parts.unit_length, parts.unit_steps) == (8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps is 0; valid: an integer of at least 1"),
        ({"steps": 5}, r"steps is 5; valid: None, or a multiple of the number of sub-blocks \(1\), at most block_le"),
        (
            {"steps": 6, "block_length": 16, "sub_block_length": 4},
            r"steps is 6; valid: None, or a multiple of the number of sub-blocks \(4\), at most block_length 16",
        ),
        ({"gen_length": 0}, r"gen_length is 0; valid: an integer of at least 1"),
        ({"block_length": 2.0}, r"block_length is 2.0; valid: an integer of at least 1"),
        ({"sub_block_length": 3}, r"sub_block_length is 3; valid: None or a divisor of block_length 4"),
        ({"sub_block_length": 0}, r"sub_block_length is 0; valid: an integer of at least 1"),
        ({"temperature": -1.0}, r"temperature is -1.0; valid: a finite number of at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; valid: None or a probability in \(0, 1\]"),
        ({"top_k": True}, r"top_k is True; valid: an integer of at least 1"),
        ({"threshold": 0.0}, r"threshold is 0.0; valid: None or a probability in \(0, 1\]"),
        ({"threshold": None}, r"threshold is None; valid: a probability in \(0, 1\]"),
        (
            {"remasking": "entropy_bounded"},
            r"remasking is 'entropy_bounded'; valid: 'low_confidence_dynamic', 'low_confidence_static', 'sequential'",
        ),
        ({"first_token_alone": 1}, r"first_token_alone is 1; valid: True or False"),
    ],
)
def test_setting_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockDiffusionSamplerConfig(**options)


@pytest.mark.parametrize("remasking", ["low_confidence_dynamic", "sequential"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("in_cache", [False, True])
def test_denoisers_without_a_finite_confidence_are_errors(temperature: float, remasking: str, in_cache: bool) -> None:
    def broken(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.full((*ids.shape, VOCABULARY), math.nan)

    def opened(attention_mask: Tensor) -> CachedStep:
        return lambda rows, columns, ids, wanted: torch.full((len(ids), wanted, VOCABULARY), math.nan)

    cached = CachedDenoiser(opened) if in_cache else None
    with pytest.raises(ValueError, match="confidence of NaN"):
        run(broken, [[3]], cached=cached, gen_length=2, temperature=temperature, remasking=remasking)


def test_caches_of_the_wrong_shape_are_errors() -> None:
    def opened(attention_mask: Tensor) -> CachedStep:
        return lambda rows, columns, ids, wanted: torch.zeros(*ids.shape, VOCABULARY)

    with pytest.raises(ValueError, match=r"have shape \(1, 8, 11\) .*; valid: a floating tensor \[1, 4, V\]"):
        run(BlockDenoiser(0, 4), [[3] * 5], cached=CachedDenoiser(opened), gen_length=4)
