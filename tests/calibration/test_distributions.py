"""Distributions of states: a contract all keep, and each against its own definition."""

import copy
import dataclasses
import itertools
from fractions import Fraction

import pytest
import torch
from scipy import stats

from dllmquant.calibration import DISTRIBUTIONS, Request, builtin_prompts, closed_loop_states, with_confidence
from dllmquant.calibration.distributions import clean, masked_text, mcs, random_t, trajectory
from dllmquant.core.grid import Grid
from dllmquant.core.rtn import rtn
from dllmquant.decoding import Trajectory
from dllmquant.generation import generate_tokens
from dllmquant.models import ModelAdapter, adapter_for
from dllmquant.nn.linear import QuantLinear
from tests.tiny import (
    tiny_diffusion_gemma,
    tiny_dream,
    tiny_fast_dllm,
    tiny_llada,
    tiny_llada2,
    tiny_sdar,
    tiny_tokenizer,
)

PAIRS = builtin_prompts(12, 0)
REQUEST = Request(num_states=10, batch_size=4, seed=1)


def coarse(model):
    """The same model with one layer rounded to 2 bits."""
    model = copy.deepcopy(model)
    name = "model.transformer.blocks.1.ff_out"
    weight = rtn(model.get_submodule(name).weight.detach(), Grid(2, 16, False))
    model.set_submodule(name, QuantLinear.from_quantized(weight, None, None, torch.float32))
    return model


def tokens(text, *, special=True):
    return tiny_tokenizer()(text, add_special_tokens=special).input_ids


def pair_tokens(pair):
    return tokens(pair[0]), tokens(pair[1], special=False)


@pytest.fixture
def unseen(monkeypatch):
    """Leaves the model out: states keep their blank confidences."""
    monkeypatch.setattr(masked_text, "with_confidence", lambda model, adapter, batch, **options: (batch, 0))


def rows(batch):
    """Per state: its tokens and masks without padding."""
    for ids, keep, mask in zip(batch.ids, batch.attention_mask, batch.mask, strict=True):
        yield ids[keep].tolist(), mask[keep].tolist()


# what all keep


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_contract(name):
    model, tokenizer = coarse(tiny_llada()).train(), tiny_tokenizer()
    before = copy.deepcopy(model.state_dict())
    draw = DISTRIBUTIONS[name].draw
    drawn = draw(model, tokenizer, PAIRS, REQUEST)
    batch, again = drawn.batch, draw(model, tokenizer, PAIRS, REQUEST).batch
    assert len(batch) == 10
    mask_id = adapter_for(model).mask_id(model.config)
    assert torch.equal(batch.mask, batch.ids == mask_id)
    assert not (batch.attention_mask[:, :-1] & ~batch.attention_mask[:, 1:]).any()  # padding on the left only
    assert batch.attention_mask[:, -1].all()
    assert batch.attention_mask[:, 0].any()
    assert not (batch.mask & ~batch.attention_mask).any()
    assert not (batch.committed & ~batch.mask).any()
    assert ((batch.confidence >= 0) & (batch.confidence <= 1)).all()
    assert (batch.confidence[~batch.attention_mask] == 0).all()
    assert ((batch.mask_ratio >= 0) & (batch.mask_ratio <= 1)).all()
    assert ((batch.mask_ratio > 0) == batch.mask.any(1)).all()
    assert all(torch.equal(getattr(batch, field), getattr(again, field)) for field in batch.__dataclass_fields__)
    # Coverage, by loops.
    masked = [[0] * 4 for _ in range(4)]
    count = [0, 0, 0, 0]
    for ratio, mask in zip(batch.mask_ratio.tolist(), batch.mask, strict=True):
        bucket = next(b for b in range(4) if ratio <= (b + 1) / 4)
        count[bucket] += 1
        masked[0][bucket] += int(mask.sum())
    assert [sum(column) for column in zip(*drawn.coverage.states, strict=True)] == count
    assert [sum(column) for column in zip(*drawn.coverage.masked_tokens, strict=True)] == masked[0]
    assert sum(map(sum, drawn.coverage.unmasked_tokens)) == int((batch.attention_mask & ~batch.mask).sum())
    # The model is as it was.
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert drawn.cost.prompts == (10 if DISTRIBUTIONS[name].prompt_per_state else 12)
    assert drawn.cost.seconds > 0
    assert not drawn.cost.cached


