"""The command line `selfpruner`: one module per verb."""

from selfpruner_hub.cli.main import main

__all__ = ["main"]
