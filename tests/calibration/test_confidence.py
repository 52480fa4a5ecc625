"""Confidences of states nobody recorded: against recorded ones, and against a softmax written out."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dllmquant.calibration import with_confidence
from dllmquant.decoding import StateBatch
from dllmquant.decoding.sampler import Denoiser
from dllmquant.generation import generate_tokens
from dllmquant.models import ModelAdapter, adapter_for
from tests.tiny import tiny_llada, tiny_tokenizer

PROMPTS = ["q: tom has 3 apples. how many remain? a:", "code: x = [1, 2]; print(x) prints:", "so"]


def states_of(mask: Tensor, keep: Tensor, ids: Tensor) -> StateBatch:
    """States whose confidence and committed tokens are rubbish, for they are to be filled in."""
    rubbish = torch.full(ids.shape, 0.123)
    return StateBatch(ids, keep, mask, rubbish, torch.ones_like(mask), torch.zeros(len(ids)).long(), mask.sum(1) / 8.0)


class ToyAdapter(ModelAdapter):
    """A known model: logits that depend on position and token, the mask token's being the largest of all."""

    def denoiser(self, model: object) -> Denoiser:
        def denoise(ids: Tensor, attention_mask: Tensor) -> Tensor:
            vocabulary = torch.arange(7)
            logits = torch.sin(ids[..., None] + 1.7 * vocabulary + 0.3 * torch.arange(ids.shape[1])[:, None]).double()
            logits[..., 6] = 9.0
            return logits.masked_fill(~attention_mask[..., None], float("nan"))

        return denoise


def toy(model_mask: int = 6) -> ToyAdapter:
    known = adapter_for(tiny_llada())
    fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    return ToyAdapter(**(fields | {"mask_token_id": model_mask}))


def test_as_the_sampler_records_it():
    """One block and one token per step: all masked positions compete there too."""
    model, tokenizer = tiny_llada().double(), tiny_tokenizer()
    trajectory = generate_tokens(
        model, tokenizer, PROMPTS, record=True, steps=8, gen_length=8, block_length=8
    ).trajectory
    recorded = trajectory.states([(p, s) for p in range(len(PROMPTS)) for s in range(8)])
    blank = dataclasses.replace(
        recorded, confidence=torch.zeros_like(recorded.confidence), committed=torch.zeros_like(recorded.committed)
    )
    filled, passes = with_confidence(model, adapter_for(model), blank, batch_size=7)
    assert passes == math.ceil(24 / 7)
    torch.testing.assert_close(filled.confidence, recorded.confidence)
    assert torch.equal(filled.committed, recorded.committed)
    assert filled.committed.sum(1).tolist() == [1] * 24
    for name in ("ids", "attention_mask", "mask", "block", "mask_ratio"):
        assert torch.equal(getattr(filled, name), getattr(recorded, name))


def test_the_softmax_and_the_candidate_leave_the_mask_token_out():
    ids = torch.tensor([[0, 1, 6, 6, 6], [2, 3, 6, 4, 5], [1, 2, 3, 4, 5]])
    keep = torch.ones(ids.shape, dtype=torch.bool)
    keep[0, 0] = False
    adapter, model = toy(), tiny_llada()
    filled, _ = with_confidence(model, adapter, states_of(ids == 6, keep, ids), batch_size=2)
    logits = adapter.denoiser(model)(ids, keep)
    for row in range(3):
        best, where = 0.0, None
        for position in range(5):
            if not keep[row, position]:
                assert filled.confidence[row, position] == 0
                continue
            exponentials = [math.exp(value) for value in logits[row, position, :6].tolist()]
            expected = max(exponentials) / sum(exponentials)
            assert float(filled.confidence[row, position]) == pytest.approx(expected, abs=1e-6)
            if ids[row, position] == 6 and expected > best:
                best, where = expected, position
        assert filled.committed[row].nonzero().flatten().tolist() == ([] if where is None else [where])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training):
    model = tiny_llada().train(training)
    ids = torch.tensor([[3, 4, adapter_for(model).mask_id(model.config)]])
    with_confidence(model, adapter_for(model), states_of(ids == ids[0, 2], ids >= 0, ids))
    assert model.training is training


def test_nan_is_an_error():
    model = tiny_llada()
    ids = torch.tensor([[3, 4, adapter_for(model).mask_id(model.config)]])
    with torch.no_grad():
        model.model.transformer["ln_f"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="confidence of NaN"):
        with_confidence(model, adapter_for(model), states_of(ids == ids[0, 2], ids >= 0, ids))
