"""The command line: one verb each. Results go to stdout, progress and errors to stderr.

Exit status: 0; 2 for a user's mistake; 1 for a failure; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfpruner_hub.cli import benchmark as cli_benchmark
from selfpruner_hub.cli import evaluate as cli_evaluate
from selfpruner_hub.cli import export as cli_export
from selfpruner_hub.errors import OutputError, SelfPrunerError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status.

    Args:
        arguments: The words after `selfpruner`; None takes those of the process.

    Returns:
        0, or 2 for a user's mistake, 1 for a failure, 130 when interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        _quieten(options)
        options.run(options)
    except UserError as error:
        return _complain(error, options, 2)
    except SelfPrunerError as error:
        return _complain(error, options, 1)
    except KeyboardInterrupt:
        print(f"\nselfpruner: interrupted. {getattr(options, 'kept', '')}".strip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _quieten(options: argparse.Namespace) -> None:
    """Our own progress says what is going on; transformers' bars for every file would drown it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if options.quiet:
        logging.set_verbosity_error()


def _complain(error: SelfPrunerError, options: argparse.Namespace, status: int) -> int:
    if options.json:
        print(json.dumps({"error": error.message, "hint": error.hint}))
    print(f"selfpruner: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfpruner", description="Shrink a causal language model without retraining."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    prune = _verb(verbs, "prune", _prune, "search the rates of a model's layers, cut it, save it")
    prune.add_argument("model", metavar="MODEL", help="a directory or a Hub repository")
    prune.add_argument("--beta", required=True, type=_number, help="mean fraction of weights to remove, 0 < β < 1")
    prune.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the pruned model goes")
    prune.add_argument(
        "--base-model", metavar="REPO", help="the Hub repository that the directory MODEL is a copy of, for the record"
    )
    prune.add_argument("--preset", default="default", help="default, or paper (default: %(default)s)")
    prune.add_argument("--data", default="wikitext2", help="wikitext2, c4, self, or a .txt or .jsonl file")
    prune.add_argument("--proposer", default="self", help="self, evolution, random, or the URL of an endpoint")
    prune.add_argument("--proposer-model", metavar="M", help="name of the model at the endpoint")
    prune.add_argument("--fitness", help="kl or perplexity")
    prune.add_argument("--evaluations", type=_number, metavar="N", help="budget, in full-evaluation equivalents")
    prune.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    prune.add_argument("--run-dir", type=Path, metavar="DIR", help="where the journal lives (default: OUTPUT.run)")
    prune.add_argument(
        "--offload", action="store_true", help="keep weights and statistics in files, for a model larger than memory"
    )
    prune.add_argument("--executor", metavar="ray", help="score candidates on Ray workers (default: in this process)")
    prune.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting of the method"
    )
    _from_pretrained(prune)

    evaluate = _verb(verbs, "evaluate", _evaluate, "measure perplexity and zero-shot tasks of a dense or pruned model")
    cli_evaluate.add_arguments(evaluate)
    _from_pretrained(evaluate)

    push = _verb(verbs, "push", _push, "publish a saved model on the Hub, with its card, and a Space to try it in")
    push.add_argument("directory", metavar="DIR", type=Path, help="a saved model")
    push.add_argument("repo", metavar="REPO", help="where it goes: NAME, or NAMESPACE/NAME")
    push.add_argument("--space", action="store_true", help="publish the demo Space REPO-demo too")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="push to this branch (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument(
        "--with",
        dest="exports",
        nargs="+",
        default=[],
        metavar="FORMAT",
        help="export to these first, into DIR, and publish them too: onnx, gguf, …",
    )

    card = _verb(verbs, "card", _card, "write the card that push would publish, with its pictures")
    card.add_argument("directory", metavar="DIR", type=Path, help="a saved model")
    card.add_argument("repo", metavar="REPO", help="where it is, or will be, published: NAMESPACE/NAME")
    card.add_argument("--output", required=True, type=Path, metavar="DIR", help="such as model_cards/NAME")

    export = _verb(verbs, "export", _export, "write a model in another format, and compare it with PyTorch")
    cli_export.add_arguments(export)

    benchmark = _verb(verbs, "benchmark", _benchmark, "time a pruned model beside its dense parent, in any runtime")
    cli_benchmark.add_arguments(benchmark)

    plot = _verb(verbs, "plot", _plot, "draw the search curve, the population and the final rates")
    plot.add_argument("directory", metavar="RUN_OR_DIR", type=Path, help="what holds search.jsonl")
    plot.add_argument("--output", type=Path, metavar="DIR", help="where the pictures go (default: RUN_OR_DIR/plots)")

    demo = _verb(verbs, "demo", _demo, "prune a small embedded model, or open the demo Space on a saved one")
    demo.add_argument("directory", nargs="?", metavar="DIR", help="a saved model to open in the Space")
    demo.add_argument("--beta", type=_number, default=0.3)
    demo.add_argument("--output", type=Path, metavar="DIR", help="keep the pruned model here")
    return parser