@pytest.fixture
def shown(monkeypatch):
    """What models are shown: the attention mask of every call."""
    masks = []

    def watched(make):
        def made(adapter, model):
            function = make(adapter, model)

            def called(ids, attention_mask, *more):
                masks.append(attention_mask)
                return function(ids, attention_mask, *more)

            return called

        return made

    for name in ("denoiser", "refiner"):
        monkeypatch.setattr(ModelAdapter, name, watched(getattr(ModelAdapter, name)))
    return masks


def same_cost(cost, shown):
    counted = (len(shown), sum(map(len, shown)), sum(int(mask.sum()) for mask in shown))
    return (cost.forward_passes, cost.sequences, cost.tokens) == counted


@pytest.mark.parametrize("sampler", [{}, {"cfg_scale": 0.5}, {"threshold": 0.02}], ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_cost_is_what_the_model_is_shown(name, sampler, shown):
    request = dataclasses.replace(REQUEST, sampler=sampler)
    cost = DISTRIBUTIONS[name].draw(coarse(tiny_llada()), tiny_tokenizer(), PAIRS, request).cost
    assert same_cost(cost, shown)
    assert (cost.tokens > 0) == (name != "clean")


@pytest.mark.parametrize("build", [tiny_dream, tiny_sdar, tiny_diffusion_gemma])
def test_cost_of_every_sampler(build, shown):
    cost = trajectory.trajectory_states(build(), tiny_tokenizer(), PAIRS, REQUEST).cost
    assert shown
    assert same_cost(cost, shown)


@pytest.mark.parametrize("name", ["trajectory", "random_t", "mcs"])
def test_seeds_differ_and_batch_sizes_do_not(name):
    model, draw = tiny_llada().double(), DISTRIBUTIONS[name].draw
    first = draw(model, tiny_tokenizer(), PAIRS, REQUEST).batch
    other = draw(model, tiny_tokenizer(), PAIRS, Request(num_states=10, batch_size=4, seed=2)).batch
    wide = draw(model, tiny_tokenizer(), PAIRS, Request(num_states=10, batch_size=99, seed=1)).batch
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)
    assert torch.equal(first.ids, wide.ids)
    torch.testing.assert_close(first.confidence, wide.confidence)
    assert torch.equal(first.committed, wide.committed)


@pytest.mark.parametrize("name", ["clean", "random_t", "mcs"])
def test_every_state_needs_a_prompt(name):
    with pytest.raises(ValueError, match="prompts: 9 given; valid: 10, one for each state"):
        DISTRIBUTIONS[name].draw(tiny_llada(), tiny_tokenizer(), PAIRS[:9], REQUEST)


# clean


def test_clean_states_are_the_texts():
    batch = clean.clean_states(tiny_llada(), tiny_tokenizer(), ["so", *PAIRS], REQUEST).batch
    for (ids, mask), prompt in zip(rows(batch), ["so", *PAIRS], strict=False):
        assert ids == tokens("".join(prompt))
        assert not any(mask)


# trajectory and closed loop


def test_trajectory_states_are_recorded_ones():
    model, tokenizer = tiny_llada(), tiny_tokenizer()
    request = Request(num_states=20, batch_size=5, seed=3, sampler={"steps": 4, "gen_length": 16, "block_length": 8})
    drawn = trajectory.trajectory_states(model, tokenizer, PAIRS, request)
    generation = generate_tokens(model, tokenizer, [p for p, _ in PAIRS], batch_size=5, record=True, **request.sampler)
    recorded = generation.trajectory
    everything = recorded.states([(p, s) for p in range(12) for s in range(4)])
    index = {(*ids, sum(mask)): i for i, (ids, mask) in enumerate(rows(everything))}
    found = [index[(*ids, sum(mask))] for ids, mask in rows(drawn.batch)]
    assert len(set(found)) == 20
    # Four steps, four segments: step s is segment s, at a mask ratio of 1 − s/4.
    states = [[0] * 4 for _ in range(4)]
    for place in found:
        states[place % 4][3 - place % 4] += 1
    assert (
        drawn.coverage.states == tuple(map(tuple, states)) == ((0, 0, 0, 6), (0, 0, 4, 0), (0, 4, 0, 0), (6, 0, 0, 0))
    )
    assert drawn.coverage.recorded == ((0, 0, 0, 12), (0, 0, 12, 0), (0, 12, 0, 0), (12, 0, 0, 0))
    assert drawn.cost.forward_passes == generation.forward_passes == 3 * 4
    assert drawn.notes == ()


