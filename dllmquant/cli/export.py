"""`dllmquant export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dllmquant.cli.checks import check_output
from dllmquant.cli.loading import find_model, is_quick, load_model, load_tokenizer, tamed_transformers
from dllmquant.cli.options import Dtype, DtypeOption


class Format(StrEnum):
    """The names of `dllmquant.export.FORMATS`."""

    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    dequantized = "dequantized"


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", show_default=False, help="Quantized checkpoint: directory or hub id."),
    ],
    format: Annotated[Format, typer.Option(help="dequantized is for converters such as GGUF's.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory; new or empty.")],
    dtype: DtypeOption = Dtype.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in a directory that is not empty.")
    ] = False,
) -> None:
    """Write a quantized model in a format that other programs load.

    What the format cannot express, such as rotations computed at every call or 4-bit activations, is refused. The
    result loads without dllmquant; where transformers does not know the family, with trust_remote_code=True.

    For example:

        dllmquant export out --format compressed-tensors --output out-ct

        dllmquant export out --format dequantized --output out-16bit --dtype bfloat16
    """
    from dllmquant.export import export_model

    check_output(output, overwrite)
    source, config = find_model(model)
    method = getattr(config, "quantization_config", None) or {}
    if method.get("quant_method") != "dllmquant":
        raise ValueError(f"model: {model} is not quantized by dllmquant; quantize it first")
    if output.exists() and Path(source).is_dir() and output.samefile(source):
        raise ValueError(f"output: {output} is the directory of the model itself; give another")
    with tamed_transformers(bars=not is_quick(source)):
        tokenizer = load_tokenizer(source)
        export_model(load_model(source, dtype, "cpu"), output, format.value, tokenizer=tokenizer)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    typer.echo(f"wrote {output} ({size:,} bytes of weights)")
