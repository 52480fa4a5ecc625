"""The program around the commands: its options, and how it reports errors."""

import logging
import traceback
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from dllmquant._version import __version__
from dllmquant.cli.checks import one_line


class _Group(TyperGroup):
    """Turns the errors a user can cause into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader has gone; typer ends quietly
        except (ValueError, OSError, SafetensorError) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dllmquant {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, show_default=False, help="Log what is done; -vv logs more."),
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Post-training quantization of diffusion language models.

    Start with the demonstration, which needs no download and no GPU:

        dllmquant demo

    Options of the program stand before the command: dllmquant -v quantize ...
    """
    logger = logging.getLogger("dllmquant")
    previous = logger.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))

    def restore() -> None:
        logger.removeHandler(handler)
        logger.setLevel(previous)

    ctx.call_on_close(restore)
