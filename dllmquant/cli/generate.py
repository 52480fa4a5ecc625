"""`dllmquant generate`."""

import sys
from typing import Annotated

import typer

from dllmquant.cli.loading import (
    find_model,
    interactive,
    is_quick,
    load_model,
    load_tokenizer,
    tamed_transformers,
    usable_device,
)
from dllmquant.cli.options import (
    BatchSize,
    BlockLength,
    CfgScale,
    Device,
    Dtype,
    DtypeOption,
    GenLength,
    Model,
    RemaskingOption,
    Seed,
    Steps,
    Temperature,
    Threshold,
    sampler_options,
)


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", show_default=False, help="Prompts; none reads one per line from stdin."),
    ] = None,
    steps: Steps = None,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    cfg_scale: CfgScale = None,
    remasking: RemaskingOption = None,
    threshold: Threshold = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
) -> None:
    """Complete prompts with the model's own sampler.

    The model may be quantized or not. Sampler settings that are not given are the checkpoint's. Completions are
    printed in the order of the prompts.

    For example:

        dllmquant generate out "q: tom has 7 apples. tom buys 5 more. how many remain? a:"

        dllmquant generate llada-tiny --threshold 0.9 < prompts.txt
    """
    from dllmquant.generation import generate as complete

    texts = prompts or _prompts_from_stdin()
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"prompt {index + 1} is empty; give some text")
    sampler = sampler_options(steps, gen_length, block_length, temperature, cfg_scale, remasking, threshold)
    where = usable_device(device)
    source, _ = find_model(model, sampler)
    with tamed_transformers(bars=not is_quick(source)):
        tokenizer = load_tokenizer(source)
        loaded = load_model(source, dtype, where)
    options = {"seed": seed, "batch_size": batch_size, "progress": interactive(), **sampler}
    for completion in complete(loaded, tokenizer, texts, **options):
        typer.echo(completion.strip())


def _prompts_from_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise ValueError("prompt: none given; give prompts as arguments, or one per line on standard input")
    texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise ValueError("prompt: none given, and standard input is empty")
    return texts
