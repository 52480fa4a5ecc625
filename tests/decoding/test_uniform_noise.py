"""Decoding from uniform noise, against transformers' own pieces of it, put together here as its `generate` does."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from dllmquant.decoding import Generation, Trajectory, UniformNoiseSamplerConfig, sample, sample_canvases
from dllmquant.decoding.uniform_noise import accept, temperature

VOCABULARY, SIZE, PAD = 13, 5, 0
CONFIG = UniformNoiseSamplerConfig(
    steps=7, gen_length=15, canvas_length=SIZE, entropy_bound=0.8, t_min=0.3, t_max=0.9, confidence_threshold=0.3
)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [], [8, 8]]
MATRIX = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PLACES = torch.randn(SIZE, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def toy(
    ids: Tensor, attention_mask: Tensor, previous: Tensor | None, window: slice, *, sharpness: float = 1.0
) -> Tensor:
    """A model that computes every row by itself: of what is attended, of the token, its place and what was predicted.

    It grows surer of what it said before, so canvases finish at different steps.
    """
    length = attention_mask.sum(1)[:, None, None]
    whole = (MATRIX[ids] * attention_mask[..., None]).sum(1, keepdim=True) / length**0.5
    logits = whole.roll(1, -1) + 0.7 * MATRIX[ids]
    logits[:, -SIZE:] += PLACES
    if previous is not None:
        logits[:, -SIZE:] += 0.7 * previous.softmax(-1).to(logits) * previous.clamp(min=0).to(logits)
    return (sharpness * logits)[:, window]


def run(
    prompts: Sequence[Sequence[int]] = PROMPTS, config: UniformNoiseSamplerConfig = CONFIG, **options: Any
) -> Generation:
    given: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "record": True}
    generator = torch.Generator().manual_seed(5)
    return sample_canvases(toy, prompts, config, generator=generator, **given | options)


def reference(prompt: Sequence[int], config: UniformNoiseSamplerConfig, stream: torch.Generator) -> dict[str, Any]:
    """What transformers' sampler, temperatures and stopping make of one prompt, every canvas decoded to its end."""
    ids, states, accepted_masks, counts, candidates = list(prompt), [], [], [], []
    for _ in range(config.gen_length // SIZE):
        sampler: Any = EntropyBoundSampler(
            EntropyBoundSamplerConfig(config.entropy_bound), SIZE, VOCABULARY, config.steps
        )
        sampler.initialize_canvas = lambda *_: torch.randint(VOCABULARY, (1, SIZE), generator=stream)
        schedule: Any = LinearTemperatureScheduleLogitsProcessor(config.t_min, config.t_max, config.steps)
        stop: Any = StableAndConfidentStoppingCriteria(config.stability_threshold, config.confidence_threshold)
        canvas, previous = sampler.initialize_canvas(1, "cpu"), None
        for left in range(config.steps, 0, -1):
            row = torch.cat((torch.tensor([ids], dtype=torch.int64), canvas), dim=1)
            logits = toy(row, torch.ones_like(row, dtype=torch.bool), previous, slice(len(ids), None))
            previous = schedule(row, logits, left)
            uniform = torch.rand(SIZE, generator=stream, dtype=torch.float64)
            inverse = (previous[0].softmax(-1).cumsum(-1) > uniform[:, None]).to(torch.int8).argmax(-1)
            states.append(row[0])
            candidates.append(logits[0].softmax(-1)[torch.arange(SIZE), inverse])
            canvas = sampler.renoise_canvas(sampler.accept_canvas(canvas, inverse[None], previous, left), left)
            accepted_masks.append(sampler.accepted_token_mask[0])
            best = previous.argmax(-1)
            if bool(stop(best, previous)):
                break
        counts.append(config.steps - left + 1)
        ids += best[0].tolist()
    return {
        "tokens": ids[len(prompt) :],
        "states": states,
        "accepted": accepted_masks,
        "steps": counts,
        "confidence": candidates,
    }


def streams(count: int) -> list[torch.Generator]:
    seeds = torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(5))
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-step": {"steps": 1},
    "at-once": {"stability_threshold": 0, "confidence_threshold": 50.0},
    "three-times-the-same": {"stability_threshold": 3, "confidence_threshold": 2.0, "steps": 12},
    "never-sure": {"confidence_threshold": 1e-9},
    "one-by-one": {"entropy_bound": 1e-9},
    "all-at-once": {"entropy_bound": 100.0, "t_min": 0.5, "t_max": 0.5},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_transformers_pieces(changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    generation = run(config=config)
    assert generation.trajectory is not None
    trajectory, row = generation.trajectory, 0
    for index, (prompt, stream) in enumerate(zip(PROMPTS, streams(len(PROMPTS)), strict=True)):
        expected = reference(prompt, config, stream)
        assert generation.tokens[index].tolist() == expected["tokens"]
        assert generation.steps_used[index] == sum(expected["steps"])
        number = 0
        for count in expected["steps"]:
            assert trajectory.num_steps[row] == count
            for step in range(count):
                state, accepted = expected["states"][number], expected["accepted"][number]
                length = len(state)
                assert torch.equal(trajectory.ids[row, step, -length:].long(), state)
                masked = trajectory.mask[row, step]
                noise = ~expected["accepted"][number - 1] if step else torch.ones(SIZE, dtype=torch.bool)
                assert torch.equal(masked[-SIZE:], noise)
                assert not bool(masked[:-SIZE].any())
                assert torch.equal(trajectory.committed[row, step, -SIZE:], noise & accepted)
                sure = trajectory.confidence[row, step, -SIZE:]
                torch.testing.assert_close(sure, expected["confidence"][number].float())
                number += 1
            assert trajectory.prompt_lengths[row] == length - SIZE
            row += 1
    assert row == trajectory.num_prompts == 3 * len(PROMPTS)
    assert bool((trajectory.block[trajectory.valid] == 0).all())


def test_variants_differ_in_what_they_are_named_for() -> None:
    """Otherwise the comparison above would compare little."""

    def ratios(**changes: Any) -> tuple[list[int], Tensor]:
        generation = run(config=replace(CONFIG, **changes))
        assert generation.trajectory is not None
        return generation.trajectory.num_steps.tolist(), generation.trajectory.mask_ratio

    steps, ratio = ratios()
    assert len(set(steps)) > 2
    assert bool((ratio[:, 1:] > ratio[:, :-1]).any()), "tokens that were accepted are given up"
    assert set(ratios(**VARIANTS["at-once"])[0]) == {1}
    assert set(ratios(**VARIANTS["never-sure"])[0]) == {7}
    assert len(set(ratios(**VARIANTS["three-times-the-same"])[0])) > 1
    assert bool((ratios(**VARIANTS["one-by-one"])[1][:, 1] == 1 - 1 / SIZE).all())
    assert bool((ratios(**VARIANTS["all-at-once"])[1][:, 1:] == 0).all())


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    together, apart = run(), run(batch_size=batch_size)
    assert torch.equal(together.tokens, apart.tokens)
    assert torch.equal(together.steps_used, apart.steps_used)
    assert together.trajectory is not None
    assert apart.trajectory is not None
    for name in ("ids", "mask", "committed", "valid", "prompt_lengths"):
        assert torch.equal(getattr(together.trajectory, name), getattr(apart.trajectory, name)), name
    torch.testing.assert_close(together.trajectory.confidence, apart.trajectory.confidence)
    unrecorded = run(batch_size=batch_size, record=False)
    assert torch.equal(unrecorded.tokens, together.tokens)
    assert unrecorded.trajectory is None


def test_the_context_has_confidences_and_padding_none() -> None:
    trajectory = run().trajectory
    assert trajectory is not None
    row = 3 * 2  # the longest prompt, which is not padded
    context = PROMPTS[2]
    ids = torch.tensor([context + trajectory.ids[row, 0, -SIZE:].tolist()])
    expected = toy(ids, torch.ones_like(ids), None, slice(None)).softmax(-1).amax(-1)[0, : len(context)]
    for step in range(int(trajectory.num_steps[row])):
        found = trajectory.confidence[row, step, -SIZE - len(context) : -SIZE]
        torch.testing.assert_close(found, expected.float())
    assert not bool(trajectory.confidence[~trajectory.attention_mask[:, None].expand(trajectory.ids.shape)].any())


def test_a_prompt_ends_with_the_canvas_that_holds_an_ending_token() -> None:
    whole = run(record=False)
    assert whole.lengths is not None
    assert whole.lengths.tolist() == [15] * len(PROMPTS)
    end = int(whole.tokens[0, 6])
    generation = run(eos_token_id=end, eot_token_id=VOCABULARY - 1)
    assert generation.lengths is not None
    rows = 0
    for index, row in enumerate(whole.tokens.tolist()):
        ends = [place for place, token in enumerate(row) if token in (end, VOCABULARY - 1)]
        length = ends[0] + 1 if ends else 15
        canvases = -(-length // SIZE)
        assert generation.lengths[index] == length
        assert generation.tokens[index].tolist() == row[: canvases * SIZE] + [PAD] * (15 - canvases * SIZE)
        rows += canvases
    assert generation.trajectory is not None
    assert generation.trajectory.num_prompts == rows < 15
    assert int(generation.lengths[0]) in range(1, 8)
    for name in ("eos_token_id", "eot_token_id"):
        options: dict[str, Any] = {name: end}
        single = run(record=False, **options)
        assert single.lengths is not None
        assert single.lengths[0] == whole.tokens[0].tolist().index(end) + 1
        assert single.tokens[0].tolist()[10:] == [PAD] * 5


def test_forward_passes_are_counted() -> None:
    generation = run(batch_size=1)
    assert generation.forward_passes == int(generation.steps_used.sum())
    assert max(generation.steps_used.tolist()) <= run().forward_passes < generation.forward_passes


def test_acceptance_equals_transformers() -> None:
    logits = 3 * torch.randn(40, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    for bound in (1e-3, 0.1, 1.0, 4.0):
        sampler: Any = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 9, 11, 1)
        sampler.accept_canvas(torch.zeros(40, 9), torch.ones(40, 9), logits, 1)
        assert torch.equal(accept(entropy, bound), sampler.accepted_token_mask)
    assert accept(torch.tensor([[2.0, 1.0, 1.0]]), 0.0).tolist() == [[False, True, False]]
    assert accept(torch.tensor([[2.0, 1.0, 1.0]]), 1.0).tolist() == [[False, True, True]]


def test_temperature_falls_from_the_first_step() -> None:
    schedule: Any = LinearTemperatureScheduleLogitsProcessor(CONFIG.t_min, CONFIG.t_max, CONFIG.steps)
    one = torch.ones(1, dtype=torch.float64)
    for step in range(CONFIG.steps):
        assert temperature(CONFIG, step) == pytest.approx(1 / float(schedule(one, one, CONFIG.steps - step)))
    assert temperature(CONFIG, 0) == pytest.approx(CONFIG.t_max)


def test_defaults_are_those_of_transformers() -> None:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    theirs = DiffusionGemmaGenerationConfig._get_default_generation_params()
    ours = asdict(UniformNoiseSamplerConfig())
    assert ours.pop("steps") == theirs["max_denoising_steps"]
    assert ours.pop("entropy_bound") == theirs["sampler_config"].entropy_bound
    assert ours.pop("gen_length") == ours.pop("canvas_length") == theirs["max_new_tokens"]
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; valid: an integer of at least 1"),
        ({"canvas_length": 4}, "gen_length is 15; valid: a multiple of canvas_length 4"),
        ({"entropy_bound": 0}, "entropy_bound is 0; valid: a number above 0"),
        ({"entropy_bound": float("inf")}, "entropy_bound is inf; valid: a finite number"),
        ({"t_min": -0.1}, r"t_min is -0\.1; valid: a finite number of at least 0"),
        ({"t_min": 0.95}, r"t_min is 0\.95; valid: at most t_max 0\.9"),
        ({"t_min": 0, "t_max": 0}, "t_max is 0; valid: a number above 0"),
        ({"stability_threshold": -1}, "stability_threshold is -1; valid: an integer of at least 0"),
        ({"stability_threshold": True}, "stability_threshold is True; valid"),
        ({"confidence_threshold": "low"}, "confidence_threshold is 'low'; valid"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1, -2]]}, r"prompts\[0\] contains -2; valid: token ids of at least 0"),
        ({"batch_size": 0}, "batch_size is 0; valid: an integer of at least 1"),
        ({"pad_token_id": -1}, "pad_token_id is -1; valid: a token id of at least 0"),
        ({"eos_token_id": -1}, "eos_token_id is -1; valid: a token id of at least 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda good: good[:, 1:], r"shape \(5, 9, 13\) .*; valid: a floating tensor \[5, 10, V\]"),
        (lambda good: good.long(), r"dtype torch\.int64; valid: a floating tensor"),
        (lambda good: good * float("nan"), "entropy of NaN; valid: logits without NaN"),
    ],
)
def test_wrong_logits_are_named(logits: Any, message: str) -> None:
    def wrong(*given: Any) -> Tensor:
        changed: Tensor = logits(toy(*given))
        return changed

    with pytest.raises(ValueError, match=message):
        sample_canvases(wrong, PROMPTS, CONFIG, vocab_size=VOCABULARY, pad_token_id=PAD, record=True)


def test_the_samplers_with_a_mask_token_refuse_it() -> None:
    with pytest.raises(ValueError, match="valid: a sampler with a mask token"):
        sample(lambda ids, mask: ids, PROMPTS, CONFIG, mask_token_id=1, pad_token_id=0)


def test_the_records_of_canvases_can_be_selected_from() -> None:
    trajectory = run().trajectory
    assert isinstance(trajectory, Trajectory)
    batch = trajectory.states([(0, 1), (7, 0)])
    assert batch.ids.shape == (2, len(PROMPTS[2]) + 2 * SIZE)
    assert torch.equal(batch.mask.sum(1) / SIZE, batch.mask_ratio)
    assert float(batch.mask_ratio[1]) == 1.0
