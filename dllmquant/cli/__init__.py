"""The command line: a module per command, with a function of its name whose docstring is its help.

Whatever is wrong with the input is found before a model is loaded. It ends in one line, `error: ...`, on standard error
and exit code 2; `--debug` shows the traceback as well.
"""

import sys

from dllmquant.cli import ablate, demo, eval, export, generate, inspect, models, quantize, recipes
from dllmquant.cli.app import app as _program

# In the order of `dllmquant --help`.
_program.command()(demo.demo)
_program.command()(quantize.quantize)
_program.command()(generate.generate)
_program.command(name="eval")(eval.eval_)
_program.command()(ablate.ablate)
_program.command()(recipes.recipes)
_program.command()(models.models)
_program.command()(inspect.inspect)
_program.command()(export.export)


def main() -> None:
    """Runs the command line interface."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without, say, `░` still gets the rest
    _program(prog_name="dllmquant")
