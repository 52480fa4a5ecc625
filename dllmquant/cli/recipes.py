"""`dllmquant recipes`."""

from typing import Annotated

import typer


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", show_default=False, help="A recipe to print; none lists the built-in ones."),
    ] = None,
) -> None:
    """List the built-in recipes, or print one as YAML.

    What is printed is a recipe itself, every setting spelled out: save it, change it, and give the file to quantize.

    For example:

        dllmquant recipes

        dllmquant recipes dllmquant-w4a4 > mine.yaml
    """
    from dllmquant.lab.tables import aligned
    from dllmquant.recipe import Recipe

    if name is not None:
        typer.echo(Recipe.load(name).to_yaml().rstrip())
        return
    loaded = [Recipe.load(built_in) for built_in in Recipe.names()]
    typer.echo(aligned(["recipe", "what it does"], [[recipe.name, recipe.summary()] for recipe in loaded], left=2))
