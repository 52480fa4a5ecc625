"""Rotations change every weight and no output, in float64 to the last digits, and their absence is noticed."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dllmquant.core.hadamard import random_hadamard
from dllmquant.models import ModelAdapter, adapter_for
from dllmquant.transforms.fold import assert_same_function, probe_logits, rounding_tolerance
from dllmquant.transforms.outliers import plant_outliers
from dllmquant.transforms.quarot import rotate_residual, rotate_values
from tests.models.toys import MASK, tiny_model

BLOCKS = "model.transformer.blocks"
SHAPES: list[dict[str, Any]] = [
    {},
    {"include_bias": True},
    {"include_qkv_bias": True, "n_heads": 4, "n_kv_heads": 2},
    {"n_heads": 4, "n_kv_heads": 1, "include_bias": True, "input_emb_norm": True, "scale_logits": True},
    {"d_model": 48, "n_heads": 2, "mlp_hidden_size": 20},  # 48 = 12·4, heads of 24 = 12·2
]


def batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, MASK, (3, 12), generator=generator)
    keep = torch.ones_like(ids)
    keep[1, :5] = 0
    keep[2, 9:] = 0
    return ids, keep


def logits_of(model):
    return probe_logits(adapter_for(model).denoiser(model), *batch(), MASK)


def check(before, model, tolerance=1e-10):
    return assert_same_function(before, logits_of(model), batch()[1], transform="rotation", tolerance=tolerance)


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def entering(model, block):
    seen = []
    handle = model.get_submodule(f"{BLOCKS}.{block}").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(*batch())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rotate", [rotate_residual, rotate_values], ids=["residual", "values"])
def test_no_output_changes(rotate, shape):
    model = tiny_model(dtype=torch.float64, **shape)
    before = logits_of(model)
    assert before.std() > 0.1
    rotate(model, adapter_for(model), seed=3)
    check(before, model)


def test_both_in_either_order_and_twice():
    for order in ((rotate_residual, rotate_values), (rotate_values, rotate_residual), (rotate_residual,) * 2):
        model = tiny_model(dtype=torch.float64, include_bias=True)
        before = logits_of(model)
        for seed, rotate in enumerate(order):
            rotate(model, adapter_for(model), seed=seed)
        check(before, model)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_is_rotated_in_every_block(shape):
    model = tiny_model(dtype=torch.float64, **shape)
    before = [entering(model, block) for block in range(2)]
    rotate_residual(model, adapter_for(model), seed=3)
    rotation = random_hadamard(before[0].shape[-1], 3)
    for block in range(2):
        torch.testing.assert_close(entering(model, block), before[block] @ rotation, rtol=1e-9, atol=1e-9)


def test_weights_are_the_formulas_product():
    model = tiny_model(dtype=torch.float64, include_bias=True)
    old = {name: value.numpy() for name, value in parameters_of(model).items()}
    rotate_residual(model, adapter_for(model), seed=1)
    new = {name: value.numpy() for name, value in parameters_of(model).items()}
    r = random_hadamard(16, 1).numpy()
    body = "model.transformer"
    expected = {f"{body}.wte.weight": old[f"{body}.wte.weight"] @ r}
    readers = [("attn_norm", ("q_proj", "k_proj", "v_proj")), ("ff_norm", ("ff_proj", "up_proj"))]
    for index in range(2):
        for norm, consumers in readers:
            gain = np.diag(old[f"{BLOCKS}.{index}.{norm}.weight"])
            expected[f"{BLOCKS}.{index}.{norm}.weight"] = np.ones(16)
            for consumer in consumers:
                name = f"{BLOCKS}.{index}.{consumer}.weight"
                expected[name] = old[name] @ gain @ r
        for writer in ("attn_out", "ff_out"):
            for name in (f"{BLOCKS}.{index}.{writer}.weight", f"{BLOCKS}.{index}.{writer}.bias"):
                expected[name] = r.T @ old[name]
    expected[f"{body}.ln_f.weight"] = np.ones(16)
    expected[f"{body}.ff_out.weight"] = old[f"{body}.ff_out.weight"] @ np.diag(old[f"{body}.ln_f.weight"]) @ r
    for name, value in new.items():
        np.testing.assert_allclose(value, expected.get(name, old[name]), rtol=1e-12, atol=1e-12, err_msg=name)


def test_values_are_rotated_per_head_and_nothing_else_changes():
    model = tiny_model(dtype=torch.float64, n_heads=4, n_kv_heads=2, include_bias=True)
    old = {name: value.numpy() for name, value in parameters_of(model).items()}
    rotate_values(model, adapter_for(model), seed=1)
    r = random_hadamard(4, 1).numpy()
    for name, value in parameters_of(model).items():
        expected = old[name].copy()
        if "v_proj" in name:
            for head in range(2):
                rows = slice(4 * head, 4 * head + 4)
                expected[rows] = r.T @ old[name][rows]
        elif name.endswith("attn_out.weight"):
            for head in range(4):
                columns = slice(4 * head, 4 * head + 4)
                expected[:, columns] = old[name][:, columns] @ r
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_a_rotation_spreads_planted_outliers():
    model = tiny_model(dtype=torch.float64, d_model=32)
    adapter = adapter_for(model)
    plant_outliers(model, adapter, channels=1, gain=64.0)

    def crest():
        seen = []
        handle = model.get_submodule(f"{BLOCKS}.1.q_proj").register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        with torch.no_grad():
            model(*batch())
        handle.remove()
        x = seen[0][batch()[1].bool()]
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    before = crest()
    rotate_residual(model, adapter)
    assert before > 5
    assert crest() < 3.5


def test_seeds_are_different_rotations():
    models = [tiny_model(dtype=torch.float64) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rotate_residual(model, adapter_for(model), seed=seed)
        rotate_values(model, adapter_for(model), seed=seed)
    same, again, other = (parameters_of(model) for model in models)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.allclose(same["model.transformer.wte.weight"], other["model.transformer.wte.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_models_stay_within_their_tolerance_and_dtype(dtype):
    model = tiny_model(dtype=dtype, include_bias=True, d_model=32)
    before = logits_of(model)
    rotate_residual(model, adapter_for(model))
    rotate_values(model, adapter_for(model))
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    deviation = check(before, model, rounding_tolerance(model))
    assert deviation > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [f"{BLOCKS}.0.attn_norm", f"{BLOCKS}.1.ff_norm", "model.transformer.ln_f"])
def test_a_gain_that_is_not_folded_is_noticed(norm, dtype):
    model = tiny_model(dtype=dtype)
    before = logits_of(model)
    gain = model.get_submodule(norm).weight.detach().clone()
    with torch.no_grad():
        model.get_submodule(norm).weight.fill_(1)  # so that only ones are folded
        rotate_residual(model, adapter_for(model))
        model.get_submodule(norm).weight.copy_(gain)
    with pytest.raises(ValueError, match="rotation: changes what the model computes"):
        check(before, model, rounding_tolerance(model))


@pytest.mark.parametrize(
    "change",
    [
        {"residual_outputs": ("attn_out",)},
        {"scale_pairs": (("attn_norm", ("q_proj", "k_proj")), ("ff_norm", ("ff_proj", "up_proj")))},
        {"scale_pairs": (("attn_norm", ("q_proj", "k_proj", "v_proj")),)},
    ],
    ids=["writer", "reader", "norm"],
)
def test_an_adapter_that_forgets_a_layer_is_noticed(change):
    model = tiny_model()
    before = logits_of(model)
    rotate_residual(model, dataclasses.replace(adapter_for(model), **change))
    with pytest.raises(ValueError, match="do the adapter's paths name everything"):
        check(before, model, rounding_tolerance(model))


def assert_refused(model, adapter, message, rotate=rotate_residual):
    """The transform says why it cannot be done and leaves the model alone."""
    old = parameters_of(model)
    with pytest.raises(ValueError, match=message):
        rotate(model, adapter)
    assert all(torch.equal(value, old[name]) for name, value in parameters_of(model).items())


@pytest.mark.parametrize(
    ("field", "empty", "rotate"),
    [
        ("scale_pairs", (), rotate_residual),
        ("scale_pairs", (("up_proj", ("ff_out",)),), rotate_residual),
        ("residual_outputs", (), rotate_residual),
        ("final_norm", None, rotate_residual),
        ("value_output", None, rotate_values),
        ("heads", None, rotate_values),
    ],
)
def test_an_adapter_without_a_field_is_an_error(field, empty, rotate):
    model = tiny_model()
    adapter = dataclasses.replace(adapter_for(model), **{field: empty})
    assert_refused(model, adapter, f"adapter 'llada': {field} ", rotate)


def test_a_tied_head_is_an_error():
    model = tiny_model(weight_tying=True)
    assert_refused(model, adapter_for(model), "tie_word_embeddings: True in the model's config; valid: False")


def test_shared_parameters_are_an_error():
    model = tiny_model()
    model.model.transformer["ff_out"].weight = model.model.transformer["wte"].weight
    assert_refused(model, adapter_for(model), "layers share a parameter")


class GainPlusOne(nn.Module):
    """A norm whose parameter is the gain minus one; a gain of 1 would double its output."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.LayerNorm(16), r"attn_norm: has parameters weight \(16,\), bias \(16,\); valid: an RMS norm"),
        (nn.LayerNorm(16, bias=False), "attn_norm: LayerNorm does not compute x / rms"),
        (nn.RMSNorm(16, elementwise_affine=False), "attn_norm: has parameters none"),
        (nn.RMSNorm(24), r"attn_norm: has parameters weight \(24,\)"),
        (GainPlusOne(16), "attn_norm: GainPlusOne does not compute"),
    ],
)
def test_other_norms_are_an_error(norm, message):
    model = tiny_model()
    model.set_submodule(f"{BLOCKS}.1.attn_norm", norm)
    assert_refused(model, adapter_for(model), message)


