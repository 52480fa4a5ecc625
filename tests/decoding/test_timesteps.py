import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from dllmquant.decoding import Denoiser, DreamSamplerConfig, Generation, sample
from tests.decoding.toys import MASK, PAD, VOCABULARY, FixedDenoiser, MixingDenoiser, certain
from tests.oracles import dream_decoding as oracle

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 3, 4, 2], [], [5, 5, 3, 9]]


def run(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]] = ((),),
    *,
    batch_size: int = 8,
    seed: int | None = None,
    record: bool = False,
    **options: Any,
) -> Generation:
    return sample(
        denoiser,
        prompts,
        DreamSamplerConfig(**options),
        mask_token_id=MASK,
        pad_token_id=PAD,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        batch_size=batch_size,
        record=record,
    )


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
        assert int(state.block[0]) == 0
        torch.testing.assert_close(state.confidence[0], torch.tensor(step.confidence))


# against the slow re-implementation

VARIANTS: dict[str, dict[str, Any]] = {
    "maskgit_plus": {"gen_length": 8, "steps": 5, "remasking": "maskgit_plus"},
    "topk_margin": {"gen_length": 8, "steps": 5, "remasking": "topk_margin"},
    "entropy": {"gen_length": 8, "steps": 5, "remasking": "entropy"},
    "one step": {"gen_length": 6, "steps": 1, "remasking": "entropy"},
    "a step per token": {"gen_length": 9, "steps": 9, "remasking": "topk_margin"},
    "more steps than tokens": {"gen_length": 5, "steps": 16, "remasking": "maskgit_plus"},
    "late end": {"gen_length": 10, "steps": 4, "remasking": "entropy", "eps": 0.4},
    "top_p": {"gen_length": 8, "steps": 4, "remasking": "maskgit_plus", "top_p": 0.6},
    "top_p entropy": {"gen_length": 8, "steps": 4, "remasking": "entropy", "top_p": 0.9},
    "top_k": {"gen_length": 8, "steps": 4, "remasking": "topk_margin", "top_k": 1},
    "both": {"gen_length": 8, "steps": 4, "remasking": "entropy", "top_p": 0.8, "top_k": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_published_algorithm(name: str, seed: int) -> None:
    model, options = MixingDenoiser(seed), VARIANTS[name]
    found = run(model, PROMPTS, record=True, **options)
    for row, prompt in enumerate(PROMPTS):
        assert_same_run(found, row, oracle.decode(model.one, prompt, mask_id=MASK, **options))


def test_the_options_of_the_variants_matter() -> None:
    """Otherwise the comparison above would not see them."""
    base: dict[str, Any] = {"gen_length": 8, "steps": 4, "remasking": "entropy"}
    changes: list[dict[str, Any]] = [
        {"remasking": "maskgit_plus"},
        {"remasking": "topk_margin"},
        {"top_p": 0.6},
        {"top_k": 2},
        {"eps": 0.4},
    ]
    for change in changes:
        differs = [
            not torch.equal(
                run(MixingDenoiser(seed), PROMPTS, **base).tokens,
                run(MixingDenoiser(seed), PROMPTS, **base | change).tokens,
            )
            for seed in range(6)
        ]
        assert any(differs), change


@pytest.mark.parametrize(
    "options",
    [
        {"remasking": "entropy", "temperature": 0.8},
        {"remasking": "maskgit_plus", "temperature": 0.8},
        {"remasking": "topk_margin", "temperature": 1.3, "top_p": 0.7},
        {"remasking": "entropy", "remasking_temperature": 0.5},
        {"remasking": "maskgit_plus", "remasking_temperature": 0.3, "temperature": 0.5, "top_k": 4},
        {"remasking": "origin"},
        {"remasking": "origin", "temperature": 0.7, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [4, 12])
def test_random_numbers_enter_as_published(options: dict[str, Any], steps: int) -> None:
    model, options = MixingDenoiser(1), {"gen_length": 8, "steps": steps} | options
    seed = int(torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(11)))
    stream = torch.Generator().manual_seed(seed)

    def noise(n: int) -> list[float]:
        return torch.rand(n, generator=stream, dtype=torch.float64).tolist()

    expected = oracle.decode(model.one, PROMPTS[0], mask_id=MASK, noise=noise, **options)
    assert_same_run(run(model, PROMPTS[:1], seed=11, record=True, **options), 0, expected)


@pytest.mark.parametrize("remasking", ["maskgit_plus", "topk_margin", "entropy"])
def test_agrees_with_the_unchanged_algorithm_if_the_model_never_prefers_the_mask(remasking: str) -> None:
    class Trained(MixingDenoiser):
        def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = super().__call__(ids, attention_mask)
            logits[..., MASK] = -30.0
            return logits

    model = Trained(3)
    options: dict[str, Any] = {"gen_length": 12, "steps": 7, "remasking": remasking}
    found = run(model, PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        expected = oracle.decode(model.one, prompt, mask_id=MASK, forbid_mask=False, **options)
        assert found.tokens[row].tolist() == expected.tokens


# batching, padding, recording


@pytest.mark.parametrize(
    "options",
    [
        {"remasking": "entropy"},
        {"remasking": "topk_margin", "top_p": 0.9},
        {"remasking": "maskgit_plus", "temperature": 0.8},
        {"remasking": "entropy", "remasking_temperature": 0.4},
        {"remasking": "origin"},
        {"remasking": "origin", "temperature": 1.0, "steps": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("dirty_padding", [False, True])
def test_batching_and_left_padding_change_nothing(options: dict[str, Any], dirty_padding: bool) -> None:
    model = MixingDenoiser(4, dirty_padding=dirty_padding)
    options = {"gen_length": 12, "steps": 6, "record": True} | options
    together = run(model, PROMPTS, batch_size=5, seed=0, **options)
    for batch_size in (1, 2, 3):
        apart = run(model, PROMPTS, batch_size=batch_size, seed=0, **options)
        assert torch.equal(together.tokens, apart.tokens)
        assert torch.equal(together.steps_used, apart.steps_used)
        assert together.trajectory is not None
        assert apart.trajectory is not None
        for name in ("ids", "mask", "committed", "block", "valid", "prompt_lengths"):
            assert torch.equal(getattr(together.trajectory, name), getattr(apart.trajectory, name)), name
        torch.testing.assert_close(together.trajectory.confidence, apart.trajectory.confidence)


@pytest.mark.parametrize("remasking", ["entropy", "origin"])
def test_recording_changes_nothing(remasking: str) -> None:
    options: dict[str, Any] = {"gen_length": 12, "steps": 6, "temperature": 0.5, "remasking": remasking}
    plain = run(MixingDenoiser(5), PROMPTS, seed=1, **options)
    recorded = run(MixingDenoiser(5), PROMPTS, seed=1, record=True, **options)
    assert torch.equal(plain.tokens, recorded.tokens)
    assert plain.trajectory is None


def test_recorded_states_are_a_trajectory() -> None:
    found = run(MixingDenoiser(6), PROMPTS, record=True, gen_length=10, steps=14, remasking="origin", seed=2)
    trajectory = found.trajectory
    assert trajectory is not None
    for row in range(len(PROMPTS)):
        states = [trajectory.state(row, step) for step in range(int(trajectory.num_steps[row]))]
        assert states[0].mask_ratio == 1.0
        assert all(state.committed.any() for state in states)
        for before, after in itertools.pairwise(states):
            assert torch.equal(after.mask, before.mask & ~before.committed)
            assert torch.equal(after.ids == before.ids, ~before.committed)
        assert torch.equal(states[-1].mask, states[-1].committed)


@pytest.mark.parametrize("options", [{"remasking": "entropy"}, {"temperature": 1.0}, {"remasking": "origin"}], ids=str)
def test_seeds_decide_what_is_random_and_nothing_else(options: dict[str, Any]) -> None:
    options = {"gen_length": 8, "steps": 4} | options
    state = torch.get_rng_state()
    one, again, other = (run(MixingDenoiser(7), PROMPTS, seed=seed, **options).tokens for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (not DreamSamplerConfig(**options).stochastic)
    assert torch.equal(torch.get_rng_state(), state)


# what a step costs and commits


@pytest.mark.parametrize("remasking", ["maskgit_plus", "topk_margin", "entropy", "origin"])
@pytest.mark.parametrize("steps", [1, 3, 8, 40])
def test_everything_is_generated_and_nothing_is_run_for_nothing(remasking: str, steps: int) -> None:
    model = MixingDenoiser(8)
    found = run(model, PROMPTS[:1], gen_length=8, steps=steps, remasking=remasking, record=True, seed=0)
    assert not (found.tokens == MASK).any()
    assert found.trajectory is not None
    assert found.trajectory.committed.any(-1).all()
    assert found.forward_passes == len(model.calls) == int(found.steps_used[0]) <= min(steps, 8)


def test_the_first_of_as_many_steps_as_tokens_commits_nothing() -> None:
    """8 · (1 − s/t) = 8 · 0.999/8 < 1."""
    found = run(MixingDenoiser(9), [[3]], gen_length=8, steps=8, record=True)
    assert found.forward_passes == 7
    assert found.trajectory is not None
    assert found.trajectory.committed[0].sum(-1).tolist() == [1, 1, 1, 1, 1, 1, 2]


def test_a_prompt_that_commits_nothing_leaves_the_batch_for_a_step() -> None:
    seen: list[int] = []

    def spy(ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(len(ids))
        return torch.zeros((*ids.shape, VOCABULARY))

    found = run(spy, [[3]] * 4, gen_length=2, steps=12, remasking="origin", seed=0)
    assert found.forward_passes == len(seen)
    assert sum(seen) == int(found.steps_used.sum())
    assert min(seen) < 4


def test_surer_positions_go_first() -> None:
    model = certain([3, 4, 5, 6], [1.0, 4.0, 2.0, 3.0])
    for remasking in ("maskgit_plus", "topk_margin", "entropy"):
        found = run(model, gen_length=4, steps=5, remasking=remasking, record=True)
        assert found.tokens.tolist() == [[3, 4, 5, 6]]
        assert found.trajectory is not None
        order = [set(row.nonzero().squeeze(1).tolist()) for row in found.trajectory.committed[0]]
        assert order == [{1}, {3}, {0, 2}]


def test_origin_commits_every_position_with_its_probability() -> None:
    steps, eps = 4, 0.2
    denoiser = FixedDenoiser(torch.zeros((500, VOCABULARY)))
    found = run(denoiser, [[3]] * 10, gen_length=500, steps=steps, eps=eps, remasking="origin", record=True, seed=3)
    assert found.trajectory is not None
    committed = found.trajectory.committed[..., -500:].sum((0, 2)).double()
    share = [(1 - eps) / steps] * (steps - 1)  # of all positions, at every step but the last
    expected = torch.tensor([*share, 1 - sum(share)]) * 5000
    assert stats.chisquare(committed.numpy(), expected.numpy()).pvalue > 0.01


def test_the_mask_token_is_never_generated() -> None:
    logits = torch.zeros((4, VOCABULARY))
    logits[:, MASK], logits[:, 6] = 9.0, 2.0
    found = run(FixedDenoiser(logits), [[3]], gen_length=4, steps=4, record=True)
    assert found.tokens.tolist() == [[6, 6, 6, 6]]
    assert found.trajectory is not None
    share = math.exp(2.0) / (math.exp(2.0) + VOCABULARY - 2)  # of a softmax without the mask token
    assert found.trajectory.state(0, 0).confidence[-1].item() == pytest.approx(share)
    sampled = run(FixedDenoiser(logits), [[3]] * 20, gen_length=4, steps=1, temperature=3.0, seed=0)
    assert not (sampled.tokens == MASK).any()
    assert len(set(sampled.tokens.flatten().tolist())) > 3


# settings


def test_defaults_are_dreams() -> None:
    assert dataclasses.asdict(DreamSamplerConfig()) == {
        "steps": 512,
        "gen_length": 512,
        "temperature": 0.0,
        "top_p": None,
        "top_k": None,
        "eps": 1e-3,
        "remasking": "entropy",
        "remasking_temperature": 0.0,
    }


def test_what_code_for_either_sampler_reads() -> None:
    config = DreamSamplerConfig(steps=4, gen_length=6)
    assert (config.block_length, config.num_blocks, config.cfg_scale, config.threshold) == (6, 1, 0.0, None)
    assert (config.logits_eos_inf, config.confidence_eos_eot_inf) == (False, False)
    assert not config.stochastic
    for change in ({"temperature": 0.1}, {"remasking": "origin"}, {"remasking_temperature": 0.1}):
        assert DreamSamplerConfig(**change).stochastic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps is 0; valid: an integer of at least 1"),
        ({"steps": 2.0}, r"steps is 2.0; valid: an integer"),
        ({"gen_length": True}, r"gen_length is True; valid: an integer"),
        ({"top_k": 0}, r"top_k is 0; valid: an integer of at least 1"),
        ({"temperature": -0.1}, r"temperature is -0.1; valid: a finite number of at least 0"),
        ({"remasking_temperature": math.inf}, r"remasking_temperature is inf; valid: a finite number of at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; valid: None or a probability in \(0, 1\]"),
        ({"top_p": "1"}, r"top_p is '1'; valid"),
        ({"eps": 0.0}, r"eps is 0.0; valid: a number between 0 and 1"),
        ({"eps": 1}, r"eps is 1; valid: a number between 0 and 1"),
        ({"eps": None}, r"eps is None; valid"),
        (
            {"remasking": "low_confidence"},
            r"remasking is 'low_confidence'; valid: 'origin', 'maskgit_plus', 'topk_margin', 'entropy'",
        ),
        (
            {"remasking": "origin", "remasking_temperature": 0.5},
            r"remasking_temperature is 0.5 with remasking 'origin'; valid: 0",
        ),
    ],
)
def test_setting_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DreamSamplerConfig(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_denoisers_without_a_finite_confidence_are_errors(value: float, temperature: float) -> None:
    def broken(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.full((*ids.shape, VOCABULARY), value)

    with pytest.raises(ValueError, match="confidence of NaN"):
        run(broken, [[3]], gen_length=2, steps=1, temperature=temperature)
