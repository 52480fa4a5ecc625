"""Planted outliers change activations, never outputs."""

import dataclasses

import pytest
import torch

from dllmquant.models import adapter_for
from dllmquant.transforms import plant_outliers
from tests.tiny import tiny_llada, tiny_tokenizer


def inputs_of(model, name, ids):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(ids).logits
    handle.remove()
    return seen[0], logits


@pytest.fixture
def ids():
    text = "q: tom has 7 apples. tom buys 5 more. how many remain? a:"
    tokens = tiny_tokenizer()(text).input_ids
    return torch.tensor([tokens + [tiny_tokenizer().mask_token_id] * 8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_do_not_change_by_a_bit(dtype, bias, ids):
    model = tiny_llada(include_bias=bias).to(dtype)
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        before = model(ids).logits
        plant_outliers(model, adapter_for(model), gain=32.0)
        after = model(ids).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("leaf", ["q_proj", "up_proj", "ff_out"])
def test_the_planted_activations_are_larger_on_every_token(leaf, ids):
    name = f"model.transformer.blocks.1.{leaf}"
    model = tiny_llada()
    before, _ = inputs_of(model, name, ids)
    plant_outliers(model, adapter_for(model), channels=3, gain=16.0)
    after, _ = inputs_of(model, name, ids)
    changed = (after != before).any(0).any(0)
    assert int(changed.sum()) == 3
    assert torch.equal(after[..., changed], before[..., changed] * 16)


def test_residual_channels_are_the_same_in_all_blocks():
    model, changed = tiny_llada(), set()
    norms = [block.attn_norm for block in model.model.transformer["blocks"]]
    plant_outliers(model, adapter_for(model), channels=2, gain=4.0)
    for norm in norms:
        changed.add(tuple((norm.weight == 4).nonzero().flatten().tolist()))
    assert len(changed) == 1
    assert len(changed.pop()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gain": 3.0}, "gain: 3.0"), ({"gain": 1.0}, "gain"), ({"channels": 0}, "channels: 0"), ({"channels": 99}, "99")],
)
def test_bad_options_are_errors(options, message):
    model = tiny_llada()
    with pytest.raises(ValueError, match=message):
        plant_outliers(model, adapter_for(model), **options)


def test_an_adapter_without_pairs_is_an_error():
    model = tiny_llada()
    with pytest.raises(ValueError, match="scale_pairs is empty"):
        plant_outliers(model, dataclasses.replace(adapter_for(model), scale_pairs=()))
