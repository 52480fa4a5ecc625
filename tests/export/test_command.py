"""`dllmquant export`, from a checkpoint to one that other programs load."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from dllmquant.cli.app import app
from dllmquant.cli.export import Format
from dllmquant.export import FORMATS
from tests.export.quantized import logits_of, quantized
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "out"
    quantized("rtn-w4a16").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])


def fails(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


def test_offers_every_format():
    assert [form.value for form in Format] == list(FORMATS)


def test_writes_model_and_tokenizer(checkpoint, tmp_path):
    result = run(checkpoint, "--format", "dequantized", "-o", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    size = (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert result.stdout == f"wrote {tmp_path / 'plain'} ({size:,} bytes of weights)\n"
    assert result.stderr == ""
    plain, packed = (AutoModel.from_pretrained(path).eval() for path in (tmp_path / "plain", checkpoint))
    assert torch.equal(logits_of(plain), logits_of(packed))
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").get_vocab() == tiny_tokenizer().get_vocab()


def test_dtype_is_that_of_the_export(checkpoint, tmp_path):
    assert run(checkpoint, "--format", "dequantized", "-o", tmp_path, "--dtype", "bfloat16").exit_code == 0
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_wrong_input_is_one_line(checkpoint, tmp_path):
    plain = save_tiny(tmp_path / "plain")
    cases = {
        f"error: model: {plain} is not quantized by dllmquant; quantize it first\n": (plain, tmp_path / "a"),
        f"error: output: {plain} is not empty; give a new directory, or --overwrite\n": (checkpoint, plain),
        f"error: output: {checkpoint} is the directory of the model itself; give another\n": (
            checkpoint,
            checkpoint,
            "--overwrite",
        ),
    }
    for message, (model, output, *options) in cases.items():
        assert fails(model, "--format", "gptq", "-o", output, *options) == message


def test_a_refusal_is_one_line(tmp_path):
    quantized("rtn-w8a8").save_pretrained(tmp_path / "w8a8")
    tiny_tokenizer().save_pretrained(tmp_path / "w8a8")
    message = fails(tmp_path / "w8a8", "--format", "gptq", "-o", tmp_path / "out")
    assert message.startswith("error: format: 'gptq' cannot express 8-bit symmetric activations per token")
    assert not (tmp_path / "out").exists()
