"""16-bit models compute in float32 where that is wanted, and are as before afterwards."""

import copy

import pytest
import torch

import dllmquant
from dllmquant.capture import first_calls
from dllmquant.models import adapter_for
from dllmquant.models import inference as inference_module
from dllmquant.models.inference import in_float32, inference
from dllmquant.transforms.fold import probe_logits
from tests import tiny
from tests.models.toys import MASK, tiny_model
from tests.tiny import tiny_llada, tiny_tokenizer


def logits_of(model):
    ids = torch.randint(1, MASK, (3, 12), generator=torch.Generator().manual_seed(5))
    keep = torch.ones_like(ids)
    keep[1, :5] = 0
    keep[2, 9:] = 0
    return probe_logits(adapter_for(model).denoiser(model), ids, keep, MASK)


@pytest.mark.parametrize("weight_tying", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_model_computes_in_float32_for_a_while(dtype, weight_tying):
    model = tiny_model(dtype=dtype, include_bias=True, weight_tying=weight_tying)
    expected = logits_of(copy.deepcopy(model).float())
    before, tensors = logits_of(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        with in_float32(model, adapter_for(model).block_list(model)):
            wide = logits_of(model)
        assert torch.equal(wide, expected)
        assert wide.dtype == torch.float32
        assert torch.equal(logits_of(model), before)
        assert [p.data_ptr() for p in model.parameters()] == tensors
    assert before.dtype == dtype


def test_blocks_are_widened_only_while_they_run():
    model = tiny_model(dtype=torch.bfloat16)
    blocks, seen = adapter_for(model).block_list(model), []
    with in_float32(model, blocks):
        for block in blocks:
            block.ff_norm.register_forward_hook(lambda *_: seen.append([b.up_proj.weight.dtype for b in blocks]))
        logits_of(model)
    assert seen[:2] == [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32]]


def test_a_failing_pass_leaves_the_model_narrow():
    model = tiny_model(dtype=torch.bfloat16)
    blocks = adapter_for(model).block_list(model)
    with pytest.raises(TypeError), in_float32(model, blocks):
        blocks[0](torch.zeros(1, 2, 16))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_wide_models_are_left_alone():
    model = tiny_model(dtype=torch.float64)
    with in_float32(model, adapter_for(model).block_list(model)):
        assert logits_of(model).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("native", [False, True])
def test_16_bits_are_computed_in_float32_where_the_processor_has_none(dtype, native, monkeypatch):
    monkeypatch.setattr(inference_module, "_is_native", lambda asked: native or asked != dtype)
    model = tiny_model(dtype=dtype).train()
    expected = logits_of(copy.deepcopy(model).eval() if native else copy.deepcopy(model).float().eval())
    with inference(model, adapter_for(model).block_list(model)):
        assert not model.training
        assert torch.equal(logits_of(model), expected)
    assert model.training
    assert all(p.dtype == dtype for p in model.parameters())


def test_what_the_processor_has_is_asked_of_torch(monkeypatch):
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for native in (True, False):
            monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda native=native: native)
            assert inference_module._is_native(dtype) == native
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert not inference_module._is_native(torch.bfloat16)


def test_generation_and_recording_follow(monkeypatch):
    monkeypatch.setattr(inference_module, "_is_native", lambda dtype: False)
    model, tokenizer = tiny_llada(init_std=0.5).bfloat16(), tiny_tokenizer()
    seen = set()
    model.register_forward_hook(lambda module, args, output: seen.add(output.logits.dtype))
    texts = dllmquant.generate(model, tokenizer, ["q: tom has 7 apples."], gen_length=8, steps=4)
    assert texts == dllmquant.generate(
        copy.deepcopy(model).float(), tokenizer, ["q: tom has 7 apples."], gen_length=8, steps=4
    )
    assert seen == {torch.float32}


@pytest.mark.parametrize(
    "make",
    [
        tiny.tiny_dream,
        tiny.tiny_llada_moe,
        tiny.tiny_llada2,
        tiny.tiny_sdar,
        tiny.tiny_sdar_moe,
        tiny.tiny_fast_dllm,
        tiny.tiny_diffusion_gemma,
    ],
)
def test_every_family_generates_as_in_float32(make, monkeypatch):
    monkeypatch.setattr(inference_module, "_is_native", lambda dtype: False)
    model, tokenizer = make().bfloat16(), tiny_tokenizer()
    texts = dllmquant.generate(model, tokenizer, ["q: tom has 7 apples.", "q:"])
    assert texts == dllmquant.generate(copy.deepcopy(model).float(), tokenizer, ["q: tom has 7 apples.", "q:"])
    assert any(texts)


def test_calibration_follows(monkeypatch):
    """Blocks are captured and run in float32, and the weights they are given in between count."""
    monkeypatch.setattr(inference_module, "_is_native", lambda dtype: False)
    model = tiny_llada().bfloat16()
    adapter = adapter_for(model)
    wide, blocks = copy.deepcopy(model).float(), adapter.block_list(model)
    ids = torch.randint(1, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(ids, dtype=torch.bool)
    (call,) = first_calls(model, blocks, adapter.denoiser(model), ids, keep, 4)
    (expected,) = first_calls(wide, adapter.block_list(wide), adapter.denoiser(wide), ids, keep, 4)
    for block, other in zip(blocks, adapter.block_list(wide), strict=True):
        call, expected = call.following(block), expected.following(other)
        assert torch.equal(call.hidden, expected.hidden)
    blocks[0].ff_out.weight.data = torch.zeros_like(blocks[0].ff_out.weight)
    other = adapter.block_list(wide)[0]
    other.ff_out.weight.data.zero_()
    assert torch.equal(call.run(blocks[0]), expected.run(other))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
