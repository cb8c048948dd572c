"""The parser and the entry point of the command line. Results go to stdout, progress and errors to stderr.

Exit status: 0 for success, 2 for a user's mistake, 1 for a failure, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from selfpruner_hub.cli import benchmark, evaluate, export, prune, publish, recover, settings, verify
from selfpruner_hub.cli.options import Result, Verb, number, path, quieten
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
        return _printed(options.run(options))
    except UserError as error:
        return _complain(error, options, 2)
    except SelfPrunerError as error:
        return _complain(error, options, 1)
    except (RuntimeError, MemoryError) as error:
        from selfpruner_hub.models.devices import out_of_memory

        if (failure := out_of_memory(error)) is None:
            raise
        return _complain(failure, options, 1)
    except KeyboardInterrupt:
        print(f"\nselfpruner: interrupted. {getattr(options, 'resume_hint', '')}".strip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _printed(result: Result) -> int:
    """Print the result of a verb, and return its exit status."""
    if result.text:
        print(result.text)
    if result.note:
        print(f"selfpruner: {result.note}", file=sys.stderr)
    return result.status


def _complain(error: SelfPrunerError, options: argparse.Namespace, status: int) -> int:
    if status == 2 and int(os.environ.get("LOCAL_RANK", 0)):
        return status  # every process of a launcher meets a user's mistake, and the first one says it
    if options.json:
        print(json.dumps({"error": error.message, "hint": error.hint}))
    print(f"selfpruner: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfpruner", description="Shrink a causal language model: cut, repair, recover."
    )
    subparsers = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb.add_to(subparsers, name)
    return parser


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a saved model to open in the Space")
    parser.add_argument(
        "--beta",
        type=number,
        default=0.2,
        help="mean fraction of the prunable weights to remove (default: %(default)s)",
    )
    parser.add_argument("--output", type=path, metavar="DIR", help="keep the pruned model here")


def _demo(options: argparse.Namespace) -> Result:
    from selfpruner_hub.cli import demo  # it imports torch, which takes seconds

    if options.json:
        raise UserError("The demo has no JSON.", "Leave out --json.")
    quieten(options)
    if options.directory:
        demo.open_space(options.directory)
    else:
        demo.run_demo(print, options.beta, options.output, progress=not options.quiet)
    return Result()


VERBS = {
    "prune": Verb("measure what each layer can lose, cut, repair, save", prune.add_arguments, prune.run),
    "recover": Verb(
        "distil a pruned model from its parent, and keep it if it is better on held-out text",
        recover.add_arguments,
        recover.run,
    ),
    "settings": Verb(
        "list the settings that prune takes by --set, with their defaults", settings.add_arguments, settings.run
    ),
    "evaluate": Verb(
        "measure perplexity, answers and tasks of a dense or pruned model", evaluate.add_arguments, evaluate.run
    ),
    "push": Verb(
        "publish a saved model on the Hub, with its card, and a Space to try it in",
        publish.add_push_arguments,
        publish.push,
    ),
    "export": Verb("write a model in another format, and compare it with PyTorch", export.add_arguments, export.run),
    "verify": Verb(
        "run an export beside its PyTorch model on a prompt, and compare them", verify.add_arguments, verify.run
    ),
    "benchmark": Verb(
        "time a pruned model beside its dense parent, in any runtime", benchmark.add_arguments, benchmark.run
    ),
    "plot": Verb("draw the search curve, the population and the final rates", publish.add_plot_arguments, publish.plot),
    "demo": Verb("prune a small embedded model, or open the demo Space on a saved one", _add_demo_arguments, _demo),
}
"""Verbs by name, in the order of the help."""
