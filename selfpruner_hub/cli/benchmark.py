"""The verb `selfpruner benchmark`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.format import runtimes
from selfpruner_hub.cli.options import Result, device_map, listed, path, quieten
from selfpruner_hub.errors import OutputError, UserError

if TYPE_CHECKING:
    from selfpruner_hub.storage.model_record import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("directory", metavar="DIR", help="a pruned model, or an export of it for the runtime")
    parser.add_argument("--against", required=True, metavar="MODEL", help="its dense parent, or the parent's export")
    parser.add_argument("--runtime", default="torch", help=f"{listed(runtimes())} (default: %(default)s)")
    parser.add_argument("--batch", metavar="N,…", help="prompts at a time (default: 1; vllm: 1,8,32)")
    parser.add_argument(
        "--prompt", metavar="N,…", help="tokens of a prompt (default: 128,512, or what of it the models can read)"
    )
    parser.add_argument("--new", default="32", metavar="N", help="tokens written after it (default: %(default)s)")
    parser.add_argument("--runs", default="7", metavar="N", help="passes of each model (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", help="of the CPU (default: all)")
    parser.add_argument("--dtype", help="of the weights, in the runtime's words (default: its own)")
    parser.add_argument("--device", help="cpu or cuda (default: the runtime's own)")
    device_map(parser)
    parser.add_argument("--python", type=Path, metavar="PATH", help="the Python of vLLM's environment (vllm only)")
    parser.add_argument("--exports", type=path, metavar="DIR", help="keep the exports that are made for it here")
    parser.add_argument("--text", metavar="DATA", help="measure perplexity too: on wikitext2, c4 or a path")
    parser.add_argument("--output", type=path, metavar="FILE", help="write the JSON here as well")
    parser.add_argument("--save", action="store_true", help="write the figures into DIR's record and card as well")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL")
    parser.add_argument("--gguf-file", metavar="FILE", help="load the weights of MODEL from this GGUF file of it")


def run(options: argparse.Namespace) -> Result:
    """Run the benchmark.

    Args:
        options: Parsed command line.

    Returns:
        The table, or JSON.

    Raises:
        UserError: An option is wrong, a model cannot be loaded or exported, or figures are to be saved
            whose dense model is not the parent in the record.
    """
    numbers = _counts(options)

    from exporters.benchmark import Passes, benchmark
    from selfpruner_hub.hub.card import save_metrics
    from selfpruner_hub.progress import Bars
    from selfpruner_hub.provenance import check_parent
    from selfpruner_hub.storage.model_record import read_record
    from selfpruner_hub.storage.staging import check_writable, write_atomically

    quieten(options)
    if options.output is not None:
        check_writable(options.output.parent)
        if options.output.is_dir():
            raise OutputError(f"{str(options.output)!r} is a directory.", "Name a file for the report.")
    passes = Passes(**numbers, dtype=options.dtype, device=options.device, python=options.python, text=options.text)
    keywords = {"revision": options.revision, "gguf_file": options.gguf_file, "device_map": options.device_map}
    if options.save:  # an error comes before the benchmark, which takes minutes
        record = read_record(Path(options.directory))
        check_parent(record, _identity(options, record), options.against)
    with Bars(not options.quiet) as progress:
        report = benchmark(
            options.directory,
            options.against,
            options.runtime,
            passes,
            exports=options.exports,
            loading={key: value for key, value in keywords.items() if value is not None},
            progress=progress,
        )
    if options.output is not None:
        write_atomically(options.output, report.to_json())
    if options.save:
        save_metrics(Path(options.directory), report.metrics())
    return Result(report.to_json().rstrip("\n") if options.json else report.table())


def _identity(options: argparse.Namespace, record: Record) -> dict[str, Any]:
    """Identity of the model to compare with: from the record of an export, or from the weights of a model."""
    from selfpruner_hub.models.loading import load_model
    from selfpruner_hub.models.weights import identity_of
    from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, read_export

    if (Path(options.against) / EXPORT_RECORD_FILE).is_file():
        return read_export(Path(options.against)).source
    arguments = {"revision": options.revision, "gguf_file": options.gguf_file}
    keywords = {key: value for key, value in arguments.items() if value is not None}
    model, _ = load_model(options.against, device="cpu", dtype=record.parent.get("dtype", "auto"), **keywords)
    return identity_of(model)


def _counts(options: argparse.Namespace) -> dict[str, Any]:
    """Read the options that are whole numbers; keywords of `Passes`."""
    (new_tokens,), (runs,) = (_numbers(name, getattr(options, name), 1) for name in ("new", "runs"))
    return {
        "batches": [] if options.batch is None else _numbers("batch", options.batch),
        "prompts": [] if options.prompt is None else _numbers("prompt", options.prompt),
        "new_tokens": new_tokens,
        "runs": runs,
        "threads": None if options.threads is None else _numbers("threads", options.threads, 1)[0],
    }


def _numbers(name: str, text: str, most: int | None = None) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or (most is not None and len(numbers) > most):
        what = "a whole number" if most == 1 else "whole numbers, such as 128,512"
        raise UserError(f"--{name} expects {what}; got {text!r}.")
    return numbers
