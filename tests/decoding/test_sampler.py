import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from scipy import stats
from torch import Tensor

from dllmquant.decoding import Denoiser, Generation, SamplerConfig, sample
from tests.decoding.toys import EOS, EOT, MASK, PAD, VOCABULARY, FixedDenoiser, MixingDenoiser, certain
from tests.oracles import llada_decoding as oracle

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 3, 4, 2], [], [5, 5, 3, 9]]


def run(
    denoiser: Denoiser, prompts: Sequence[Sequence[int] | Tensor] | Tensor = ((),), batch_size: int = 8, **options: Any
) -> Generation:
    fields = {field.name for field in dataclasses.fields(SamplerConfig)}
    config = SamplerConfig(**{name: value for name, value in options.items() if name in fields})
    other: dict[str, Any] = {"mask_token_id": MASK, "pad_token_id": PAD, "eos_token_id": EOS, "eot_token_id": EOT}
    other |= {name: value for name, value in options.items() if name not in fields}
    return sample(denoiser, cast("Sequence[Tensor]", prompts), config, batch_size=batch_size, **other)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(one: Generation, other: Generation) -> None:
    """Equal results, up to the rounding of the denoiser in the confidences."""
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.steps_used, other.steps_used)
    if one.trajectory is None or other.trajectory is None:
        assert one.trajectory is other.trajectory
        return
    for name in ("ids", "mask", "committed", "block", "valid", "prompt_lengths"):
        assert torch.equal(getattr(one.trajectory, name), getattr(other.trajectory, name)), name
    torch.testing.assert_close(one.trajectory.confidence, other.trajectory.confidence)


# against the slow re-implementation

