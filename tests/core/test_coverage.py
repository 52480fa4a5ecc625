"""Coverage against counting by hand with exact fractions, and what it says about empty cells."""

import json
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmquant.core.coverage import Coverage, bucket_of, measure_coverage, segment_of, tabulate


def bucket_by_hand(masked: int, total: int, buckets: int) -> int:
    """The bucket whose interval (b/B, (b+1)/B] holds masked/total; 0 belongs to the first."""
    ratio = Fraction(masked, total)
    return next(b for b in range(buckets) if ratio <= Fraction(b + 1, buckets))


def segment_by_hand(progress: Fraction, segments: int) -> int:
    return next(s for s in range(segments) if progress < Fraction(s + 1, segments) or s == segments - 1)


def diagonal_by_hand(segments: int, buckets: int) -> set[tuple[int, int]]:
    """Follows an even schedule of many steps through the cells; no step lies on an edge."""
    steps = 7 * segments * buckets
    middles = [Fraction(2 * step + 1, 2 * steps) for step in range(steps)]
    return {(int(p * segments), int((1 - p) * buckets)) for p in middles}


def batch(n: int, length: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, length // 2, (n,), generator=generator)
    attention = torch.arange(length) >= padding[:, None]
    mask = attention & (torch.rand(n, length, generator=generator) < torch.rand(n, 1, generator=generator))
    mask[:, : length // 2] = False  # the prompt
    return {
        "mask": mask,
        "attention_mask": attention,
        "mask_ratio": mask.sum(1).float() / (length - length // 2),
        "segment": torch.randint(0, 3, (n,), generator=generator),
    }


@pytest.mark.parametrize("seed", range(5))
def test_counts_equal_explicit_loops(seed: int) -> None:
    states = batch(40, 12, seed)
    # Padding counts nowhere, whether it is masked, as no sampler does, or not.
    states["mask"][::2] |= ~states["attention_mask"][::2]
    coverage = measure_coverage(**states, segments=3, buckets=5)
    expected = {name: [[0] * 5 for _ in range(3)] for name in ("states", "masked_tokens", "unmasked_tokens")}
    for i in range(40):
        segment = int(states["segment"][i])
        bucket = bucket_by_hand(round(float(states["mask_ratio"][i]) * 6), 6, 5)
        expected["states"][segment][bucket] += 1
        for j in range(12):
            if states["attention_mask"][i, j]:
                kind = "masked_tokens" if states["mask"][i, j] else "unmasked_tokens"
                expected[kind][segment][bucket] += 1
    assert coverage.to_dict() == {**expected, "recorded": None}
    assert coverage.empty == tuple((s, b) for s in range(3) for b in range(5) if not expected["states"][s][b])


@given(total=st.integers(1, 300), buckets=st.integers(1, 12), share=st.floats(0, 1))
def test_buckets_are_exact_at_their_edges(total: int, buckets: int, share: float) -> None:
    """Ratios are float32 quotients, as trajectories have them; edges such as 2/3 of 3 buckets do not slip."""
    masked = sorted({0, total, int(share * total), *(total * b // buckets for b in range(buckets + 1))})
    ratios = torch.tensor(masked).to(torch.float32) / total
    assert bucket_of(ratios, buckets).tolist() == [bucket_by_hand(count, total, buckets) for count in masked]


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 8, 12, 128])
def test_segments_of_stratified_times(segments: int, count: int) -> None:
    times = (torch.arange(count, dtype=torch.float64) + 1) / count
    expected = [segment_by_hand(1 - Fraction(i + 1, count), segments) for i in range(count)]
    assert segment_of(times, segments).tolist() == expected
    assert segment_of(torch.tensor([0.0, 1.0]), segments).tolist() == [segments - 1, 0]


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("buckets", [1, 2, 3, 4, 6, 8])
def test_the_diagonal_is_where_an_even_schedule_passes(segments: int, buckets: int) -> None:
    table = tuple((0,) * buckets for _ in range(segments))
    diagonal = Coverage(table, table, table).diagonal
    assert set(diagonal) == diagonal_by_hand(segments, buckets)
    assert len(set(diagonal)) == len(diagonal)
    assert list(diagonal) == sorted(diagonal, key=lambda cell: (cell[0], -cell[1]))


def test_an_even_schedule_covers_the_diagonal_and_nothing_else() -> None:
    """32 tokens, one per step: times and mask ratios agree on the cells."""
    ratio = torch.arange(32, 0, -1) / 32
    mask = torch.arange(32) < torch.arange(32, 0, -1)[:, None]
    coverage = measure_coverage(
        mask, torch.ones_like(mask), ratio, segment_of(ratio, 4), segments=4, buckets=4, recorded=((9,) * 4,) * 4
    )
    assert {(s, b) for s in range(4) for b in range(4) if coverage.states[s][b]} == set(coverage.diagonal)
    assert coverage.notes() == ()
    assert coverage.summary() == (
        "32 states, 528 masked and 496 other tokens; 4 of 16 cells (segment × mask ratio) filled, 4 of 4 on the "
        "diagonal"
    )


def coverage_of(states: list[list[int]], recorded: list[list[int]] | None) -> Coverage:
    def table(rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, rows))

    return Coverage(table(states), table(states), table(states), None if recorded is None else table(recorded))


def test_notes_tell_what_was_not_recorded_from_what_was_not_selected() -> None:
    states = [[0, 0, 0, 3], [0, 0, 0, 2], [0, 0, 2, 0], [0, 0, 1, 0]]
    recorded = [[0, 0, 0, 9], [0, 0, 4, 8], [0, 0, 5, 0], [7, 0, 2, 0]]
    assert coverage_of(states, recorded).notes() == (
        "no recorded state lies in segment 3 of 4 with 25 to 50% masked",
        "recorded, but not selected, is segment 2 of 4 with 50 to 75% masked (4 states), "
        "segment 4 of 4 with 0 to 25% masked (7 states)",
    )
    assert coverage_of(states, None).notes() == (
        "no state drawn lies in segment 2 of 4 with 50 to 75% masked, segment 3 of 4 with 25 to 50% masked, "
        "segment 4 of 4 with 0 to 25% masked",
    )


def test_segments_of_quota_zero_are_empty_on_purpose() -> None:
    coverage = coverage_of([[0, 1], [0, 0]], [[0, 1], [5, 0]])
    assert coverage.notes((1.0, 0.0)) == ()
    assert coverage.notes((0.5, 0.5)) == coverage.notes() != ()
    with pytest.raises(ValueError, match="quotas: 3 given; valid: 2"):
        coverage.notes((0.5, 0.25, 0.25))


@pytest.mark.parametrize("recorded", [None, [[2, 2], [5, 1], [0, 0]]])
def test_round_trip_through_json(recorded: list[list[int]] | None) -> None:
    coverage = coverage_of([[2, 1], [0, 1], [0, 0]], recorded)
    assert Coverage.from_dict(json.loads(json.dumps(coverage.to_dict()))) == coverage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": None}, "states: None"),
        ({"states": [[1, 2], [3]]}, "states: .*valid: a table"),
        ({"states": []}, "states: .*valid: a table"),
        ({"states": [[], []]}, "states: .*valid: a table"),
        ({"states": [[1, -1], [0, 0]]}, "states: .*counts of at least 0"),
        ({"states": [[1, 0.5], [0, 0]]}, "states: .*lists of integers"),
        ({"masked_tokens": [[1, 1]]}, r"masked_tokens: shape \(1, 2\); valid: that of states, \(2, 2\)"),
        ({"recorded": [[0, 1], [1, 1]]}, "recorded: .*in no cell fewer than the states"),
        ({"more": 1}, "coverage: keys"),
    ],
)
def test_documents_that_are_no_coverage(changes: dict[str, Any], message: str) -> None:
    document = coverage_of([[1, 0], [0, 1]], None).to_dict() | changes
    with pytest.raises(ValueError, match=message):
        Coverage.from_dict(document)
    with pytest.raises(ValueError, match="coverage: keys"):
        Coverage.from_dict({"states": [[1]]})


def test_tabulate_adds_amounts() -> None:
    segment, bucket = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 0, 2])
    assert tabulate(segment, bucket, segments=2, buckets=3) == ((0, 0, 2), (2, 0, 0))
    amounts = torch.tensor([5, 1, 2, 3])
    assert tabulate(segment, bucket, segments=2, buckets=3, amounts=amounts) == ((0, 0, 8), (3, 0, 0))


def test_errors() -> None:
    states = batch(4, 6, 0)
    for name in states:
        with pytest.raises(ValueError, match="mask, attention_mask, mask_ratio, segment: shapes"):
            measure_coverage(**(states | {name: states[name][1:]}), segments=3, buckets=2)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=r"segment: .*; valid: 0 to 2"):
            measure_coverage(**(states | {"segment": torch.full((4,), wrong)}), segments=3, buckets=2)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"mask_ratio: valid values lie in \[0, 1\]"):
            bucket_of(torch.tensor([value]), 4)
        with pytest.raises(ValueError, match=r"time: valid values lie in \[0, 1\]"):
            segment_of(torch.tensor([value]), 4)
    with pytest.raises(ValueError, match="mask_ratio: 0 parts"):
        bucket_of(torch.tensor([0.5]), 0)
