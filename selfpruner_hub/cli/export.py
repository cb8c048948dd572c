"""The verb `selfpruner export`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from exporters.format import Option, export_format
from selfpruner_hub.cli.options import Result, listed, path, quieten
from selfpruner_hub.storage.layout import EXPORTS, known_export

if TYPE_CHECKING:
    from selfpruner_hub.storage.export_record import ExportRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("model", metavar="MODEL_OR_DIR", help="a pruned model, or a dense one for comparison")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=listed(EXPORTS))
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help="where the export goes")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in DIR that is no export")
    parser.add_argument(
        "--tolerance", type=float, metavar="D", help="largest distance of a logit from PyTorch's; inf compares nothing"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--gguf-file", metavar="FILE", help="load the weights from this GGUF file of MODEL_OR_DIR")
    of = parser.add_argument_group("options of the formats")
    for option in _options():
        flag = f"--{option.name.replace('_', '-')}"
        of.add_argument(flag, type=option.type, metavar=option.metavar, help=option.help)


def _options() -> list[Option]:
    """Options of all formats; where only one format has an option, its help names that format."""
    by_name: dict[str, list[tuple[str, Option]]] = {}
    for name in EXPORTS:
        for option in export_format(name).options:
            by_name.setdefault(option.name, []).append((name, option))
    return [
        option if len(owners) > 1 else replace(option, help=f"{owner}: {option.help}")
        for owners in by_name.values()
        for owner, option in owners[:1]
    ]


def run(options: argparse.Namespace) -> Result:
    """Export a model.

    Args:
        options: Parsed command line.

    Returns:
        One line, or the record as JSON.

    Raises:
        UserError: An option is wrong, or the model cannot be loaded.
        ExportError: The model cannot be exported, or what was written differs from it.
    """
    known_export(options.to)  # before torch is imported, which takes seconds

    from exporters.export import export
    from selfpruner_hub.progress import Bars
    from selfpruner_hub.storage.export_record import read_export

    quieten(options)
    loading = {"revision": options.revision, "gguf_file": options.gguf_file}
    names = [option.name for option in _options()]
    with Bars(not options.quiet) as progress:
        directory = export(
            options.model,
            options.to,
            options.output,
            tolerance=options.tolerance,
            loading=_given(loading),
            overwrite=options.overwrite,
            progress=progress,
            **_given({name: getattr(options, name) for name in names}),
        )
    record = read_export(directory)
    if options.json:
        return Result(json.dumps({"output": str(directory), **asdict(record)}))
    parity = record.unchecked or f"{_difference(record)} ({record.tolerance:.1e} is allowed)"
    return Result(f"{directory}: {parity}{f'. {record.remark}' if record.remark else ''}")


def _difference(record: ExportRecord) -> str:
    if record.format == "onnx" and record.options["dtype"] == "int8":
        return f"KL divergence {record.max_difference:.1e} from PyTorch with rounded weights"
    return f"logits within {record.max_difference:.1e} of PyTorch's float32"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