def test_a_layer_norm_is_noticed_however_wide():
    """Random numbers have hardly a mean over many channels, and without one both norms agree."""
    width = 1 << 14
    block = nn.ModuleDict({"norm": nn.LayerNorm(width, bias=False), "read": nn.Linear(width, 1)})
    block["write"] = nn.Linear(1, width)
    model = nn.ModuleDict({"embed": nn.Embedding(2, width), "blocks": nn.ModuleList([block])})
    model["last"], model["head"] = nn.RMSNorm(width), nn.Linear(width, 2)
    adapter = ModelAdapter(
        model_type="wide",
        blocks="blocks",
        linear_groups=(("read",), ("write",)),
        embedding="embed",
        head="head",
        mask_token_id=0,
        scale_pairs=(("norm", ("read",)),),
        residual_outputs=("write",),
        final_norm="last",
    )
    assert_refused(model, adapter, "norm: LayerNorm does not compute")


def test_torchs_own_rms_norm_is_welcome():
    model = tiny_model(dtype=torch.float64)
    model.set_submodule(f"{BLOCKS}.1.attn_norm", nn.RMSNorm(16, eps=1e-5, dtype=torch.float64))
    before = logits_of(model)
    rotate_residual(model, adapter_for(model))
    check(before, model)


def test_other_layers_and_widths_are_errors():
    model = tiny_model()
    model.set_submodule(f"{BLOCKS}.1.up_proj", nn.Identity())
    assert_refused(model, adapter_for(model), f"{BLOCKS}.1.up_proj: a Identity; valid: nn.Linear")
    model.set_submodule(f"{BLOCKS}.1.up_proj", nn.Linear(12, 24))
    assert_refused(model, adapter_for(model), "up_proj: 12 channels at the residual; the embedding has 16")
    model = tiny_model()
    model.set_submodule(f"{BLOCKS}.0.ff_out", nn.Linear(24, 20))
    assert_refused(model, adapter_for(model), "ff_out: 20 channels at the residual")
    model = tiny_model()
    model.set_submodule(f"{BLOCKS}.1.v_proj", nn.Linear(16, 12))
    assert_refused(model, adapter_for(model), "v_proj has 12 outputs, attn_out 16 inputs", rotate_values)


def test_a_width_without_a_hadamard_matrix_is_an_error():
    model = tiny_model(d_model=22, n_heads=1)
    assert_refused(model, adapter_for(model), "22")
    assert_refused(model, adapter_for(model), "22", rotate_values)