VARIANTS: dict[str, dict[str, Any]] = {
    "one block": {"gen_length": 8, "block_length": 8, "steps": 8},
    "uneven steps": {"gen_length": 10, "block_length": 10, "steps": 4},
    "blocks": {"gen_length": 12, "block_length": 4, "steps": 6},
    "uneven blocks": {"gen_length": 10, "block_length": 5, "steps": 6},
    "one step": {"gen_length": 6, "block_length": 6, "steps": 1},
    "blocks of one": {"gen_length": 3, "block_length": 1, "steps": 3},
    "guided": {"gen_length": 8, "block_length": 4, "steps": 8, "cfg_scale": 0.8},
    "threshold": {"gen_length": 12, "block_length": 6, "threshold": 0.5},
    "guided threshold": {"gen_length": 9, "block_length": 3, "threshold": 0.4, "cfg_scale": 1.5},
    "no eos": {"gen_length": 8, "block_length": 8, "steps": 4, "logits_eos_inf": True},
    "late eos": {"gen_length": 8, "block_length": 8, "steps": 5, "confidence_eos_eot_inf": True},
    "late eos threshold": {"gen_length": 8, "block_length": 8, "threshold": 0.4, "confidence_eos_eot_inf": True},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_published_algorithm(name: str, seed: int) -> None:
    model = MixingDenoiser(seed)
    options = dict(VARIANTS[name])
    found = run(model, PROMPTS, record=True, **options)
    never = (EOS,) if options.pop("logits_eos_inf", False) else ()
    late = (EOS, EOT) if options.pop("confidence_eos_eot_inf", False) else ()
    options.setdefault("steps", options["gen_length"])
    trajectory = found.trajectory
    assert trajectory is not None
    for i, prompt in enumerate(PROMPTS):
        expected = oracle.decode(model.one, prompt, mask_id=MASK, never=never, late=late, **options)
        assert found.tokens[i].tolist() == expected.tokens
        assert int(found.steps_used[i]) == len(expected.steps) == int(trajectory.num_steps[i])
        for s, step in enumerate(expected.steps):
            state = trajectory.states([(i, s)])
            assert state.ids[0].tolist() == step.ids
            assert state.committed[0].nonzero().squeeze(1).tolist() == step.committed
            assert int(state.block[0]) == step.block
            torch.testing.assert_close(state.confidence[0], torch.tensor(step.confidence))


def test_the_options_of_the_variants_matter() -> None:
    """Otherwise the comparison above would not see them."""
    base: dict[str, Any] = {"gen_length": 8, "block_length": 8, "steps": 5}
    changes: list[dict[str, Any]] = [
        {"cfg_scale": 0.8},
        {"logits_eos_inf": True},
        {"confidence_eos_eot_inf": True},
        {"block_length": 4},
    ]
    for change in changes:
        options = base | change | ({"steps": 4} if "block_length" in change else {})
        differs = [
            not torch.equal(
                run(MixingDenoiser(seed), PROMPTS, **base).tokens, run(MixingDenoiser(seed), PROMPTS, **options).tokens
            )
            for seed in range(6)
        ]
        assert any(differs), change


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_agrees_with_the_unchanged_algorithm_if_the_model_never_prefers_the_mask(cfg_scale: float) -> None:
    class Trained(MixingDenoiser):
        def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits = super().__call__(ids, attention_mask)
            logits[..., MASK] = -30.0
            return logits

    model = Trained(3)
    options: dict[str, Any] = {"gen_length": 12, "block_length": 6, "steps": 6, "cfg_scale": cfg_scale}
    found = run(model, PROMPTS, **options)
    for i, prompt in enumerate(PROMPTS):
        expected = oracle.decode(model.one, prompt, mask_id=MASK, forbid_mask=False, **options)
        assert found.tokens[i].tolist() == expected.tokens


def stream_of_first_prompt(seed: int) -> torch.Generator:
    return generator(int(torch.randint(2**63 - 1, (1,), generator=generator(seed))))


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_noise_enters_as_published(threshold: float | None) -> None:
    model, stream = MixingDenoiser(1), stream_of_first_prompt(11)

    def noise(n: int) -> list[list[float]]:
        return torch.rand((n, VOCABULARY), generator=stream, dtype=torch.float64).tolist()

    options: dict[str, Any] = {
        "gen_length": 8,
        "block_length": 4,
        "steps": 4,
        "temperature": 0.9,
        "threshold": threshold,
    }
    expected = oracle.decode(model.one, PROMPTS[0], mask_id=MASK, noise=noise, **options)
    found = run(model, PROMPTS[:1], generator=generator(11), record=True, **options)
    assert found.tokens[0].tolist() == expected.tokens
    assert found.trajectory is not None
    for s, step in enumerate(expected.steps):
        torch.testing.assert_close(found.trajectory.state(0, s).confidence, torch.tensor(step.confidence))


def test_random_remasking_is_as_published() -> None:
    model, stream = MixingDenoiser(2), stream_of_first_prompt(12)

    def order(n: int) -> list[float]:
        return torch.rand(n, generator=stream, dtype=torch.float64).tolist()

    options: dict[str, Any] = {"gen_length": 8, "block_length": 4, "steps": 4}
    expected = oracle.decode(model.one, PROMPTS[0], mask_id=MASK, random_order=order, **options)
    found = run(model, PROMPTS[:1], generator=generator(12), record=True, remasking="random", **options)
    assert found.tokens[0].tolist() == expected.tokens
    assert found.trajectory is not None
    for s, step in enumerate(expected.steps):  # the recorded confidence is the model's, not the random score
        torch.testing.assert_close(found.trajectory.state(0, s).confidence, torch.tensor(step.confidence))


# batching and padding


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 6},
        {"steps": 3, "block_length": 4, "cfg_scale": 0.7},
        {"threshold": 0.45, "block_length": 4},
        {"steps": 6, "temperature": 0.8},
        {"steps": 6, "remasking": "random"},
        {"temperature": 1.0, "threshold": 0.3, "block_length": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dirty_padding", [False, True])
def test_batching_and_left_padding_change_nothing(options: dict[str, Any], dirty_padding: bool) -> None:
    model = MixingDenoiser(4, dirty_padding=dirty_padding)
    options = {"gen_length": 12, "block_length": 6, "record": True} | options
    together = run(model, PROMPTS, batch_size=5, generator=generator(0), **options)
    for batch_size in (1, 2, 3):
        assert_same(together, run(model, PROMPTS, batch_size=batch_size, generator=generator(0), **options))


def test_recording_changes_nothing() -> None:
    options: dict[str, Any] = {"gen_length": 12, "block_length": 4, "steps": 6, "temperature": 0.5, "cfg_scale": 0.5}
    plain = run(MixingDenoiser(5), PROMPTS, generator=generator(1), **options)
    recorded = run(MixingDenoiser(5), PROMPTS, generator=generator(1), record=True, **options)
    assert torch.equal(plain.tokens, recorded.tokens)
    assert plain.trajectory is None


def test_order_of_the_prompts_is_kept() -> None:
    options: dict[str, Any] = {"gen_length": 8, "block_length": 8, "steps": 4}
    forwards = run(MixingDenoiser(6), PROMPTS, batch_size=2, **options)
    backwards = run(MixingDenoiser(6), PROMPTS[::-1], batch_size=2, **options)
    assert torch.equal(forwards.tokens, backwards.tokens.flip(0))
    assert len({tuple(row) for row in forwards.tokens.tolist()}) > 1


def test_tensors_and_lists_are_the_same_prompts() -> None:
    options: dict[str, Any] = {"gen_length": 4, "block_length": 4, "steps": 4}
    lists = [[3, 4], [5, 6]]
    expected = run(MixingDenoiser(0), lists, **options).tokens
    assert torch.equal(run(MixingDenoiser(0), torch.tensor(lists), **options).tokens, expected)
    mixed: list[Sequence[int] | Tensor] = [torch.tensor([3, 4], dtype=torch.int32), (5, 6)]
    assert torch.equal(run(MixingDenoiser(0), mixed, **options).tokens, expected)


def test_padding_and_guidance_as_the_denoiser_sees_them() -> None:
    seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def spy(ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append((ids.tolist(), attention_mask.int().tolist()))
        return torch.zeros((*ids.shape, VOCABULARY))

    run(spy, [[3, 4], [5]], gen_length=2, block_length=2, steps=1, cfg_scale=1.0)
    attention = [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert seen == [
        ([[PAD, 5, MASK, MASK], [3, 4, MASK, MASK]], attention),
        ([[PAD, MASK, MASK, MASK], [MASK, MASK, MASK, MASK]], attention),
    ]


def test_prompts_of_like_lengths_are_decoded_together() -> None:
    seen: list[list[int]] = []

    def spy(ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(attention_mask.sum(1).tolist())
        return torch.zeros((*ids.shape, VOCABULARY))

    prompts, options = [[5] * 4, [5], [5] * 3, [5] * 2], {"gen_length": 2, "block_length": 2, "steps": 1}
    run(spy, prompts, batch_size=2, **options)
    assert seen == [[3, 4], [5, 6]]
    seen.clear()
    run(spy, prompts, batch_size=2, record=True, **options)  # a trajectory keeps the order of its prompts
    assert seen == [[6, 3], [5, 4]]


# threshold decoding and costs


def test_fixed_steps_cost() -> None:
    model = MixingDenoiser(7)
    found = run(model, PROMPTS, batch_size=2, gen_length=12, block_length=4, steps=6)
    assert found.steps_used.tolist() == [6] * 5
    assert found.forward_passes == len(model.calls) == 18


def test_guidance_costs_two_passes_a_step() -> None:
    model = MixingDenoiser(7)
    found = run(model, PROMPTS, gen_length=12, block_length=4, steps=6, cfg_scale=0.5)
    assert found.forward_passes == len(model.calls) == 12


def test_threshold_commits_the_sure_ones_together() -> None:
    model = certain([3, 4, 5, 6], [9.0, 0.5, 9.0, 9.0])
    found = run(model, [[7, 8]], gen_length=4, block_length=4, threshold=0.9, record=True)
    assert found.tokens.tolist() == [[3, 4, 5, 6]]
    assert found.steps_used.tolist() == [2]
    assert found.trajectory is not None
    assert found.trajectory.state(0, 0).committed.int().tolist() == [0, 0, 1, 0, 1, 1]
    assert found.trajectory.mask_ratio.tolist() == [[1.0, 0.25]]


def test_threshold_out_of_reach_commits_one_at_a_time() -> None:
    model = certain([3, 4, 5, 6], [1.0, 2.0, 1.5, 0.5])
    found = run(model, gen_length=4, block_length=2, threshold=1.0, record=True)
    assert found.steps_used.tolist() == [4]
    assert found.trajectory is not None
    assert found.trajectory.committed[0].int().argmax(-1).tolist() == [1, 0, 2, 3]  # by confidence within each block
    assert found.trajectory.block.tolist() == [[0, 0, 1, 1]]


def test_finished_prompts_leave_the_batch() -> None:
    calls: list[list[int]] = []

    def sure_after_three(ids: Tensor, attention_mask: Tensor) -> Tensor:
        calls.append(ids[:, 0].tolist())
        logits = torch.zeros((*ids.shape, VOCABULARY))
        logits[..., 5] = torch.where(ids[:, :1] == 3, 20.0, 1.0)
        return logits

    found = run(sure_after_three, [[3], [4]], gen_length=4, block_length=2, threshold=0.9, record=True)
    assert found.steps_used.tolist() == [2, 4]
    assert calls == [[3, 4], [3, 4], [4], [4]]
    assert found.forward_passes == 4
    assert found.trajectory is not None
    assert found.trajectory.valid.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert found.trajectory.block.tolist() == [[0, 1, -1, -1], [0, 0, 1, 1]]  # no waiting for the slower prompt
    assert len(found.trajectory) == 6


def test_prompts_keep_their_noise_when_others_leave() -> None:
    def sure_after_three(ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = torch.zeros((*ids.shape, VOCABULARY))
        logits[..., 5] = torch.where(ids[:, :1] == 3, 50.0, 0.0)
        return logits

    options: dict[str, Any] = {"gen_length": 8, "block_length": 4, "threshold": 0.9, "temperature": 1.0}
    together = run(sure_after_three, [[3], [4], [4]], generator=generator(1), **options)
    assert together.steps_used.tolist() == [2, 8, 8]
    alone = run(sure_after_three, [[3], [4], [4]], batch_size=1, generator=generator(1), **options)
    assert torch.equal(together.tokens, alone.tokens)


# special tokens


def test_the_mask_token_is_never_generated() -> None:
    logits = torch.zeros((4, VOCABULARY))
    logits[:, MASK], logits[:, 6] = 9.0, 2.0
    found = run(FixedDenoiser(logits), [[3]], gen_length=4, block_length=4, steps=4, record=True)
    assert found.tokens.tolist() == [[6, 6, 6, 6]]
    assert found.trajectory is not None
    share = math.exp(2.0) / (math.exp(2.0) + VOCABULARY - 2)  # of a softmax without the mask token
    assert found.trajectory.state(0, 0).confidence[-1].item() == pytest.approx(share)
    sampled = run(FixedDenoiser(logits), [[3]] * 20, gen_length=4, block_length=4, steps=1, temperature=3.0)
    assert not (sampled.tokens == MASK).any()
    assert len(set(sampled.tokens.flatten().tolist())) > 3


def test_eos_can_be_excluded() -> None:
    logits = torch.zeros((3, VOCABULARY))
    logits[:, EOS], logits[:, EOT] = 9.0, 2.0
    options: dict[str, Any] = {"gen_length": 3, "block_length": 3, "steps": 3}
    assert run(FixedDenoiser(logits), **options).tokens.tolist() == [[EOS] * 3]
    assert run(FixedDenoiser(logits), logits_eos_inf=True, **options).tokens.tolist() == [[EOT] * 3]


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_eos_and_eot_can_be_committed_last(temperature: float) -> None:
    model = certain([EOS, 5, EOT, 6], [9.0, 1.0, 8.0, 2.0])
    options: dict[str, Any] = {
        "gen_length": 4,
        "block_length": 4,
        "steps": 4,
        "record": True,
        "temperature": temperature,
    }

    def order(**more: Any) -> list[int]:
        found = run(model, **options, **more)
        assert found.tokens.tolist() == [[EOS, 5, EOT, 6]]
        assert found.trajectory is not None
        torch.testing.assert_close(  # the model's own confidence is recorded all the same
            found.trajectory.state(0, 0).confidence[0].item(), math.exp(9) / (math.exp(9) + VOCABULARY - 2)
        )
        return found.trajectory.committed[0].int().argmax(-1).tolist()

    assert order() == [0, 2, 3, 1]
    assert order(confidence_eos_eot_inf=True) == [3, 1, 0, 2]
    assert order(confidence_eos_eot_inf=True, eot_token_id=None) == [2, 3, 1, 0]


# random numbers


def test_sampled_tokens_have_the_right_distribution() -> None:
    wanted = torch.tensor([0.0, 0.1, 0.05, 0.3, 0.02, 0.2, 0.03, 0.15, 0.08, 0.07, 0.0], dtype=torch.float64)
    model = FixedDenoiser((2 * wanted.log()).expand(4, VOCABULARY))  # temperature 2 undoes the factor
    prompts: list[list[int]] = [[]] * 2000
    options: dict[str, Any] = {"gen_length": 4, "block_length": 2, "steps": 2, "temperature": 2.0}
    found = run(model, prompts, batch_size=500, generator=generator(5), **options)
    for column in range(4):
        observed = found.tokens[:, column].bincount(minlength=VOCABULARY)[1:MASK].numpy()
        assert stats.chisquare(observed, 2000 * wanted[1:MASK].numpy()).pvalue > 0.001
    pairs = {tuple(pair) for pair in found.tokens[:, :2].tolist()}
    assert len(pairs) > 40  # positions do not share their noise


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random"}], ids=str)
def test_the_generator_decides(options: dict[str, Any]) -> None:
    options = options | {"gen_length": 8, "block_length": 8, "steps": 4}
    prompts = [[3, 4], [3, 4], [5]]
    first, again, other = (run(MixingDenoiser(8), prompts, generator=generator(s), **options) for s in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens[0], first.tokens[1])  # equal prompts get different noise
    torch.manual_seed(9)
    unseeded = run(MixingDenoiser(8), prompts, **options)
    torch.manual_seed(9)
    assert torch.equal(unseeded.tokens, run(MixingDenoiser(8), prompts, **options).tokens)


def test_greedy_decoding_draws_nothing() -> None:
    source = generator(3)
    before = source.get_state()
    run(MixingDenoiser(8), PROMPTS, generator=source, gen_length=8, block_length=8, steps=4)
    assert torch.equal(source.get_state(), before)


# what is recorded


@pytest.mark.parametrize("options", [{"steps": 6}, {"threshold": 0.4}, {"steps": 6, "remasking": "random"}], ids=str)
def test_trajectory_tells_the_whole_story(options: dict[str, Any]) -> None:
    found = run(MixingDenoiser(9), PROMPTS, batch_size=2, gen_length=12, block_length=4, record=True, **options)
    trajectory = found.trajectory
    assert trajectory is not None
    assert torch.equal(trajectory.num_steps, found.steps_used)
    assert trajectory.prompt_lengths.tolist() == [3, 1, 6, 0, 4]
    assert trajectory.ids.device.type == found.tokens.device.type == "cpu"
    for i, prompt in enumerate(PROMPTS):
        last = int(trajectory.num_steps[i]) - 1
        for s in range(last + 1):
            state = trajectory.state(i, s)
            start = state.ids.numel() - 12
            assert state.ids[state.attention_mask][: len(prompt)].tolist() == prompt
            assert (state.ids[~state.attention_mask] == PAD).all()
            assert torch.equal(state.mask, state.ids == MASK)
            assert state.mask_ratio == pytest.approx(int(state.mask.sum()) / 12)
            assert float(trajectory.mask_ratio[i, s]) == state.mask_ratio
            assert state.committed.any()
            assert not (state.committed & ~state.mask).any()
            where = state.committed.nonzero().squeeze(1) - start
            assert (where // 4 == state.block).all()
            assert ((state.confidence > 0) == state.attention_mask).all()
            after = torch.cat([state.ids[:start], found.tokens[i]]) if s == last else trajectory.state(i, s + 1).ids
            assert torch.equal(after != state.ids, state.committed)
        assert trajectory.mask_ratio[i, 0] == 1.0
    assert not (found.tokens == MASK).any()


def test_progress_goes_to_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"gen_length": 4, "block_length": 4, "steps": 2}
    run(MixingDenoiser(0), PROMPTS, **options)
    assert capsys.readouterr().err == ""
    run(MixingDenoiser(0), PROMPTS, progress=True, **options)
    assert "20/20" in capsys.readouterr().err


def test_no_gradients_are_kept() -> None:
    weight = torch.zeros(VOCABULARY, requires_grad=True)
    flags: list[bool] = []

    def trainable(ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = weight.expand(*ids.shape, VOCABULARY) * 2
        flags.append(logits.requires_grad)
        return logits

    run(trainable, gen_length=2, block_length=2, steps=2)
    assert flags == [False, False]


def test_the_denoisers_output_is_left_alone() -> None:
    logits = torch.randn((1, 6, VOCABULARY), generator=generator(0))
    kept = logits.clone()
    options: dict[str, Any] = {
        "gen_length": 4,
        "block_length": 2,
        "steps": 4,
        "logits_eos_inf": True,
        "confidence_eos_eot_inf": True,
    }
    variants: list[dict[str, Any]] = [{}, {"cfg_scale": 1.0}, {"temperature": 1.0}]
    for more in variants:
        run(lambda ids, attention_mask: logits, [[3, 4]], record=True, **options, **more)
        assert torch.equal(logits, kept)


# errors


def test_defaults_are_lladas() -> None:
    assert dataclasses.asdict(SamplerConfig()) == {
        "steps": 128,
        "gen_length": 128,
        "block_length": 128,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
        "threshold": None,
        "logits_eos_inf": False,
        "confidence_eos_eot_inf": False,
    }


def test_steps_do_not_matter_with_a_threshold() -> None:
    assert SamplerConfig(steps=7, gen_length=48, block_length=16, threshold=0.9).num_blocks == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps is 0; valid: an integer of at least 1"),
        ({"steps": 0, "threshold": 0.5}, r"steps is 0; valid"),
        ({"steps": 2.0}, r"steps is 2.0; valid: an integer"),
        ({"steps": True}, r"steps is True; valid: an integer"),
        ({"gen_length": 0}, r"gen_length is 0; valid: an integer of at least 1"),
        ({"block_length": -4}, r"block_length is -4; valid: an integer of at least 1"),
        ({"gen_length": 100, "block_length": 32}, r"gen_length is 100; valid: a multiple of block_length 32"),
        ({"gen_length": 100, "block_length": 32, "threshold": 0.5}, r"gen_length is 100; valid: a multiple"),
        ({"gen_length": 64}, r"gen_length is 64; valid: a multiple of block_length 128"),
        (
            {"steps": 7, "gen_length": 8, "block_length": 4},
            r"steps is 7; valid: a multiple of .* \(2 = gen_length 8 / block_length 4\)",
        ),
        ({"steps": 16, "gen_length": 8, "block_length": 4}, r"steps is 16; valid: .* at most gen_length 8"),
        ({"temperature": -0.1}, r"temperature is -0.1; valid: a finite number of at least 0"),
        ({"temperature": math.inf}, r"temperature is inf; valid"),
        ({"temperature": math.nan}, r"temperature is nan; valid"),
        ({"temperature": "1"}, r"temperature is '1'; valid"),
        ({"cfg_scale": -1.0}, r"cfg_scale is -1.0; valid: a finite number of at least 0"),
        ({"cfg_scale": math.nan}, r"cfg_scale is nan; valid"),
        ({"remasking": "entropy"}, r"remasking is 'entropy'; valid: 'low_confidence' or 'random'"),
        ({"threshold": 0.0}, r"threshold is 0.0; valid: None or a probability in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold is 1.5; valid"),
        ({"threshold": math.nan}, r"threshold is nan; valid"),
        ({"threshold": "0.9"}, r"threshold is '0.9'; valid"),
        ({"threshold": 0.9, "remasking": "random"}, r"threshold is 0.9 with remasking 'random'; valid"),
        (
            {"confidence_eos_eot_inf": True, "remasking": "random"},
            r"confidence_eos_eot_inf is True with remasking 'random'; valid",
        ),
        ({"logits_eos_inf": 1}, r"logits_eos_inf is 1; valid: True or False"),
        ({"confidence_eos_eot_inf": None}, r"confidence_eos_eot_inf is None; valid: True or False"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size is 0; valid: an integer of at least 1"),
        ({"prompts": []}, r"prompts is empty; valid: at least one prompt"),
        ({"prompts": [[3], [4, MASK, 5, MASK]]}, r"prompts\[1\] contains the mask token 10 at \[1, 3\]; valid"),
        ({"prompts": [[3], [4, -5]]}, r"prompts\[1\] contains -5; valid: token ids of at least 0"),
        ({"prompts": [[3.5]]}, r"prompts\[0\] is not a sequence of token ids .*; valid: integers"),
        ({"prompts": [3]}, r"prompts\[0\] is not a sequence of token ids"),
        ({"prompts": [torch.zeros(2)]}, r"prompts\[0\] has shape \(2,\) and dtype torch.float32; valid: a one-dim"),
        ({"prompts": [torch.zeros(2, dtype=torch.bool)]}, r"prompts\[0\] .* torch.bool; valid"),
        ({"prompts": torch.zeros((2, 2, 2), dtype=torch.int64)}, r"prompts\[0\] has shape \(2, 2\)"),
        ({"pad_token_id": MASK}, r"pad_token_id is 10; valid: any token other than mask_token_id"),
        ({"eos_token_id": MASK}, r"eos_token_id is 10; valid: any token other than mask_token_id"),
        ({"eot_token_id": MASK}, r"eot_token_id is 10; valid: any token other than mask_token_id"),
        ({"mask_token_id": -1}, r"mask_token_id is -1; valid: a token id of at least 0"),
        ({"pad_token_id": -1}, r"pad_token_id is -1; valid"),
        ({"eos_token_id": -1}, r"eos_token_id is -1; valid"),
        ({"eot_token_id": -1}, r"eot_token_id is -1; valid"),
        ({"mask_token_id": 11}, r"mask_token_id, .* is 11; valid: 0 to 10, the vocabulary"),
        ({"eos_token_id": 12, "logits_eos_inf": True}, r"eos_token_id .* is 12; valid: 0 to 10"),
        ({"eot_token_id": 13, "confidence_eos_eot_inf": True}, r"eot_token_id is 13; valid: 0 to 10"),
        ({"eos_token_id": None, "logits_eos_inf": True}, r"eos_token_id is None with logits_eos_inf True; valid"),
        ({"eos_token_id": None, "confidence_eos_eot_inf": True}, r"eos_token_id is None with confidence_eos_eot_inf"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    options = dict[str, Any](prompts=[[3]], gen_length=2, block_length=2, steps=1) | options

    def zeros(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.zeros((*ids.shape, VOCABULARY))

    with pytest.raises(ValueError, match=message):
        run(zeros, **options)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (
            lambda ids, mask: torch.zeros((*ids.shape, 11))[:, 1:],
            r"logits .* shape \(1, 2, 11\).*; valid: .* \[1, 3, V\]",
        ),
        (lambda ids, mask: torch.zeros((2, 3, 11)), r"logits .* shape \(2, 3, 11\)"),
        (lambda ids, mask: torch.zeros(ids.shape), r"logits .* shape \(1, 3\)"),
        (lambda ids, mask: torch.zeros((*ids.shape, 11), dtype=torch.int64), r"dtype torch.int64; valid: a floating"),
        (lambda ids, mask: torch.full((*ids.shape, 11), math.nan), r"confidence of NaN"),
        (lambda ids, mask: torch.full((*ids.shape, 11), math.inf), r"confidence of NaN"),
    ],
)
def test_denoiser_errors(denoiser: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(denoiser, [[3]], gen_length=2, block_length=2, steps=1)


def test_eos_is_not_needed_without_its_options() -> None:
    found = run(MixingDenoiser(0), [[3]], gen_length=2, block_length=2, steps=1, eos_token_id=None, eot_token_id=None)
    assert found.tokens.shape == (1, 2)
