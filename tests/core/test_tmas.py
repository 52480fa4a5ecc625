"""TMAS: quotas, segments, spread over mask ratios and prompts, and what happens when states run short."""

from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmquant.core.tmas import Selection, select_states


def trajectories(lengths: list[int], steps: int | None = None) -> dict[str, Tensor]:
    """Linear decoding of `lengths[p]` steps each: the mask ratio falls from 1; two blocks per trajectory."""
    steps = steps or max(lengths)
    length = torch.tensor(lengths)[:, None]
    step = torch.arange(steps)[None]
    return {
        "mask_ratio": (1 - step / length).clamp(min=0),
        "valid": step < length,
        "block": (2 * step // length).clamp(max=1),
    }


def select(record: dict[str, Tensor], num_states: int, seed: int = 0, **options: Any) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    return select_states(**record, num_states=num_states, generator=generator, **options)  # type: ignore[arg-type]


def quarter(step: int, length: int, parts: int = 4) -> int:
    """The part of its trajectory a step lies in, found by its bounds."""
    return next(q for q in range(parts) if Fraction(q, parts) <= Fraction(step, length) < Fraction(q + 1, parts))


def by_segment(selection: Selection) -> list[list[tuple[int, int]]]:
    states = iter(selection.states)
    return [[(s.trajectory, s.step) for s in islice(states, n)] for n in selection.counts]


@pytest.mark.parametrize(
    ("num_states", "expected"),
    [
        (10, (3, 2, 2, 3)),
        (100, (30, 20, 20, 30)),
        (1, (1, 0, 0, 0)),
        (2, (1, 0, 0, 1)),
        (3, (1, 1, 0, 1)),  # 0.9 0.6 0.6 0.9: remainders first, ties to the earlier
        (5, (2, 1, 1, 1)),  # 1.5 1 1 1.5
        (7, (2, 2, 1, 2)),  # 2.1 1.4 1.4 2.1
        (32, (10, 6, 6, 10)),  # 9.6 6.4 6.4 9.6
    ],
)
def test_quotas_by_largest_remainder(num_states: int, expected: tuple[int, ...]) -> None:
    selection = select(trajectories([40] * 4), num_states)
    assert selection.counts == selection.requested == expected
    assert len(selection.states) == num_states
    assert selection.notes == ()


def test_other_quotas() -> None:
    record = trajectories([12] * 5)
    assert select(record, 9, quotas=(1.0,)).counts == (9,)
    assert select(record, 10, quotas=(0.5, 0.0, 0.5)).counts == (5, 0, 5)
    third = select(record, 7, quotas=(0.2, 0.5, 0.3))
    assert third.counts == (1, 4, 2)  # 1.4 3.5 2.1
    for index, states in enumerate(by_segment(third)):
        assert {quarter(step, 12, 3) for _, step in states} == {index}


@pytest.mark.parametrize("lengths", [[16] * 3, [8, 16, 13, 32], [5, 7, 1, 2, 3, 30]])
def test_states_lie_in_their_quarter(lengths: list[int]) -> None:
    """Quarters are those of each trajectory's own length; padding steps are never taken."""
    record = trajectories(lengths, steps=40)
    selection = select(record, sum(lengths) // 2)
    for index, states in enumerate(by_segment(selection)):
        assert states
        for trajectory, step in states:
            assert step < lengths[trajectory]
            assert quarter(step, lengths[trajectory]) == index


def test_gaps_do_not_move_the_segments() -> None:
    """Segments are parts of the existing steps, wherever in the record these are."""
    valid = torch.zeros(1, 20, dtype=torch.bool)
    valid[0, [3, 4, 8, 9, 12, 15, 18, 19]] = True
    record = {"mask_ratio": torch.linspace(1, 0, 20)[None], "valid": valid, "block": torch.zeros(1, 20).long()}
    selection = select(record, 8, quotas=(0.25, 0.25, 0.25, 0.25))
    found = [sorted(step for _, step in states) for states in by_segment(selection)]
    assert found == [[3, 4], [8, 9], [12, 15], [18, 19]]


def test_one_state_from_each_stratum_of_mask_ratios() -> None:
    """Brute force: sort a segment's ratios, cut into equal parts, find exactly one chosen state in each."""
    ratios = torch.rand(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    record = trajectories([16] * 6) | {"mask_ratio": ratios}
    for seed in range(5):
        selection = select(record, 20, seed)
        for index, states in enumerate(by_segment(selection)):
            ordered = sorted(float(r) for r in ratios[:, 4 * index : 4 * index + 4].flatten())
            count = len(states)
            edges = [len(ordered) * part // count for part in range(count + 1)]
            chosen = [float(ratios[state]) for state in states]
            for low, high in pairwise(edges):
                assert sum(ratio in ordered[low:high] for ratio in chosen) == 1


def test_the_draw_inside_a_stratum_is_random_and_unbiased() -> None:
    """Of one trajectory's 8 steps, one is drawn: each with probability 1/8, also the first and the last."""
    record = trajectories([8])
    counts = Counter(select(record, 1, seed, quotas=(1.0,)).states[0].step for seed in range(400))
    assert sorted(counts) == list(range(8))
    assert max(counts.values()) < 90  # expectation 50, standard deviation 6.6
    assert min(counts.values()) > 20


def test_prompts_take_turns() -> None:
    """8 states of 8 prompts that decode alike: every segment spreads over as many prompts as it has states."""
    record = trajectories([16] * 8)
    for seed in range(5):
        for states in by_segment(select(record, 20, seed)):
            assert len({trajectory for trajectory, _ in states}) >= len(states) - 1


def test_blocks_take_turns_where_ratios_tie() -> None:
    record = trajectories([8] * 4) | {"mask_ratio": torch.full((4, 8), 0.5)}
    selection = select(record, 4, quotas=(1.0,))
    assert Counter(int(record["block"][s.trajectory, s.step]) for s in selection.states) == {0: 2, 1: 2}


def test_same_generator_same_states() -> None:
    record = trajectories([20, 30, 25])
    assert select(record, 12, seed=3) == select(record, 12, seed=3)
    assert len({select(record, 12, seed=seed).states for seed in range(6)}) > 1


def test_an_empty_segment_gives_its_quota_away() -> None:
    """Trajectories of one step only have a first quarter."""
    selection = select(trajectories([1] * 10), 10)
    assert selection.counts == (10, 0, 0, 0)
    assert selection.requested == (3, 2, 2, 3)
    assert selection.notes == (
        "segment 2 of 4 holds 0 states, its quota asks for 2; 2 redistributed",
        "segment 3 of 4 holds 0 states, its quota asks for 2; 2 redistributed",
        "segment 4 of 4 holds 0 states, its quota asks for 3; 3 redistributed",
    )


def test_a_small_segment_gives_away_only_what_it_lacks() -> None:
    record = trajectories([16])
    record["valid"][0, 14:] = False  # 14 steps: quarters hold 4, 3, 4, 3
    selection = select(record, 10, quotas=(0.5, 0.2, 0.2, 0.1))
    assert selection.requested == (5, 2, 2, 1)
    assert selection.counts == (4, 2, 2, 2)
    assert selection.notes == ("segment 1 of 4 holds 4 states, its quota asks for 5; 1 redistributed",)


def test_a_quota_of_zero_is_kept_while_others_hold_states() -> None:
    """Segments hold 8 states each; the shortfall of the first goes to the third, the second being excluded."""
    record = trajectories([12] * 2)
    selection = select(record, 14, quotas=(0.7, 0.0, 0.3))
    assert selection.requested == (10, 0, 4)
    assert selection.counts == (8, 0, 6)
    assert selection.notes == ("segment 1 of 3 holds 8 states, its quota asks for 10; 2 redistributed",)


def test_a_quota_of_zero_gives_way_when_nothing_else_is_left() -> None:
    selection = select(trajectories([12] * 2), 20, quotas=(0.7, 0.0, 0.3))
    assert selection.counts == (8, 4, 8)
    assert selection.notes == (
        "segment 1 of 3 holds 8 states, its quota asks for 14; 6 redistributed",
        "segment 2 of 3 has quota 0 but gives 4 states: the others hold no more",
    )


def test_a_quota_rounded_to_no_state_is_not_a_quota_of_zero() -> None:
    """One state is wanted, of the first segment; the others may replace it, for their shares are not 0."""
    record = trajectories([12])
    record["valid"] = torch.zeros(1, 12, dtype=torch.bool)
    record["valid"][0, 0] = True  # a trajectory of one step lies in the first segment
    assert select(record, 1, quotas=(0.4, 0.6)).counts == (1, 0)


def test_segments_of_the_states_and_what_was_recorded() -> None:
    """Against counting by hand; the second trajectory stands still at a ratio of 0.5."""
    record = trajectories([16, 8])
    record["mask_ratio"][1] = 0.5
    selection = select(record, 10, quotas=(0.25, 0.25, 0.25, 0.25), mask_ratio_buckets=2)
    assert list(selection.segments) == [quarter(s.step, (16, 8)[s.trajectory]) for s in selection.states]
    table = [[0, 0] for _ in range(4)]
    for trajectory, length in enumerate((16, 8)):
        for step in range(length):
            table[quarter(step, length)][record["mask_ratio"][trajectory, step] > 0.5] += 1
    assert selection.recorded == tuple(map(tuple, table))


def uneven(seed: int) -> dict[str, Tensor]:
    """Ratios that crowd at the top, with a few states in every other bucket of every segment."""
    ratios = 1 - torch.rand(6, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 6
    return trajectories([40] * 6) | {"mask_ratio": ratios}


def cells(selection: Selection, record: dict[str, Tensor], buckets: int) -> set[tuple[int, int]]:
    ratios = [float(record["mask_ratio"][s.trajectory, s.step]) for s in selection.states]
    return {
        (segment, next(b for b in range(buckets) if ratio <= (b + 1) / buckets))
        for segment, ratio in zip(selection.segments, ratios, strict=True)
    }


@pytest.mark.parametrize("seed", range(6))
def test_every_recorded_bucket_of_a_segment_gives_a_state(seed: int) -> None:
    record = uneven(seed)
    plain, covered = select(record, 40, seed), select(record, 40, seed, mask_ratio_buckets=4)
    recorded = {(s, b) for s in range(4) for b in range(4) if covered.recorded[s][b]}
    assert cells(covered, record, 4) == recorded
    assert cells(plain, record, 4) < recorded  # the strata alone miss some
    assert len(set(covered.states)) == len(covered.states) == 40
    assert covered.counts == plain.counts
    # Only as many states are exchanged as buckets were missed.
    assert len(set(plain.states) - set(covered.states)) == len(recorded - cells(plain, record, 4))


def test_few_states_go_to_different_buckets_and_none_is_emptied() -> None:
    for seed in range(6):
        record = uneven(seed)
        plain, covered = select(record, 8, seed), select(record, 8, seed, mask_ratio_buckets=8)
        assert cells(plain, record, 8) <= cells(covered, record, 8)
        for segment, count in enumerate(covered.counts):
            held = sum(map(bool, covered.recorded[segment]))
            assert len({b for s, b in cells(covered, record, 8) if s == segment}) == min(count, held)


def one_of(record: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    """The first `lengths[p]` steps of each trajectory."""
    return record | {
        "valid": record["valid"] & (torch.arange(record["valid"].shape[1]) < torch.tensor(lengths)[:, None])
    }


def test_the_state_that_comes_is_of_the_prompt_that_gave_fewest() -> None:
    """Both prompts recorded one low ratio; the first one also gives the high ones."""
    record = one_of(trajectories([50, 50]), [50, 1])
    record["mask_ratio"] = torch.full((2, 50), 0.9)
    record["mask_ratio"][:, 0] = 0.1
    exchanged = 0
    for seed in range(12):
        plain = select(record, 2, seed, quotas=(1.0,)).states
        states = select(record, 2, seed, quotas=(1.0,), mask_ratio_buckets=2).states
        low = [state for state in plain if state.step == 0]
        if not low:
            exchanged += 1
            assert [state.trajectory for state in states if state.step == 0] == [1]
    assert exchanged > 5


def test_the_state_that_goes_is_of_the_prompt_that_gave_most() -> None:
    """The first prompt gives two high ratios, the second one; the third has recorded the only low one."""
    record = one_of(trajectories([30, 30, 30]), [30, 1, 1])
    record["mask_ratio"] = torch.full((3, 30), 0.9)
    record["mask_ratio"][1, 0], record["mask_ratio"][2, 0] = 1.0, 0.1
    exchanged = 0
    for seed in range(12):
        plain = select(record, 3, seed, quotas=(1.0,)).states
        states = select(record, 3, seed, quotas=(1.0,), mask_ratio_buckets=2).states
        if sorted(state.trajectory for state in plain) == [0, 0, 1]:
            exchanged += 1
            assert sorted(state.trajectory for state in states) == [0, 1, 2]
    assert exchanged > 5


def test_covered_buckets_change_nothing() -> None:
    """An even schedule fills its cells by itself: the states are those of no buckets at all."""
    record = trajectories([40] * 4)
    for seed in range(4):
        assert select(record, 24, seed, mask_ratio_buckets=4).states == select(record, 24, seed).states


def test_everything_can_be_selected() -> None:
    lengths = [3, 9, 6]
    selection = select(trajectories(lengths), 18)
    assert {(s.trajectory, s.step) for s in selection.states} == {(p, t) for p in range(3) for t in range(lengths[p])}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    share=st.floats(0, 1),
    parts=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    buckets=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_properties(lengths: list[int], share: float, parts: list[int], buckets: int, seed: int) -> None:
    """The right number, nothing twice, nothing invalid, every state in its segment, quotas within one state."""
    available = sum(lengths)
    wanted = max(1, int(share * available))
    quotas = [part / sum(parts) for part in parts]
    record = trajectories([max(length, 1) for length in lengths], steps=12)
    record["valid"] &= torch.tensor(lengths)[:, None] > 0
    selection = select(record, wanted, seed, quotas=quotas, mask_ratio_buckets=buckets)
    assert sum(map(sum, selection.recorded)) == available
    assert len(selection.states) == len(set(selection.states)) == sum(selection.counts) == wanted
    assert sum(selection.requested) == wanted
    for request, part in zip(selection.requested, parts, strict=True):
        assert abs(request - Fraction(wanted * part, sum(parts))) < 1
    for index, states in enumerate(by_segment(selection)):
        for trajectory, step in states:
            assert step < lengths[trajectory]
            assert quarter(step, lengths[trajectory], len(quotas)) == index
    assert bool(selection.notes) == (selection.counts != selection.requested)


def test_errors() -> None:
    record = trajectories([8, 4])
    with pytest.raises(ValueError, match="num_states: 13; valid: 1 to 12, the recorded states"):
        select(record, 13)
    with pytest.raises(ValueError, match="num_states: 0; valid: 1 to 12"):
        select(record, 0)
    for quotas in ((), (0.5, 0.4), (1.2, -0.2)):
        with pytest.raises(ValueError, match=r"quotas: .*; valid: non-negative and summing to 1"):
            select(record, 4, quotas=quotas)
    with pytest.raises(ValueError, match="mask_ratio: 0 parts; valid: at least 1"):
        select(record, 4, mask_ratio_buckets=0)
    for name in record:
        with pytest.raises(ValueError, match=r"mask_ratio, valid, block: shapes .*\(2, 7\)"):
            select(record | {name: record[name][:, 1:]}, 4)
    with pytest.raises(ValueError, match=r"one common \[prompts, steps\]"):
        select({name: value[0] for name, value in record.items()}, 4)