def test_the_tail_lies_behind_the_first_eos_of_the_generation():
    """Two prompts of 1 and 2 tokens, both holding an EOS, that must not count; the second prompt takes two steps."""
    eos, mask, other = 9, 8, 1
    last = [[0, eos, other, eos, mask, eos], [other, eos, other, other, mask, mask]]
    ids = torch.tensor([[last[0], [0] * 6], [[other, eos, *[mask] * 4], last[1]]], dtype=torch.int32)
    valid = torch.tensor([[True, False], [True, True]])
    recorded = Trajectory(
        ids=ids,
        mask=ids == mask,
        confidence=torch.zeros(ids.shape),
        committed=torch.zeros(ids.shape, dtype=torch.bool),
        block=torch.zeros(2, 2, dtype=torch.int64),
        valid=valid,
        prompt_lengths=torch.tensor([1, 2]),
        gen_length=4,
        pad_token_id=0,
    )
    none = [False] * 6
    assert trajectory.behind_the_end(recorded, eos).tolist() == [[*none[:4], True, True], none]
    assert trajectory.behind_the_end(recorded, None).tolist() == [none, none]


def test_tokens_of_later_blocks_wait():
    """A prompt token and two blocks of two, one token a step; the run ends before the last token is committed."""
    masks = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0] * 5]).bool()
    commits = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0] * 5]).bool()
    recorded = Trajectory(
        ids=torch.zeros(1, 4, 5, dtype=torch.int32),
        mask=masks[None],
        confidence=torch.zeros(1, 4, 5),
        committed=commits[None],
        block=torch.tensor([[0, 0, 1, -1]]),
        valid=torch.tensor([[True, True, True, False]]),
        prompt_lengths=torch.tensor([1]),
        gen_length=4,
        pad_token_id=0,
    )
    expected = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0] * 5]
    assert trajectory.in_later_blocks(recorded).int().tolist() == [expected]


def test_waiting_tokens_are_those_behind_the_block_being_decoded():
    sampler = {"steps": 8, "gen_length": 8, "block_length": 2}
    drawn = trajectory.trajectory_states(tiny_llada(), tiny_tokenizer(), PAIRS, Request(num_states=16, sampler=sampler))
    start = drawn.batch.ids.shape[1] - 8
    behind = torch.arange(drawn.batch.ids.shape[1]) >= start + 2 * (drawn.batch.block[:, None] + 1)
    assert torch.equal(drawn.waiting, behind)
    assert bool((drawn.waiting & ~drawn.batch.committed).any())
    whole = {"steps": 8, "gen_length": 8, "block_length": 8}
    drawn = trajectory.trajectory_states(tiny_llada(), tiny_tokenizer(), PAIRS, Request(num_states=16, sampler=whole))
    assert not drawn.waiting.any()


def test_notes_of_a_trajectory_that_is_too_short():
    request = Request(num_states=6, sampler={"steps": 2, "gen_length": 8, "block_length": 8})
    notes = trajectory.trajectory_states(tiny_llada(), tiny_tokenizer(), PAIRS, request).notes
    assert notes == (
        "segment 2 of 4 holds 0 states, its quota asks for 1; 1 redistributed",
        "segment 4 of 4 holds 0 states, its quota asks for 2; 2 redistributed",
        "no recorded state lies in segment 2 of 4 with 50 to 75% masked, segment 4 of 4 with 0 to 25% masked",
    )


def test_mask_ratio_buckets_reach_the_selection():
    """Threshold decoding: prompts fall through the ratios at different speeds."""
    request = Request(num_states=30, mask_ratio_buckets=4, sampler={"threshold": 0.05})
    coverage = trajectory.trajectory_states(tiny_llada(), tiny_tokenizer(), PAIRS, request).coverage
    for states, recorded in zip(coverage.states, coverage.recorded, strict=True):
        assert sum(map(bool, states)) == min(sum(states), sum(map(bool, recorded)))


def test_closed_loop_records_the_quantized_model():
    original, tokenizer = tiny_llada(), tiny_tokenizer()
    quantized = coarse(original)
    closed = closed_loop_states(quantized, tokenizer, PAIRS, REQUEST)
    same = trajectory.trajectory_states(quantized, tokenizer, PAIRS, REQUEST)
    assert torch.equal(closed.batch.ids, same.batch.ids)
    assert torch.equal(closed.batch.confidence, same.batch.confidence)
    open_loop = trajectory.trajectory_states(original, tokenizer, PAIRS, REQUEST)
    assert not torch.equal(closed.batch.ids, open_loop.batch.ids)


