"""What a format cannot express is refused, with a sentence that says what and where; nothing is written."""

import pytest

import dllmquant
from dllmquant.export import FORMATS, ExportError, export_model
from tests.export.quantized import quantized
from tests.tiny import tiny_llada

BLOCKS = "model.transformer.blocks"
EVERYWHERE = f"{BLOCKS}.0.q_proj and 13 others"
MIXED = {"group_size": 16, "solver": "gptq", "mixed": {"choices": [2, 4], "mean": 3}}


def refusal(model, form, directory):
    with pytest.raises(ExportError) as raised:
        export_model(model, directory / "out", form)
    assert not (directory / "out").exists()
    return str(raised.value)


@pytest.mark.parametrize("form", FORMATS)
def test_online_rotations(form, tmp_path):
    message = refusal(quantized("quarot-w3a16", calibrated=True), form, tmp_path)
    assert message == (
        f"format: {form!r} cannot express input transforms computed at every call: hadamard "
        f"({BLOCKS}.0.ff_out and 1 other)"
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("recipe", ["duquant-w3a16", "dllmquant-w4a4-av", "rtn-w4a4"])
def test_other_settings_no_format_has(recipe, form, tmp_path):
    expected = {
        "duquant-w3a16": "input transforms computed at every call: block, permute, block",
        "dllmquant-w4a4-av": f"quantized attention ({BLOCKS}.0 and 1 other)",
        "rtn-w4a4": f"4-bit symmetric activations per token ({EVERYWHERE})",
    }
    changes = {"transforms": [{"kind": "duquant", "block_size": 16}]} if recipe == "duquant-w3a16" else {}
    model = quantized(recipe, calibrated=recipe != "rtn-w4a4", **changes)
    assert expected[recipe] in refusal(model, form, tmp_path)


def test_everything_in_the_way_is_named_at_once(tmp_path):
    message = refusal(quantized("quarot-w4a4", calibrated=True), "gptq", tmp_path)
    assert "hadamard" in message
    assert "4-bit symmetric activations per token" in message


@pytest.mark.parametrize("form", ["gptq", "dequantized"])
def test_weight_formats_take_no_activations(form, tmp_path):
    message = refusal(quantized("rtn-w8a8"), form, tmp_path)
    assert message == f"format: {form!r} cannot express 8-bit symmetric activations per token ({EVERYWHERE})"


@pytest.mark.parametrize(
    ("activations", "what"),
    [
        ({"bits": 8, "symmetric": False, "full_range": False}, "8-bit asymmetric activations per token"),
        ({"bits": 8, "group_size": 16}, "8-bit symmetric activations in groups of 16 channels"),
    ],
)
def test_activations_compressed_tensors_does_not_run(activations, what, tmp_path):
    assert what in refusal(quantized("rtn-w8a8", activations=activations), "compressed-tensors", tmp_path)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_several_widths_in_a_layer(form, tmp_path):
    message = refusal(quantized("gptq-w4a16", calibrated=True, weights=MIXED), form, tmp_path)
    assert message == f"format: {form!r} cannot express weights of several widths within a layer ({EVERYWHERE})"


def test_channels_that_fill_no_words(tmp_path):
    model = quantized("rtn-w3a16", tiny_llada(n_kv_heads=2))
    assert refusal(model, "gptq", tmp_path) == (
        "format: 'gptq' cannot express 3-bit layers of 32 inputs and 16 outputs, whose codes do not fill 32-bit words "
        f"({BLOCKS}.0.k_proj and 3 others)"
    )


def test_layers_skipped_in_some_blocks_in_gptq(tmp_path):
    assert refusal(quantized("rtn-w4a16", skip=["*.0.q_proj"]), "gptq", tmp_path) == (
        "format: 'gptq' cannot express that q_proj is quantized in 1 of the 2 blocks that have it; "
        "skip it in all of them or in none"
    )


@pytest.mark.parametrize("form", FORMATS)
def test_models_that_are_not_quantized(form, tmp_path):
    assert refusal(tiny_llada(), form, tmp_path) == (
        "model: LLaDAModelLM has no packed layers; quantize it by dllmquant first"
    )


def test_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match="format: 'gguf' is unknown; valid: compressed-tensors, gptq, dequantized"):
        dllmquant.export_model(quantized("rtn-w4a16"), tmp_path, "gguf")
