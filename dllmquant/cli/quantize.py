"""`dllmquant quantize`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllmquant.cli.checks import check_output
from dllmquant.cli.export import Format
from dllmquant.cli.loading import (
    find_model,
    interactive,
    is_quick,
    load_model,
    load_tokenizer,
    tamed_transformers,
    usable_device,
)
from dllmquant.cli.options import Device, Dtype, DtypeOption, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dllmquant.calibration import Prompt
    from dllmquant.quantizer import DLLMQuantizer
    from dllmquant.recipe import Recipe


def quantize(
    model: Model,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Built-in recipe (see dllmquant recipes) or a YAML file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the checkpoint; new or empty.")
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Calibration prompts: a file (.txt, .jsonl, .json, .parquet) or a data set of the hub, owner/name or "
            "owner/name:config. [default: built-in problems]",
        ),
    ] = None,
    prompt_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field of the prompts. [default: prompt, or the only one]"),
    ] = None,
    completion_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field of the completions. [default: completion, where there is one]"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Split of a data set, such as train[:10%]. [default: train]")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Make each prompt a user's turn in the tokenizer's chat template.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Seed of the calibration. [default: the recipe's]")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    format: Annotated[
        Format | None,
        typer.Option(
            help="A format that other programs load, as `dllmquant export` writes. [default: dllmquant's own]"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in a directory that is not empty.")
    ] = False,
) -> None:
    """Quantize a model by a recipe and save it.

    The result is a checkpoint directory for transformers, with the tokenizer. Inputs are checked before the model
    is loaded. Of your own prompts, the recipe's number is drawn in an order that depends on the seed.

    For example:

        dllmquant quantize llada-tiny --recipe dllmquant-w4a4 --output out

        dllmquant quantize llada-tiny --recipe dllmquant-w4a4 --output mine --prompts mine.jsonl

        dllmquant quantize llada-tiny --recipe rtn-w8a8 --output out8 --format compressed-tensors
    """
    from dllmquant.quantizer import DLLMQuantizer

    quantizer = DLLMQuantizer(recipe)
    check_output(output, overwrite)
    options = _prompt_options(prompts, quantizer.recipe, prompt_field, completion_field, split, chat_template)
    where = usable_device(device)
    calibration = quantizer.recipe.calibration
    source, config = find_model(model, None if calibration is None else calibration.sampler)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model: {model} is quantized already; give the 16-bit original")
    if output.exists() and Path(source).is_dir() and output.samefile(source):
        raise ValueError(f"output: {output} is the directory of the model itself; give another")
    with tamed_transformers(bars=not is_quick(source)):
        tokenizer = load_tokenizer(source)
        rows = None if prompts is None else _load_prompts(prompts, quantizer.recipe, seed, tokenizer, options)
        loaded = load_model(source, dtype, where)
        began = time.perf_counter()
        quantizer.quantize(loaded, tokenizer=tokenizer, prompts=rows, seed=seed, progress=interactive())
        seconds = time.perf_counter() - began
        refused = _save(loaded, tokenizer, output, format)
    if refused is not None:
        raise ValueError(f"{refused}. The quantized model is in {output}, in dllmquant's own format")
    typer.echo(_quantization_report(quantizer, loaded, output, seconds))


def _save(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", output: Path, format: Format | None
) -> str | None:
    """Saves a quantized model; in its own format, so that the work is not lost, if another refuses it.

    Returns:
        Why the format refused it; None if it did not.
    """
    from dllmquant.export import ExportError, export_model

    refused = None
    if format is not None:
        try:
            export_model(model, output, format.value, tokenizer=tokenizer)
            return None
        except ExportError as error:
            refused = str(error)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return refused


def _prompt_options(
    prompts: str | None,
    recipe: "Recipe",
    prompt_field: str | None,
    completion_field: str | None,
    split: str | None,
    chat_template: bool,
) -> dict[str, Any]:
    """The options that say how calibration prompts are read, after checking that they have a meaning."""
    given = {
        "--prompt-field": prompt_field,
        "--completion-field": completion_field,
        "--split": split,
        "--chat-template": chat_template or None,
    }
    if prompts is None:
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option}: has no effect without --prompts; leave it out, or give --prompts")
    elif recipe.calibration is None:
        raise ValueError(f"prompts: recipe {recipe.name!r} uses no calibration data; leave --prompts out")
    elif split is not None and Path(prompts).expanduser().is_file():
        raise ValueError(f"--split: {prompts} is a file, which has no splits; leave --split out")
    options = {"field": prompt_field, "completion_field": completion_field, "split": split}
    return {"chat_template": chat_template} | {name: value for name, value in options.items() if value is not None}


def _load_prompts(
    source: str, recipe: "Recipe", seed: int | None, tokenizer: "PreTrainedTokenizerBase", options: dict[str, Any]
) -> "list[Prompt]":
    """Draws as many calibration prompts as the recipe consumes."""
    import datasets

    from dllmquant.calibration import load_prompts, prompts_needed

    assert recipe.calibration is not None
    had_bars = not datasets.are_progress_bars_disabled()
    if not interactive():
        datasets.disable_progress_bars()
    try:
        return load_prompts(
            source,
            count=prompts_needed(recipe.calibration),
            seed=recipe.seed if seed is None else seed,
            tokenizer=tokenizer,
            **options,
        )
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _quantization_report(quantizer: "DLLMQuantizer", model: "PreTrainedModel", output: Path, seconds: float) -> str:
    from dllmquant.calibration.experts import experts_summary
    from dllmquant.checkpoint import weight_bytes
    from dllmquant.lab.inspection import mean_bits
    from dllmquant.nn.linear import QuantLinear

    recipe, reports, size = quantizer.recipe, quantizer.reports, weight_bytes(model)
    lines = [
        f"{recipe.name}: {recipe.summary()}",
        f"protocol: {recipe.protocol}",
        f"quantized {len(reports)} layers, {size.quantized_parameters:,} weights, in {seconds:.1f} s: "
        f"{size.quantized_bytes:,} bytes, {size.bytes_per_quantized_weight:.3f} per weight",
        f"kept in 16 or more bits: {size.other_parameters:,} weights, {size.other_bytes:,} bytes",
    ]
    if size.attention_bytes:
        lines.append(f"scales of quantized attention: {size.attention_bytes:,} bytes")
    losses = [(report.loss, report.name) for report in reports if report.loss is not None]
    if losses:
        loss, name = max(losses)
        lines.append(
            f"calibrated on {max(report.tokens for report in reports):,} tokens; "
            f"largest squared output error per token {loss:.4g}, in {name}"
        )
    if quantizer.allocation:
        layers = {entry.site: model.get_submodule(entry.site) for entry in quantizer.allocation}
        widths = {site: layer.in_features for site, layer in layers.items() if isinstance(layer, QuantLinear)}
        given = "/".join(map(str, sorted({entry.bits for entry in quantizer.allocation})))
        lines.append(f"activation bits by input: {given}, mean {mean_bits(quantizer.allocation, widths):.3g} per value")
    if quantizer.states is not None:
        if quantizer.states.coverage is not None:
            lines.append(f"calibration states: {quantizer.states.coverage.summary()}")
        if quantizer.states.cost is not None:
            lines.append(f"calibration states took: {quantizer.states.cost.summary()}")
        lines += [f"note: {note}" for note in quantizer.states.notes]
    if quantizer.expert_tokens and recipe.calibration is not None:
        rounded = sum(report.fallback is not None for report in reports)
        said = f"; {rounded} layers of starved experts rounded to nearest" if rounded else ""
        lines.append(experts_summary(quantizer.expert_tokens, recipe.calibration.min_expert_tokens) + said)
    lines.append(
        f"wrote {output} ({sum(path.stat().st_size for path in output.glob('*.safetensors')):,} bytes of weights)"
    )
    return "\n".join(lines)