def test_closed_loop_of_the_original_is_an_error():
    with pytest.raises(ValueError, match="'closed_loop': the model holds no quantized layer"):
        closed_loop_states(tiny_llada(), tiny_tokenizer(), PAIRS, REQUEST)


# random_t


@pytest.mark.usefixtures("unseen")
def test_random_t_masks_completions_only():
    batch = random_t.random_t_states(tiny_llada(), tiny_tokenizer(), PAIRS, REQUEST).batch
    for (ids, mask), ratio, pair in zip(rows(batch), batch.mask_ratio.tolist(), PAIRS, strict=False):
        prompt, completion = pair_tokens(pair)
        assert len(ids) == len(prompt) + len(completion)
        assert not any(mask[: len(prompt)])
        for token, masked, original in zip(ids, mask, prompt + completion, strict=True):
            assert masked or token == original
        assert ratio == pytest.approx(sum(mask) / len(completion))


@pytest.mark.usefixtures("unseen")
def test_random_t_is_uniform():
    """Long completions: the masked share is t but for noise, and uniform as a Kolmogorov-Smirnov test sees it."""
    pair = ("q: how many? a:", " so" * 400)
    request = Request(num_states=400, seed=0)
    batch = random_t.random_t_states(tiny_llada(), tiny_tokenizer(), [pair] * 400, request).batch
    assert stats.kstest(batch.mask_ratio.numpy(), "uniform").pvalue > 0.05
    # Times of different states are independent, not stratified: the largest gap of 400 uniforms is not 1/400.
    gaps = batch.mask_ratio.sort().values.diff()
    assert gaps.max() > 2 / 400


@pytest.mark.usefixtures("unseen")
def test_random_t_counts_are_uniform():
    """With t uniform and masks independent given t, the number of masks of L tokens is uniform on 0..L, exactly."""
    pair = ("q: how many? a:", " so so so so so")
    assert len(pair_tokens(pair)[1]) == 5
    batch = random_t.random_t_states(
        tiny_llada(), tiny_tokenizer(), [pair] * 1200, Request(num_states=1200, seed=5)
    ).batch
    counts = torch.bincount(batch.mask.sum(1), minlength=6)
    assert stats.chisquare(counts.numpy()).pvalue > 0.05


def test_masks_are_independent_given_the_time():
    times = torch.full((4000,), 0.3, dtype=torch.float64)
    mask, ratio = masked_text.random_masks([(7, 3)] * 4000, times, torch.Generator().manual_seed(0))
    assert not mask[:, :3].any()
    patterns = list(itertools.product((False, True), repeat=4))
    seen = [int((mask[:, 3:] == torch.tensor(pattern)).all(1).sum()) for pattern in patterns]
    expected = [4000 * 0.3 ** sum(pattern) * 0.7 ** (4 - sum(pattern)) for pattern in patterns]
    assert stats.chisquare(seen, expected).pvalue > 0.01
    assert torch.equal(ratio, mask.sum(1) / 4)


def test_rows_of_different_lengths_are_aligned_on_the_right():
    times = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    mask, ratio = masked_text.random_masks([(5, 2), (3, 0), (4, 1)], times, torch.Generator())
    assert mask.tolist() == [[False, False, True, True, True], [False, False, True, True, True], [False] * 5]
    assert ratio.tolist() == [1.0, 1.0, 0.0]


# mcs


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("prefix", [0.0, 0.25, 0.5])
def test_mcs_keeps_a_prefix_and_masks_at_stratified_ratios(prefix):
    """Over many seeds, state i masks each later token with probability (i + 1)/N."""
    model, tokenizer = tiny_llada(), tiny_tokenizer()
    masked, maskable = [0] * 5, [0] * 5
    for seed in range(60):
        request = Request(num_states=5, seed=seed, visible_prefix=prefix)
        batch = mcs.mcs_states(model, tokenizer, PAIRS, request).batch
        for i, ((ids, mask), ratio, pair) in enumerate(
            zip(rows(batch), batch.mask_ratio.tolist(), PAIRS, strict=False)
        ):
            text = [*itertools.chain(*pair_tokens(pair))]
            visible = int(Fraction(prefix) * len(text))
            assert len(ids) == len(text)
            assert not any(mask[:visible])
            assert all(m or token == original for m, token, original in zip(mask, ids, text, strict=True))
            assert ratio == pytest.approx(sum(mask) / (len(text) - visible))
            masked[i] += sum(mask)
            maskable[i] += len(text) - visible
    assert masked[4] == maskable[4]
    for i in range(4):
        assert stats.binomtest(masked[i], maskable[i], (i + 1) / 5).pvalue > 0.01


