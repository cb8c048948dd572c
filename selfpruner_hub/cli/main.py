"""The parser and the entry point of the command line. Results go to stdout, progress and errors to stderr.

Exit status: 0 for success, 2 for a user's mistake, 1 for a failure, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from selfpruner_hub.cli import benchmark as cli_benchmark
from selfpruner_hub.cli import evaluate as cli_evaluate
from selfpruner_hub.cli import export as cli_export
from selfpruner_hub.cli import prune as cli_prune
from selfpruner_hub.cli import publish as cli_publish
from selfpruner_hub.cli import recover as cli_recover
from selfpruner_hub.cli import verify as cli_verify
from selfpruner_hub.cli.options import from_pretrained, loading, number, path, quieten, verb
from selfpruner_hub.errors import SelfPrunerError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status.

    Args:
        arguments: Arguments after `selfpruner`; None uses those of the process.

    Returns:
        0 for success, 2 for a user's mistake, 1 for a failure, 130 when interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except UserError as error:
        return _complain(error, options, 2)
    except SelfPrunerError as error:
        return _complain(error, options, 1)
    except (RuntimeError, MemoryError) as error:
        from selfpruner_hub.models.devices import out_of_memory

        if (told := out_of_memory(error)) is None:
            raise
        return _complain(told, options, 1)
    except KeyboardInterrupt:
        print(f"\nselfpruner: interrupted. {getattr(options, 'kept', '')}".strip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status or 0


def _complain(error: SelfPrunerError, options: argparse.Namespace, status: int) -> int:
    if options.json:
        print(json.dumps({"error": error.message, "hint": error.hint}))
    print(f"selfpruner: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfpruner", description="Shrink a causal language model: cut, repair, recover."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    prune = verb(verbs, "prune", _prune, "search the rates of a model's layers, cut it, save it")
    cli_prune.add_arguments(prune)

    recover = verb(verbs, "recover", _recover, "distil a pruned model from its parent; never worse than before")
    cli_recover.add_arguments(recover)

    settings = verb(verbs, "settings", _settings, "list the settings that prune takes by --set, with their defaults")
    cli_prune.add_settings_arguments(settings)

    evaluate = verb(verbs, "evaluate", _evaluate, "measure perplexity, answers and tasks of a dense or pruned model")
    cli_evaluate.add_arguments(evaluate)
    from_pretrained(evaluate)

    push = verb(verbs, "push", _push, "publish a saved model on the Hub, with its card, and a Space to try it in")
    cli_publish.add_push_arguments(push)

    export = verb(verbs, "export", _export, "write a model in another format, and compare it with PyTorch")
    cli_export.add_arguments(export)

    verify = verb(verbs, "verify", _verify, "run an export beside its PyTorch model on a prompt, and compare them")
    cli_verify.add_arguments(verify)

    benchmark = verb(verbs, "benchmark", _benchmark, "time a pruned model beside its dense parent, in any runtime")
    cli_benchmark.add_arguments(benchmark)

    plot = verb(verbs, "plot", _plot, "draw the search curve, the population and the final rates")
    cli_publish.add_plot_arguments(plot)

    demo = verb(verbs, "demo", _demo, "prune a small embedded model, or open the demo Space on a saved one")
    demo.add_argument("directory", nargs="?", metavar="DIR", help="a saved model to open in the Space")
    demo.add_argument("--beta", type=number, default=0.3)
    demo.add_argument("--output", type=path, metavar="DIR", help="keep the pruned model here")
    return parser


def _prune(options: argparse.Namespace) -> None:
    print(cli_prune.run(options))


def _recover(options: argparse.Namespace) -> None:
    print(cli_recover.run(options))


def _settings(options: argparse.Namespace) -> None:
    print(cli_prune.list_settings(options))


def _evaluate(options: argparse.Namespace) -> None:
    print(cli_evaluate.run(options, loading(options)))


def _push(options: argparse.Namespace) -> None:
    text, note = cli_publish.push(options)
    print(text)
    if note:
        print(f"selfpruner: {note}", file=sys.stderr)


def _export(options: argparse.Namespace) -> None:
    print(cli_export.run(options))


def _verify(options: argparse.Namespace) -> int:
    text, failure = cli_verify.run(options)
    print(text)
    if failure is None:
        return 0
    print(f"selfpruner: {failure}", file=sys.stderr)
    return 1


def _benchmark(options: argparse.Namespace) -> None:
    print(cli_benchmark.run(options))


def _plot(options: argparse.Namespace) -> None:
    print(cli_publish.plot(options))


def _demo(options: argparse.Namespace) -> None:
    from selfpruner_hub.cli import demo

    quieten(options)
    if options.directory:
        demo.open_space(options.directory)
        return
    demo.run(print, options.beta, options.output, progress=not options.quiet)
