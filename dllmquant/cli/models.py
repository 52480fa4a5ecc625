"""`dllmquant models`."""

import typer


def models() -> None:
    """List the model families and how each was verified.

    Checkpoints load under their published tensor names, without remote code. Each verification names the test that does
    it; the tests build models of the published sizes and tiny ones, and download none.

    For example:

        dllmquant models
    """
    from transformers import AutoConfig

    from dllmquant.lab.tables import aligned
    from dllmquant.models import registered_adapters

    adapters = [adapter for _, adapter in sorted(registered_adapters().items(), key=lambda item: item[0].lower())]
    overview = [
        [
            adapter.model_type,
            adapter.attention,
            "the next position" if adapter.logits_shift else "their position",
            "none" if adapter.mask_token_id is None else str(adapter.mask_id(AutoConfig.for_model(adapter.model_type))),
        ]
        for adapter in adapters
    ]
    typer.echo(aligned(["family", "attention", "logits predict", "mask token"], overview, left=3))
    for adapter in adapters:
        typer.echo(f"\n{adapter.model_type}")
        for checkpoint in adapter.checkpoints:
            typer.echo(f"  {checkpoint}")
        for verification in adapter.verified:
            typer.echo(f"  {verification.kind}: {verification.how}")
            typer.echo(f"    {verification.test}")