def _verb(verbs: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)
    return parser


def _from_pretrained(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--gguf-file", metavar="FILE", help="load the weights from this GGUF file of MODEL")


def _number(text: str) -> Any:
    """A number, or the text itself for the package to refuse with its own message."""
    try:
        return float(text)
    except ValueError:
        return text


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    named = {"dtype": options.dtype, "revision": options.revision, "gguf_file": options.gguf_file}
    return {key: value for key, value in named.items() if value is not None}


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set expects NAME=VALUE; got {pair!r}.")
        if name in ("preset", "fitness", "evaluations"):
            raise UserError(f"{name} has an option of its own.", f"Use --{name} {value}.")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        settings[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return settings


def _prune(options: argparse.Namespace) -> None:
    from selfpruner_hub.plans.budget import check_beta
    from selfpruner_hub.settings import resolve
    from selfpruner_hub.storage.staging import check_writable

    settings = _settings(options.set)
    check_beta(options.beta)  # before the seconds that torch and a model take
    resolve(options.preset, fitness=options.fitness, evaluations=options.evaluations, **settings)
    check_writable(options.output)
    if options.output.exists() and Path(options.model).exists() and options.output.samefile(options.model):
        raise OutputError("The output would replace the model that is pruned.", "Choose another output.")
    run_dir = options.run_dir or Path(f"{options.output.resolve()}.run")
    options.kept = f"What was scored is in {run_dir}: the same command again goes on from there."

    from selfpruner_hub.pruner import AutoPruner
    from selfpruner_hub.search.journal import FILE_NAME as JOURNAL_NAME

    offload = {"offload_folder": run_dir} if options.offload else {}
    pruner = AutoPruner.from_pretrained(options.model, base_model=options.base_model, **offload, **_loading(options))
    pruned = pruner.prune(
        options.beta,
        preset=options.preset,
        proposer=options.proposer,
        proposer_model=options.proposer_model,
        data=options.data,
        fitness=options.fitness,
        evaluations=options.evaluations,
        seed=options.seed,
        run_dir=run_dir,
        executor=options.executor,
        progress=not options.quiet,
        **settings,
    )
    pruned.save_pretrained(options.output)
    if options.run_dir is None:
        with contextlib.suppress(OSError):
            (run_dir / JOURNAL_NAME).unlink()  # it is in the output now
            run_dir.rmdir()  # where it is empty: what else is there is not ours
    report = pruned.report
    if options.json:
        print(json.dumps({"output": str(options.output), **asdict(report)}))
        return
    dense, left = report.parameters["dense"], report.parameters["pruned"]
    print(f"{options.output}: {left:,} of {dense:,} parameters, β = {report.achieved_beta:.4f}")
    if elsewhere := report.proposer["gains"].get("elsewhere"):
        (seed, found), name = report.proposer["gains"]["selected_on"], report.method["fitness"]
        print(
            f"search: {name} {seed:.4f} -> {found:.4f} from the best seed on; on text that it did not select on, "
            f"{elsewhere[0]:.4f} -> {elsewhere[1]:.4f}"
        )
    replies = report.proposer["replies"]
    if replies.get("replaced"):
        print(
            f"{replies['replaced']} proposals were classical children in place of unusable or repeated replies of "
            f"{report.proposer['name']}: {options.output / 'search.jsonl'} says why."
        )


def _evaluate(options: argparse.Namespace) -> None:
    print(cli_evaluate.run(options, _loading(options)))


def _push(options: argparse.Namespace) -> None:
    from huggingface_hub.utils.tqdm import enable_progress_bars

    from selfpruner_hub.hub.publish import publish

    if not options.quiet:
        enable_progress_bars()
    done = publish(
        options.directory,
        options.repo,
        private=True if options.private else None,
        revision=options.revision,
        create_pr=options.create_pr,
        space=options.space,
        exports=options.exports,
    )
    if options.json:
        print(json.dumps(asdict(done)))
        return
    print(done.url if done.changed else f"{done.url} (it was up to date)")
    if done.space:
        print(done.space)


def _card(options: argparse.Namespace) -> None:
    from selfpruner_hub.hub.bundle import CARD, write_card

    write_card(options.directory, options.repo, options.output)
    written = str(options.output / CARD)
    print(json.dumps({"card": written}) if options.json else written)


def _export(options: argparse.Namespace) -> None:
    print(cli_export.run(options))


def _benchmark(options: argparse.Namespace) -> None:
    print(cli_benchmark.run(options))


def _plot(options: argparse.Namespace) -> None:
    from selfpruner_hub.hub.plots import plot_search

    written = [str(path) for path in plot_search(options.directory, options.output or options.directory / "plots")]
    print(json.dumps({"files": written}) if options.json else "\n".join(written))


def _demo(options: argparse.Namespace) -> None:
    from selfpruner_hub.cli import demo

    if options.directory:
        demo.open_space(options.directory)
        return
    demo.run(print, options.beta, options.output, progress=not options.quiet)