def test_mcs_covers_every_segment():
    """N times at equal distances: a quarter of the states in each of four segments."""
    coverage = mcs.mcs_states(tiny_llada(), tiny_tokenizer(), PAIRS, Request(num_states=12)).coverage
    assert [sum(row) for row in coverage.states] == [3, 3, 3, 3]  # t = 12/12, 11/12, 10/12 in the first
    assert coverage.recorded is None


@pytest.mark.parametrize("prefix", [-0.1, 1.0])
def test_mcs_prefix_is_a_share(prefix):
    with pytest.raises(ValueError, match=rf"visible_prefix: {prefix}; valid: a share in \[0, 1\)"):
        mcs.mcs_states(tiny_llada(), tiny_tokenizer(), PAIRS, Request(num_states=4, visible_prefix=prefix))


# both


@pytest.mark.parametrize("name", ["random_t", "mcs"])
def test_confidences_are_those_of_one_pass_over_the_states(name):
    model, tokenizer = tiny_llada(), tiny_tokenizer()
    drawn = DISTRIBUTIONS[name].draw(model, tokenizer, PAIRS, REQUEST)
    filled, passes = with_confidence(model, adapter_for(model), drawn.batch, batch_size=4)
    assert passes == drawn.cost.forward_passes == 3
    assert torch.equal(filled.confidence, drawn.batch.confidence)
    assert torch.equal(filled.committed, drawn.batch.committed)
    assert torch.equal(filled.committed.any(1), drawn.batch.mask.any(1))
    assert drawn.batch.confidence[drawn.batch.mask].min() > 0


@pytest.mark.parametrize("name", ["random_t", "mcs"])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("so", r"prompts\[1\]: no completion; states '{name}' masks completions, so give \(prompt, completion\) pairs"),
        (("so", ""), r"prompts\[1\]: no completion"),
        (("so", " [MASK]"), r"prompts\[1\]: holds the mask token"),
        (("[MASK]", " so"), r"prompts\[1\]: holds the mask token"),
    ],
)
def test_pairs_that_cannot_be_masked(name, prompt, message):
    if "[MASK]" in prompt:
        prompt = tuple(part.replace("[MASK]", tiny_tokenizer().mask_token) for part in prompt)
    with pytest.raises(ValueError, match=message.format(name=name)):
        DISTRIBUTIONS[name].draw(tiny_llada(), tiny_tokenizer(), [PAIRS[0], prompt], Request(num_states=2))


def test_a_tokenizer_that_cannot_pad():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an EOS token"):
        clean.clean_states(tiny_llada(), tokenizer, PAIRS, REQUEST)


@pytest.mark.parametrize("family", [tiny_sdar, tiny_llada2, tiny_fast_dllm])
def test_states_of_block_causal_models_end_with_the_block_that_is_decoded(family, monkeypatch):
    model, tokenizer = family(), tiny_tokenizer()
    drawn = trajectory.trajectory_states(model, tokenizer, PAIRS, REQUEST).batch
    monkeypatch.setattr(trajectory, "without_later_blocks", lambda batch, *_: batch)
    whole = trajectory.trajectory_states(model, tokenizer, PAIRS, REQUEST).batch
    adapter = adapter_for(model)
    length = adapter.sampler_config(model.config).block_length
    denoise = adapter.denoiser(model)
    with torch.no_grad():
        logits, full = (denoise(batch.ids, batch.attention_mask) for batch in (drawn, whole))
    cut = 0
    for row in range(len(drawn)):
        real = whole.attention_mask[row].nonzero().squeeze(1).tolist()
        first = real.index(int(whole.mask[row].nonzero()[0]))
        end = (first // length + 1) * length
        kept, dropped = real[:end], real[end:]
        cut += len(dropped)
        assert drawn.attention_mask[row].nonzero().squeeze(1).tolist() == kept
        for name in ("ids", "mask", "confidence", "committed"):
            assert torch.equal(getattr(drawn, name)[row, kept], getattr(whole, name)[row, kept])
        assert not drawn.mask[row, dropped].any()
        assert not drawn.confidence[row, dropped].any()
        assert drawn.committed[row].sum() == whole.committed[row].sum() > 0
        torch.testing.assert_close(logits[row, kept], full[row, kept], atol=1e-4, rtol=1e-4)
    assert cut > 0
    assert torch.equal(drawn.ids == adapter.mask_id(model.config), drawn.mask)
    assert torch.equal(drawn.mask_ratio, whole.mask_ratio)
