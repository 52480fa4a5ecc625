"""`optimum-cli dllmquant ...`: the commands of `dllmquant`, from Optimum's command line.

The build puts a copy of this file at `optimum/commands/register/register_dllmquant.py`, where Optimum looks for
commands. Every start of `optimum-cli` imports that copy, so nothing heavy is imported before the command runs.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class DLLMQuantCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands everything that follows `optimum-cli dllmquant` to the `dllmquant` command line."""

    COMMAND = CommandInfo(name="dllmquant", help="Quantize diffusion language models, and measure what they lose.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Leaves options, also `--help`, to dllmquant: no word begins an option of this parser."""
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Runs the command and exits with its code."""
        from dllmquant.cli.app import app

        app(self.args.arguments, prog_name="optimum-cli dllmquant")


REGISTER_COMMANDS = [DLLMQuantCommand]
