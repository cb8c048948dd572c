"""The command `optimum-cli export selfpruned MODEL --to FORMAT [OPTION …] OUT`, the same as `selfpruner export`.

optimum-cli finds this file in its namespace `optimum.commands.register`; no folder above it may have an
`__init__.py` (PEP 420). optimum-cli loads it at every start, so slow imports wait until the command runs.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class SelfPrunedExportCommand(BaseOptimumCLICommand):
    """The command that passes its arguments to `selfpruner export`."""

    COMMAND = CommandInfo(name="selfpruned", help="Export a model that selfpruner pruned, or its dense parent.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Accept all arguments without parsing them.

        Args:
            parser: Parser of the command.
        """
        parser.usage = "optimum-cli export selfpruned MODEL --to FORMAT [OPTION ...] OUT"
        parser.add_argument("words", nargs=REMAINDER, help="options are those that `selfpruner export --help` lists")

    def run(self) -> None:
        """Export, and exit with the status of `selfpruner export`."""
        if len(self.args.words) < 2:
            self.parser.error("it takes a model, and last an output directory")
        from selfpruner_hub.cli import main

        *words, output = self.args.words
        sys.exit(main(["export", *words, "--output", output]))


REGISTER_COMMANDS = [(SelfPrunedExportCommand, ExportCommand)]
