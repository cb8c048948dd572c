"""The verb `selfpruner verify`."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfpruner_hub.cli.options import Result, quieten

if TYPE_CHECKING:
    from exporters.verify import Comparison, Verification

DEFAULT_PROMPT, NEW_TOKENS = "The capital of France is", 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("export", type=Path, metavar="EXPORT", help="a directory that selfpruner export wrote")
    parser.add_argument(
        "--model", metavar="MODEL_OR_DIR", help="the model that was exported (default: the one that its record names)"
    )
    parser.add_argument(
        "--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="text to go on from (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=NEW_TOKENS, metavar="N", help="greedy tokens after it (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model, if it is a Hub repository")
    parser.add_argument("--gguf-file", metavar="FILE", help="load the model's weights from this GGUF file of it")


def run(options: argparse.Namespace) -> Result:
    """Compare an export with its PyTorch model.

    Args:
        options: Parsed command line.

    Returns:
        Both sides, or JSON; with a note and status 1 where an export differs by more than its tolerance.

    Raises:
        UserError: There is no export or no model, the model is another one, or the runtime is missing.
        ExportError: llama.cpp reads the prompt as other tokens than the model does.
    """
    from exporters.verify import verify
    from selfpruner_hub.progress import Bars

    quieten(options)
    loading = {name: value for name in ("revision", "gguf_file") if (value := getattr(options, name)) is not None}
    with Bars(not options.quiet) as progress:
        verification = verify(
            options.export, options.prompt, options.new_tokens, options.model, loading=loading, progress=progress
        )
    text = _as_json(verification) if options.json else _side_by_side(verification)
    return Result(text) if verification.failure is None else Result(text, str(verification.failure), status=1)


def _as_json(verification: Verification) -> str:
    values: dict[str, Any] = asdict(verification)
    for file in values["files"]:
        if not math.isfinite(file["difference"]):
            file["difference"] = None  # JSON has no NaN
    failure = verification.failure
    error = {} if failure is None else {"error": failure.message, "hint": failure.hint}
    return json.dumps({**error, "verified": failure is None, **values}, allow_nan=False)


def _side_by_side(verification: Verification) -> str:
    texts = {
        "prompt": verification.prompt,
        "PyTorch": verification.text,
        **{file.file: file.text for file in verification.files},
    }
    widest = max(map(len, texts))
    lines = [f"{name:{widest}}  {text!r}" for name, text in texts.items()]
    return "\n".join([*lines, *(_line(file, len(verification.tokens)) for file in verification.files)])


def _line(file: Comparison, count: int) -> str:
    same = (
        f"all {count} tokens are PyTorch's"
        if file.differs_at is None
        else f"token {file.differs_at + 1} of {count} is the first that is not PyTorch's"
    )
    difference = (
        f"KL divergence from PyTorch with rounded weights {file.difference:.1e}"
        if file.measured == "KL divergence"
        else f"a {file.measured} differs from PyTorch's float32 by {file.difference:.1e} at most"
    )
    return f"{file.file}: {same}; {difference} ({file.tolerance:.1e} is allowed)"
