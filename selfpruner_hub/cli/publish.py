"""The verbs `selfpruner push` and `selfpruner plot`, for a saved model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from selfpruner_hub.cli.options import Result, path, quieten


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("directory", metavar="DIR", type=Path, help="a saved model")
    parser.add_argument("repo", metavar="REPO", help="where it goes: NAME, or NAMESPACE/NAME")
    parser.add_argument(
        "--space",
        nargs="?",
        const="gradio",
        default=False,
        metavar="KIND",
        help="publish a Space too: gradio (REPO-demo, the default), or static (REPO-browser; makes ONNX graphs)",
    )
    parser.add_argument("--against", metavar="MODEL", help="static: the dense parent (default: the one of the record)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--with",
        dest="exports",
        nargs="+",
        default=[],
        metavar="FORMAT",
        help="export to these first, into DIR, and publish them too: onnx (into REPO-ONNX), gguf, …",
    )


def push(options: argparse.Namespace) -> Result:
    """Make the requested exports, then publish a saved model.

    Args:
        options: Parsed command line.

    Returns:
        The addresses, or JSON; with a note where a repository holds graphs of an earlier model.

    Raises:
        UserError: An option is wrong, a file holds a secret, or the Hub refuses.
        SavedModelError: The directory holds no complete pruned model, or an export of another one.
        HubError: The Hub is unreachable, or fails.
    """
    from huggingface_hub.utils.tqdm import enable_progress_bars

    from selfpruner_hub.hub.exports import make_exports
    from selfpruner_hub.hub.publish import STATIC, check_request, is_aside, publish

    quieten(options)
    if not options.quiet:
        enable_progress_bars()  # of the Hub, for uploads
    private = True if options.private else None
    aside = is_aside(options.create_pr, options.revision)
    check_request(space=options.space, create_pr=aside, private=private, exports=options.exports)
    make_exports(options.directory, options.exports, static=options.space == STATIC, parent=options.against)
    published = publish(
        options.directory,
        options.repo,
        private=private,
        revision=options.revision,
        create_pr=options.create_pr,
        space=options.space,
    )
    stale = published.stale_graphs
    note = f"{stale} holds ONNX graphs of an earlier model. Renew them by pushing with --with onnx." if stale else ""
    if options.json:
        return Result(json.dumps(asdict(published)), note)
    where = published.url if published.changed else f"{published.url} (it was up to date)"
    return Result("\n".join(filter(None, (where, published.graphs, published.space))), note)


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("directory", metavar="RUN_OR_DIR", type=Path, help="what holds search.jsonl")
    parser.add_argument("--output", type=path, metavar="DIR", help="where the pictures go (default: RUN_OR_DIR/plots)")


def plot(options: argparse.Namespace) -> Result:
    """Draw the plots of a search.

    Args:
        options: Parsed command line.

    Returns:
        The paths of the files, or JSON.

    Raises:
        RunMismatchError: The directory holds no journal of a search.
    """
    from selfpruner_hub.hub.plots import plot_search

    files = [str(path) for path in plot_search(options.directory, options.output or options.directory / "plots")]
    return Result(json.dumps({"files": files}) if options.json else "\n".join(files))
