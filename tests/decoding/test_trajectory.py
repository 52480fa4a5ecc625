import dataclasses
from typing import Any

import pytest
import torch

from dllmquant.decoding import Trajectory

PAD = 0
MASK = 9


def trajectory(prompt_lengths: list[int], steps: list[int], *, gen_length: int = 3, seed: int = 0) -> Trajectory:
    """Consistent in shape and validity, otherwise random (prompts 1..4, states 5..8 or masked)."""
    generator = torch.Generator().manual_seed(seed)
    n, s, length = len(steps), max(steps), max(prompt_lengths) + gen_length
    ids = torch.full((n, s, length), PAD, dtype=torch.int32)
    mask = torch.zeros((n, s, length), dtype=torch.bool)
    confidence = torch.zeros((n, s, length))
    committed = torch.zeros((n, s, length), dtype=torch.bool)
    block = torch.full((n, s), -1)
    valid = torch.zeros((n, s), dtype=torch.bool)
    for i, (prompt, count) in enumerate(zip(prompt_lengths, steps, strict=True)):
        for step in range(count):
            open_ = torch.rand(gen_length, generator=generator) < 0.5
            own = torch.cat(
                [
                    torch.randint(1, 5, (prompt,), generator=generator),
                    torch.where(open_, MASK, torch.randint(5, 9, (gen_length,), generator=generator)),
                ]
            )
            ids[i, step, length - len(own) :] = own.int()
            mask[i, step, -gen_length:] = open_
            confidence[i, step, length - len(own) :] = torch.rand(len(own), generator=generator)
            committed[i, step, -gen_length:] = open_ & (torch.rand(gen_length, generator=generator) < 0.5)
            block[i, step] = step // 2
            valid[i, step] = True
    return Trajectory(
        ids, mask, confidence, committed, block, valid, torch.tensor(prompt_lengths), gen_length, pad_token_id=PAD
    )


def test_counts_and_ratios() -> None:
    found = trajectory([2, 4, 0], [3, 1, 2])
    assert len(found) == 6
    assert found.num_prompts == 3
    assert found.num_steps.tolist() == [3, 1, 2]
    assert found.mask_ratio.shape == (3, 3)
    assert found.mask_ratio.dtype == torch.float32
    for i, steps in enumerate([3, 1, 2]):
        for s in range(3):
            expected = (found.ids[i, s] == MASK).float().mean() * found.ids.shape[2] / 3 if s < steps else 0.0
            assert float(found.mask_ratio[i, s]) == pytest.approx(float(expected))


def test_attention_mask_hides_left_padding() -> None:
    found = trajectory([2, 4, 0], [1, 1, 1])
    assert found.attention_mask.int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 1, 1, 1]]


def test_state_is_one_slice() -> None:
    found = trajectory([2, 4], [3, 2])
    state = found.state(0, 2)
    assert state.ids.dtype == torch.int64
    assert torch.equal(state.ids, found.ids[0, 2].long())
    for name in ("mask", "confidence", "committed"):
        assert torch.equal(getattr(state, name), getattr(found, name)[0, 2])
    assert torch.equal(state.attention_mask, found.attention_mask[0])
    assert state.block == 1
    assert state.mask_ratio == pytest.approx(int((state.ids == MASK).sum()) / 3)


def test_states_trims_padding_to_the_longest_chosen() -> None:
    found = trajectory([2, 5, 3], [3, 2, 3])
    chosen = [(2, 1), (0, 2), (2, 0)]
    batch = found.states(chosen)
    assert len(batch) == 3
    assert batch.ids.shape == (3, 6)
    assert batch.attention_mask.int().tolist() == [[1] * 6, [0, 1, 1, 1, 1, 1], [1] * 6]
    for row, (i, s) in enumerate(chosen):
        state = found.state(i, s)
        for name in ("ids", "attention_mask", "mask", "confidence", "committed"):
            assert torch.equal(getattr(batch, name)[row], getattr(state, name)[2:])
        assert int(batch.block[row]) == state.block
        assert float(batch.mask_ratio[row]) == state.mask_ratio


