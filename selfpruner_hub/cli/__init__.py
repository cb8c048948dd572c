"""The command line `selfpruner`: a module for each verb."""

from selfpruner_hub.cli.main import main

__all__ = ["main"]
