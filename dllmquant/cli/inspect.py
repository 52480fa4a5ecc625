"""`dllmquant inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from dllmquant.cli.checks import check_file
from dllmquant.cli.loading import find_model


def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="Checkpoint directory.")],
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw coverage and activation bits, as far as there are any, as a PNG."),
    ] = None,
) -> None:
    """Tell what a checkpoint holds.

    That is its recipe, protocol, version and seed; its layers, their bits, input transforms and bytes per weight; its
    activation bits where they differ; where in the denoising process its calibration states lie and what they took; and
    its files. The configuration and the headers of the weight files are read; the weights are not loaded.

    For example:

        dllmquant inspect out

        dllmquant inspect out --plot out.png
    """
    from dllmquant.lab.inspection import checkpoint_bits, checkpoint_coverage, describe_checkpoint

    source, config = find_model(model)
    if not Path(source).is_dir():
        raise ValueError(f"model: {model} is not on this disk; give a directory")
    if plot is not None:
        check_file(plot, "plot")
    text = describe_checkpoint(Path(source), config)
    if plot is not None:
        from dllmquant.lab.checkpoint_plots import plot_checkpoint  # only now: matplotlib takes its time

        coverage, bits = checkpoint_coverage(config), checkpoint_bits(config)
        plot_checkpoint(plot, coverage=coverage, bits=bits, title=str(model))
        text += f"\n\nwrote {plot}"
    typer.echo(text)
