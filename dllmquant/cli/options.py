"""Arguments and options that several commands share."""

from enum import StrEnum
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    """Floating-point types a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Remasking(StrEnum):
    """Orders in which a sampler commits tokens: LLaDA's two, then Dream's, then those of block diffusion."""

    low_confidence = "low_confidence"
    random = "random"
    origin = "origin"
    maskgit_plus = "maskgit_plus"
    topk_margin = "topk_margin"
    entropy = "entropy"
    low_confidence_dynamic = "low_confidence_dynamic"
    low_confidence_static = "low_confidence_static"
    sequential = "sequential"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Directory, hub id (owner/name), or a bundled model: llada-tiny, llada-tiny-seed1, dream-tiny.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of everything random.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Such as cpu or cuda:1; auto takes a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type to load the model in; auto is the checkpoint's own.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences per forward pass.")]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Denoising steps of a generation, or of a block in block diffusion. [default: the checkpoint's]",
    ),
]
GenLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens to generate. [default: the checkpoint's]")
]
BlockLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens per block; divides --gen-length, or is the model's own.")
]
Temperature = Annotated[float | None, typer.Option(min=0.0, metavar="T", help="0 always takes the likeliest token.")]
CfgScale = Annotated[
    float | None,
    typer.Option(min=0.0, metavar="S", help="Classifier-free guidance; 0 is off, else every step doubles."),
]
RemaskingOption = Annotated[
    Remasking | None,
    typer.Option(
        help="Which tokens to commit; LLaDA's sampler knows the first two, Dream's the next four, block diffusion the "
        "others."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="P", help="Commit every token at least this confident, instead of a fixed number."
    ),
]


def sampler_options(
    steps: int | None,
    gen_length: int | None,
    block_length: int | None,
    temperature: float | None,
    cfg_scale: float | None,
    remasking: Remasking | None,
    threshold: float | None,
) -> dict[str, Any]:
    """The sampler settings that were given."""
    options = {
        "steps": steps,
        "gen_length": gen_length,
        "block_length": block_length,
        "temperature": temperature,
        "cfg_scale": cfg_scale,
        "remasking": None if remasking is None else remasking.value,
        "threshold": threshold,
    }
    return {name: value for name, value in options.items() if value is not None}