def test_states_moves_as_a_whole() -> None:
    moved = trajectory([1], [1]).states([(0, 0)]).to("meta")
    assert {getattr(moved, field.name).device.type for field in dataclasses.fields(moved)} == {"meta"}


def test_merge_keeps_every_state() -> None:
    parts = [trajectory([2, 1], [3, 2], seed=1), trajectory([4], [5], seed=2), trajectory([0], [1], seed=3)]
    merged = Trajectory.merge(parts)
    assert merged.ids.shape == (4, 5, 7)
    assert len(merged) == 11
    assert merged.prompt_lengths.tolist() == [2, 1, 4, 0]
    assert torch.equal(merged.attention_mask.sum(1), merged.prompt_lengths + 3)
    row = 0
    for part in parts:
        for i in range(part.num_prompts):
            assert int(merged.num_steps[row]) == int(part.num_steps[i])
            for s in range(int(part.num_steps[i])):
                mine, theirs = merged.states([(row, s)]), part.states([(i, s)])
                for field in dataclasses.fields(mine):
                    assert torch.equal(getattr(mine, field.name), getattr(theirs, field.name)), field.name
            row += 1
    absent = ~merged.valid
    assert (merged.ids[absent] == PAD).all()
    assert (merged.block[absent] == -1).all()
    assert not merged.mask[absent].any()
    assert (merged.ids[~merged.attention_mask.unsqueeze(1).expand_as(merged.ids)] == PAD).all()


def test_merge_errors() -> None:
    with pytest.raises(ValueError, match=r"parts is empty; valid"):
        Trajectory.merge([])
    with pytest.raises(ValueError, match=r"gen_length is \[2, 3\] across the parts"):
        Trajectory.merge([trajectory([1], [1]), trajectory([1], [1], gen_length=2)])
    other = dataclasses.replace(trajectory([1], [1]), pad_token_id=7)
    with pytest.raises(ValueError, match=r"pad_token_id is \[0, 7\] across the parts"):
        Trajectory.merge([trajectory([1], [1]), other])


@pytest.mark.parametrize(
    ("prompt", "step", "message"),
    [
        (2, 0, "prompt is 2; valid: 0 to 1"),
        (-1, 0, "prompt is -1; valid: 0 to 1"),
        (1, 2, "step is 2; valid for prompt 1: 0 to 1"),
        (0, -1, "step is -1; valid for prompt 0: 0 to 2"),
    ],
)
def test_missing_states(prompt: int, step: int, message: str) -> None:
    found = trajectory([2, 4], [3, 2])
    with pytest.raises(IndexError, match=message):
        found.state(prompt, step)
    with pytest.raises(IndexError, match=message):
        found.states([(0, 0), (prompt, step)])


def test_no_states_is_an_error() -> None:
    with pytest.raises(ValueError, match="indices is empty"):
        trajectory([1], [1]).states([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros((2, 3), dtype=torch.int32)}, r"ids has shape \(2, 3\); valid: three"),
        ({"ids": torch.zeros((2, 3, 7))}, r"ids has shape \(2, 3, 7\) and dtype torch.float32"),
        ({"mask": torch.zeros((2, 3, 6), dtype=torch.bool)}, r"mask has shape \(2, 3, 6\)"),
        ({"confidence": torch.zeros((2, 3, 7), dtype=torch.float64)}, r"confidence .* torch.float64"),
        ({"committed": torch.zeros((2, 3, 7))}, r"committed .* torch.float32"),
        ({"block": torch.zeros(3, dtype=torch.int64)}, r"block has shape \(3,\)"),
        ({"valid": torch.tensor([[True, False, True]] * 2)}, r"valid has a step after a missing one"),
        ({"prompt_lengths": torch.tensor([2, 5])}, r"prompt_lengths is \[2, 5\]; valid: lengths from 0 to 4"),
        ({"prompt_lengths": torch.tensor([-1, 4])}, r"prompt_lengths is \[-1, 4\]"),
        ({"gen_length": 0}, r"gen_length is 0; valid: 1 to 7"),
        ({"gen_length": 8}, r"gen_length is 8; valid: 1 to 7"),
    ],
)
def test_construction_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trajectory([2, 4], [3, 2]), **change)
