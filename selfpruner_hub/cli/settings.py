"""The verb `selfpruner settings`."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict

from selfpruner_hub.cli.prune import OWN_OPTIONS
from selfpruner_hub.settings import PRESETS, Setting, explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument(
        "--preset",
        default="default",
        help=f"with the values of this preset: {', '.join(PRESETS)} (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> str:
    """List the settings that `selfpruner prune --set` takes.

    Args:
        options: Parsed command line.

    Returns:
        Text to print: each setting with its default, as `--set` takes it, and its meaning; or JSON.

    Raises:
        UserError: The preset is unknown.
    """
    settings = [setting for setting in explained(options.preset) if setting.name not in OWN_OPTIONS]
    if options.json:
        return json.dumps([asdict(setting) for setting in settings])
    width = min(100, shutil.get_terminal_size().columns)
    first = f"Settings of the preset {options.preset}. `selfpruner prune` changes one by --set NAME=VALUE."
    return "\n".join([first, *(_told(setting, width) for setting in settings)])


def _told(setting: Setting, width: int) -> str:
    value = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
    meaning = textwrap.fill(setting.meaning, width, initial_indent="    ", subsequent_indent="    ")
    return f"\n{setting.name}={value}\n{meaning}"
