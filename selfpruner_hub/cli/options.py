"""Options that several verbs share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfpruner_hub.errors import UserError


@dataclass(frozen=True)
class Result:
    """Output and exit status of a verb."""

    text: str = ""
    """Text for stdout, without its last newline; empty if the verb printed its lines itself."""
    note: str = ""
    """Line for stderr; empty if there is none."""
    status: int = 0
    """Exit status."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    help: str
    """One line for the list of verbs, without a full stop."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Function that declares the arguments; `add_to` adds the options of all verbs."""
    run: Callable[[argparse.Namespace], Result]
    """Function that is called with the parsed command line."""

    def add_to(self, verbs: Any, name: str) -> None:
        """Add the verb to the subparsers of the program, with the options that all verbs have."""
        description = f"{self.help[0].upper()}{self.help[1:]}."
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=self.help, description=description)
        parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
        parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
        parser.set_defaults(run=self.run)
        self.add_arguments(parser)


def from_pretrained(parser: argparse._ActionsContainer) -> None:
    """Add the options for loading a model to a parser or to a group of it."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: the accelerator where there is one)")
    device_map(parser)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--gguf-file", metavar="FILE", help="load the weights from this GGUF file of MODEL")


def device_map(parser: argparse._ActionsContainer) -> None:
    """Add the option for a model that transformers places."""
    parser.add_argument("--device-map", metavar="MAP", help="auto, balanced, …: let transformers place the weights")


def writer(parser: argparse._ActionsContainer) -> None:
    """Add the options for a server that writes the text."""
    parser.add_argument(
        "--writer",
        metavar="URL",
        help="an OpenAI-compatible server of the dense model (vLLM, llama.cpp) that writes its text",
    )
    parser.add_argument("--writer-model", metavar="M", help="name of the model there (default: the only one)")


def listed(names: Collection[str]) -> str:
    """Join names for a help text: a, b or c."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def number(text: str) -> Any:
    """Return a number, or the text itself, which the package then refuses with its own message."""
    try:
        return float(text)
    except ValueError:
        return text


def path(text: str) -> Path:
    """Return a path that something is written to; refuse an empty one, which would stand for the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError('expects a path, and got "" (is a variable of the shell unset?)')
    return Path(text)


def quieten(options: argparse.Namespace) -> None:
    """Turn off transformers' progress bars for every file, which would hide our own progress.

    This imports transformers, which takes seconds, so a verb calls it after it has checked its options.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if options.quiet:
        logging.set_verbosity_error()


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` from the options for loading a model."""
    keywords = {name: getattr(options, name) for name in ("device", "device_map", "dtype", "revision", "gguf_file")}
    return {key: value for key, value in keywords.items() if value is not None}


def whole(text: str) -> Any:
    """Return a whole number, or the text itself, which the package then refuses with its own message."""
    value = number(text)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def settings_of(pairs: Sequence[str], options: Collection[str] = (), given: str = "--set") -> dict[str, Any]:
    """Read settings from the command line.

    Args:
        pairs: Settings as NAME=VALUE; a value is JSON, or a text. `schedule.NAME` is a field of the schedule.
        options: Names of settings that have an option of their own.
        given: Option that they were given to, for messages.

    Returns:
        Values by name; fields of a setting as a mapping.

    Raises:
        UserError: A pair has no `=`, or its name has an option of its own.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{given} expects NAME=VALUE; got {pair!r}.")
        owner, dot, last = name.rpartition(".")
        if last in options:
            raise UserError(f"{name} has an option of its own.", f"Use --{last} {value}.")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        parsed = tuple(parsed) if isinstance(parsed, list) else parsed
        if dot:
            before = settings.get(owner)
            parsed = {**(before if isinstance(before, dict) else {}), last: parsed}
        settings[owner or name] = parsed
    return settings
