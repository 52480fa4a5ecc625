"""`dllmquant ablate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dllmquant.cli.checks import check_writable
from dllmquant.cli.loading import interactive, tamed_transformers, usable_device
from dllmquant.cli.options import Device


def ablate(
    ablation: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="The ablation: a YAML file.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Directory of the results; one that holds some is completed."
        ),
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Held-out problems per task. [default: the file's]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the planned runs; measure nothing.")] = False,
    device: Device = "auto",
) -> None:
    """Compare recipes on a grid of models, overrides and seeds.

    FILE names models, and cells: recipes with overrides. Every cell is measured against the 16-bit model on the same
    problems. DIR receives a file per run in cells/, and results.md, .csv, .json and .png, written anew after every
    run. The command may be interrupted and started again: what is measured is not measured twice, and what has
    changed is measured anew. A run that fails is reported, the others go on, and the exit code is 1.

    A whole FILE, with the seeds of the calibration (docs/ablation.md lists all keys):

        name: groups at W4A4

        models: [llada-tiny]

        seeds: [0, 1, 2]

        cells:

        - gptq-w4a4

        - {recipe: gptq-w4a4, name: g16, overrides: {weights: {group_size: 16}}}

        compare: [[g16, gptq-w4a4]]

    For example:

        dllmquant ablate ablation.yaml --output runs/groups --dry-run

        dllmquant ablate ablation.yaml --output runs/groups --limit 200
    """
    from dllmquant.lab.ablation import Ablation, plan_ablation, planned_text, run_ablation

    check_writable(output, "output")
    document = Ablation.load(ablation)
    if limit is not None:
        document = document.model_copy(update={"limit": limit})
    where = usable_device(device)
    with tamed_transformers(bars=False):
        plan = plan_ablation(document, base=ablation.parent)
        if dry_run:
            typer.echo(planned_text(plan, output))
            return
        result = run_ablation(plan, output, device=where, progress=interactive(), report=_above_the_bar)
    typer.echo(result.text)
    if result.failed:
        raise typer.Exit(1)


def _above_the_bar(line: str) -> None:
    """Prints a line on standard error without breaking a progress bar that may be there."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)
