"""`dllmquant demo`."""

from pathlib import Path
from typing import Annotated

import typer

from dllmquant.cli.checks import check_writable
from dllmquant.cli.loading import interactive, tamed_transformers
from dllmquant.cli.options import Seed


def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Directory for checkpoints, picture, numbers and table."),
    ] = Path("demo-output"),
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out problems per task.")] = 200,
    seed: Seed = 0,
    natural: Annotated[
        bool, typer.Option("--natural", help="Quantize the bundled model as it is, without planted outliers.")
    ] = False,
) -> None:
    """Quantize the bundled model in four ways and measure each.

    Outliers like those of large models are planted in the bundled model first, without changing what it computes.
    It is then quantized to 4-bit weights and activations by rounding, by GPTQ, by DLLMQuant and by DLLMQuant++;
    saved, reloaded, and evaluated on held-out problems. DIR then holds the checkpoints, demo.png, demo.json and
    demo.md. This takes a few minutes on a CPU.

    For example:

        dllmquant demo --output demo-output --limit 50
    """
    from dllmquant.lab.demo import run_demo, stressed

    check_writable(output, "output")
    with tamed_transformers(bars=False):
        result = run_demo(
            output,
            limit=limit,
            seed=seed,
            model=None if natural else stressed(output / "llada-tiny-outliers"),
            progress=interactive(),
            report=lambda line: typer.echo(line, err=True),
        )
    typer.echo(result.text)
