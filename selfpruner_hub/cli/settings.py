"""The verb `selfpruner settings`, which lists what `selfpruner prune --set` takes."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict

from selfpruner_hub.cli.options import Result
from selfpruner_hub.cli.prune import SETTINGS_WITH_OPTION
from selfpruner_hub.settings import PRESETS, DescribedSetting, explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    names = ", ".join(PRESETS)
    parser.add_argument("--preset", default="default", help=f"its values: {names} (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    """List the settings that `selfpruner prune --set` takes.

    Args:
        options: Parsed command line.

    Returns:
        Each setting with its default, as `--set` takes it, and its meaning; or JSON.

    Raises:
        UserError: The preset is unknown.
    """
    every = explained(options.preset)
    settings = [setting for setting in every if setting.name.rpartition(".")[2] not in SETTINGS_WITH_OPTION]
    if options.json:
        return Result(json.dumps([asdict(setting) for setting in settings]))
    width = min(100, shutil.get_terminal_size().columns)
    first = f"Settings of the preset {options.preset}. `selfpruner prune` changes one by --set NAME=VALUE."
    return Result("\n".join([first, *(_described(setting, width) for setting in settings)]))


def _described(setting: DescribedSetting, width: int) -> str:
    value = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
    meaning = textwrap.fill(setting.meaning, width, initial_indent="    ", subsequent_indent="    ")
    return f"\n{setting.name}={value}\n{meaning}"
