"""Scales move without changing the function, and the check of a function notices when something does."""

import math

import pytest
import torch
from torch import nn

from dllmquant.models import adapter_for
from dllmquant.transforms.fold import (
    MASK_RATIOS,
    apply_scales,
    assert_same_function,
    at_least,
    linear_at,
    probe_logits,
    rounding_tolerance,
)
from tests.models.toys import MASK, tiny_model

PAIRS = [
    ("attn_norm", ("q_proj", "k_proj", "v_proj")),
    ("ff_norm", ("ff_proj", "up_proj")),
    ("up_proj", ("ff_out",)),
]


def positive(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 + 0.1


def padded_batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, MASK, (3, 12), generator=generator)
    keep = torch.ones_like(ids)
    keep[1, :5] = 0
    keep[2, 9:] = 0
    return ids, keep


def logits_of(model):
    return probe_logits(adapter_for(model).denoiser(model), *padded_batch(), MASK)


@pytest.mark.parametrize(("producer", "consumers"), PAIRS)
def test_scales_move_and_the_function_stays(producer, consumers):
    model = tiny_model(dtype=torch.float64, include_bias=True, n_kv_heads=1)
    block = adapter_for(model).block_list(model)[1]
    before = logits_of(model)
    old = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    scales = positive(old[f"{producer}.weight"].shape[0])
    apply_scales(block, producer, consumers, scales)
    expected = dict(old)
    for index, s in enumerate(scales):
        for name in (f"{producer}.weight", f"{producer}.bias"):
            if name in old:
                expected[name][index] = old[name][index] / s
        for consumer in consumers:
            expected[f"{consumer}.weight"][:, index] *= s
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-14, atol=0)
    assert_same_function(before, logits_of(model), padded_batch()[1], transform="scales", tolerance=1e-12)


def test_a_norms_bias_is_scaled_too():
    block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).double()
    nn.init.normal_(block[0].bias)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = block(x)
    apply_scales(block, "0", ["1"], positive(6))
    torch.testing.assert_close(block(x), before)


def test_narrow_parameters_are_rounded_once():
    block = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)).bfloat16()
    old, scales = [p.detach().clone() for p in block.parameters()], positive(6)
    apply_scales(block, "0", ["1"], scales)
    first, bias, second, untouched = (p.detach() for p in block.parameters())
    assert torch.equal(first, (old[0].double() / scales[:, None]).bfloat16())
    assert torch.equal(bias, (old[1].double() / scales).bfloat16())
    assert torch.equal(second, (old[2].double() * scales).bfloat16())
    assert torch.equal(untouched, old[3])


@pytest.mark.parametrize(
    ("producer", "consumers", "scales", "message"),
    [
        ("0", ["1"], torch.tensor([1.0, 0, 1, 1]), "scales of 0: valid: one finite positive"),
        ("0", ["1"], torch.tensor([1.0, -2, 1, 1]), "scales of 0"),
        ("0", ["1"], torch.tensor([1.0, math.inf, 1, 1]), "scales of 0"),
        ("0", ["1"], torch.tensor([1.0, math.nan, 1, 1]), "scales of 0"),
        ("0", ["1"], torch.ones(4, 1), "scales of 0"),
        ("0", ["1"], torch.ones(5), "scales: 5 channels; 0 has 4"),
        ("0", ["1", "2"], torch.full((4,), 2.0), "scales: 4 channels; 2 has 5"),
        ("0", ["1", "3"], torch.full((4,), 2.0), "3: a ReLU; valid: nn.Linear"),
        ("0", ["1"], torch.full((4,), 1e6), r"1: overflows torch.float16"),
        ("0", ["1"], torch.full((4,), 1e-6), r"0: overflows torch.float16"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(producer, consumers, scales, message):
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.ReLU()).half()
    old = [p.detach().clone() for p in block.parameters()]
    with pytest.raises(ValueError, match=message):
        apply_scales(block, producer, consumers, scales)
    assert all(torch.equal(a, b) for a, b in zip(old, block.parameters(), strict=True))


def test_linear_at_returns_linears_only():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert linear_at(block, "0") is block[0]
    with pytest.raises(ValueError, match="1: a ReLU"):
        linear_at(block, "1")


def test_at_least_is_relative():
    x = torch.tensor([0.0, 3e-5, 2.0])
    torch.testing.assert_close(at_least(x), torch.tensor([2e-4, 2e-4, 2.0]))
    torch.testing.assert_close(at_least(x * 1e9), at_least(x) * 1e9)


def test_probes_mask_the_given_share_of_real_tokens():
    ids, keep = padded_batch()
    seen = []

    def denoise(tokens, attention_mask):
        assert attention_mask is keep
        seen.append(tokens)
        return nn.functional.one_hot(tokens, MASK + 1).double()

    logits = probe_logits(denoise, ids, keep, MASK)
    assert logits.shape == (len(MASK_RATIOS), 3, 12, MASK + 1)
    for ratio, tokens in zip(MASK_RATIOS, seen, strict=True):
        masked = tokens == MASK
        assert not bool((masked & (keep == 0)).any())
        assert torch.equal(tokens[~masked], ids[~masked])
        assert masked.sum(-1).tolist() == [math.ceil(ratio * int(row.sum())) for row in keep]
    again = probe_logits(denoise, ids, keep, MASK)
    assert torch.equal(again, logits)
    assert not torch.equal(probe_logits(denoise, ids, keep, MASK, seed=1), logits)


def test_the_deviation_is_relative_to_the_centred_logits_of_real_tokens():
    keep = torch.tensor([[1, 1, 0]])
    before = torch.zeros(2, 1, 3, 2, dtype=torch.float64)
    before[..., 0], before[..., 1] = 101, 99  # centred: ±1, so a norm of 2 per probe
    after = before.clone()
    after[:, :, 2] = torch.nan  # padding does not count
    assert assert_same_function(before, after, keep, transform="t", tolerance=0) == 0
    after[1, 0, 0, 0] += 0.5
    assert assert_same_function(before, after, keep, transform="t", tolerance=0.25) == 0.25
    with pytest.raises(ValueError, match=r"t: changes what the model computes.*by 0\.25 \(valid: at most 0\.24\)"):
        assert_same_function(before, after, keep, transform="t", tolerance=0.24)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    before = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[0, 0, 1, 2] = bad
    with pytest.raises(ValueError, match="deviate by"):
        assert_same_function(before, after, torch.ones(1, 3), transform="t", tolerance=1e3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_tolerance_is_that_of_the_coarsest_parameter(dtype):
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2).to(dtype))
    assert rounding_tolerance(model) == torch.finfo(dtype).eps ** 0.5
