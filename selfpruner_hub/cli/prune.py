"""The verb `selfpruner prune`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.format import metered
from selfpruner_hub.cli.options import (
    Result,
    from_pretrained,
    listed,
    loading,
    number,
    path,
    quieten,
    settings_of,
    writer,
)
from selfpruner_hub.cli.recover import recovery_lines
from selfpruner_hub.errors import OutputError, UserError
from selfpruner_hub.settings import (
    PRESETS,
    SEARCH,
    check_minutes,
    check_seed,
    proposer_options,
    resolve,
)

if TYPE_CHECKING:
    from selfpruner_hub.plans.target import Target
    from selfpruner_hub.storage.model_record import Record

SETTINGS_WITH_OPTION = ("fitness", "evaluations")
"""Names of settings that have an option of their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub repository")
    _add_goal_and_output(parser.add_argument_group("what is made"))
    _add_model(parser.add_argument_group("the model"))
    _add_text(parser.add_argument_group("the text of calibration and search"))
    _add_search(parser.add_argument_group("the search"))
    _add_method(parser.add_argument_group("the method"))


def _add_goal_and_output(group: argparse._ArgumentGroup) -> None:
    goal = group.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--beta", type=number, help="mean fraction of prunable weights (attention, FFN) to remove, 0 < β < 1"
    )
    goal.add_argument(
        "--target", metavar="NAME=VALUE",
        help="in place of it: speedup=1.5, latency=MS, memory=200MB or kv_cache=0.5 (or bytes a token) in the runtime",
    )  # fmt: skip
    group.add_argument("--runtime", help=f"of the target: {listed(metered())} (default: torch)")
    group.add_argument("--python", type=Path, metavar="PATH", help="the Python of vLLM's environment (vllm only)")
    group.add_argument(
        "--request", metavar="P+N",
        help="tokens of the prompt and of the answer that the target's time is for (default: 128+32)",
    )  # fmt: skip
    group.add_argument("--output", required=True, type=path, metavar="DIR", help="where the pruned model goes")
    group.add_argument("--overwrite", action="store_true", help="replace a model in DIR that selfpruner did not write")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base-model", metavar="REPO", help="the Hub repository that the directory MODEL is a copy of, for the record"
    )
    from_pretrained(group)
    group.add_argument(
        "--offload", action="store_true", help="keep weights and statistics in files, for a model larger than memory"
    )


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        help="chat, self, wikitext2, c4, or a .txt or .jsonl file; several with + between them (default: "
        "chat+wikitext2 for a chat model, else wikitext2)",
    )
    writer(group)


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--evaluations", type=number, metavar="N",
        help="length, in evaluations on the whole text; 0 takes the best starting point "
        f"(default: 0; paper: {PRESETS['paper'].schedule.evaluations}; {SEARCH} with a proposer)",
    )  # fmt: skip
    group.add_argument("--fitness", help="kl or perplexity (default: kl; paper: perplexity)")
    group.add_argument(
        "--proposer",
        help="self (the model), evolution, slopes, random, another model, or an endpoint's URL; one that is given "
        "searches (default: self, where --evaluations or the preset ask for a search)",
    )  # fmt: skip
    group.add_argument("--proposer-model", metavar="M", help="name of the model at the endpoint")
    group.add_argument(
        "--proposer-option", action="append", default=[], metavar="NAME=VALUE",
        help="of a language model that proposes: temperature, templates; of an endpoint: request_limit, token_limit, "
        "token_price",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    group.add_argument("--run-dir", type=path, metavar="DIR", help="where the journal lives (default: OUTPUT.run)")


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: default; with --minutes what fits)")
    group.add_argument(
        "--minutes", type=number, metavar="N",
        help="minutes in all: the preset that fits, and recovery until they are over",
    )  # fmt: skip
    group.add_argument(
        "--recover", type=number, metavar="N", help="minutes of recovery after the cut, as of the verb recover, of "
        "--minutes where both are given; 0 trains nothing (default: none, or what is left of --minutes)",
    )  # fmt: skip
    group.add_argument(
        "--uniform", action="store_true", help="one FFN width for all layers, and all attention: a stock model"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="any other setting; `selfpruner settings` lists them with their defaults",
    )  # fmt: skip


def run(options: argparse.Namespace) -> Result:
    """Prune a model and save it.

    Args:
        options: Parsed command line; its attribute `resume_hint` is set to the message for an interrupted run.

    Returns:
        A few lines, or JSON.

    Raises:
        UserError: An option is wrong, or the model or the text cannot be loaded.
        OutputError: The output cannot be written.
    """
    order = _checked(options)  # before torch and the model are loaded, which takes seconds
    options.resume_hint = f"What was scored is in {order.run_dir}: the same command again goes on from there."
    quieten(options)
    record = _prune(options, order)
    if record is None:
        return Result()
    if options.json:
        return Result(json.dumps({"output": str(options.output), **asdict(record)}))
    return Result("\n".join(_summary(options, order.target, record)))


@dataclass(frozen=True)
class _Order:
    """The options of a run that are more than their text, checked."""

    settings: dict[str, Any]
    proposer_options: dict[str, Any]
    goal: dict[str, Any] | None
    """Quantity and value of the target, as `AutoPruner.prune` takes them; None for a β."""
    target: Target | None
    request: tuple[int, int] | None
    """Tokens of the prompt and of the answer; None for the default, and for a β."""
    run_dir: Path


def _checked(options: argparse.Namespace) -> _Order:
    """Check all options, in files and names too; nothing is loaded or written."""
    from selfpruner_hub.endpoint import check_writer
    from selfpruner_hub.plans.target import check_beta, needs_target, parse_target, target_of
    from selfpruner_hub.storage.run_lock import default_run_dir

    settings = settings_of(options.set, ("preset", *SETTINGS_WITH_OPTION)) | (
        {"uniform": True} if options.uniform else {}
    )
    of_proposer = settings_of(options.proposer_option, given="--proposer-option")
    request = None if options.request is None else _request(options.request)
    goal = None if options.target is None else parse_target(options.target)
    if goal is None:
        check_beta(options.beta)
        needs_target(options.runtime or options.python, request)
    target = None if goal is None else target_of(goal, options.runtime, request)
    check_seed(options.seed)
    check_minutes(options.minutes, options.recover)
    resolve(options.preset, fitness=options.fitness, evaluations=options.evaluations, **settings)
    proposer_options(options.proposer, of_proposer)
    check_writer(options.writer, options.writer_model)
    _check_output(options)
    run_dir = options.run_dir or default_run_dir(options.output)
    return _Order(settings, of_proposer, goal, target, request, run_dir)


def _check_output(options: argparse.Namespace) -> None:
    from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE
    from selfpruner_hub.storage.staging import check_replaceable, check_writable

    check_writable(options.output)
    if options.output.exists() and Path(options.model).exists() and options.output.samefile(options.model):
        raise OutputError("The output would replace the model that is pruned.", "Choose another output.")
    check_replaceable(options.output, MODEL_RECORD_FILE, options.overwrite)


def _prune(options: argparse.Namespace, order: _Order) -> Record | None:
    """Load the model, prune it, and save it; return the record of the pruned model, in the first process."""
    from selfpruner_hub.aim import meter_of
    from selfpruner_hub.pruner import AutoPruner
    from selfpruner_hub.ranks import from_first, is_first, joined, leave
    from selfpruner_hub.search.journal import JOURNAL_FILE
    from selfpruner_hub.storage.checkpoints import CHECKPOINTS
    from selfpruner_hub.storage.model_record import read_record
    from selfpruner_hub.storage.run_lock import output_lock

    meter = None if order.target is None else meter_of(order.target.runtime, options.python)
    with joined(options.device), ExitStack() as stack:
        first = is_first()
        options.quiet |= not first
        quieten(options)
        from_first(lambda: stack.enter_context(output_lock(options.output, order.run_dir)))
        pruner = AutoPruner.from_pretrained(
            options.model,
            base_model=options.base_model,
            offload_folder=order.run_dir if options.offload else None,
            **loading(options),
        )
        pruned = pruner.prune(
            options.beta,
            target=order.goal,
            runtime=meter,
            request=order.request,
            preset=options.preset,
            proposer=options.proposer,
            proposer_model=options.proposer_model,
            proposer_options=order.proposer_options,
            data=options.data,
            writer=options.writer,
            writer_model=options.writer_model,
            fitness=options.fitness,
            evaluations=options.evaluations,
            minutes=options.minutes,
            recover=options.recover,
            seed=options.seed,
            run_dir=order.run_dir,
            progress=not options.quiet,
            **order.settings,
        )
        if first:
            pruned.save_pretrained(options.output, overwrite=options.overwrite)
            if (
                options.run_dir is None and not (order.run_dir / CHECKPOINTS).exists()
            ):  # they stay where recovery failed
                (order.run_dir / JOURNAL_FILE).unlink(missing_ok=True)  # it is in the output now
    leave()
    return read_record(options.output) if first else None


def _summary(options: argparse.Namespace, target: Target | None, record: Record) -> list[str]:
    """Lines about the size, the target, the recovery and the search of a pruned model."""
    dense, left = record.parameters["dense"], record.parameters["pruned"]
    lines = [f"{options.output}: {left:,} of {dense:,} parameters, β = {record.achieved_beta:.4f}"]
    if target is not None:
        lines.append(f"{options.target} in {_reached(target, record.method['target'])}")
    lines += recovery_lines(str(options.output), record)
    gains, name = record.proposer["gains"], record.method["fitness"]
    if "search_text" in gains and "unseen_text" in gains:
        searched, unseen = ("{:.4f} -> {:.4f}".format(*gains[text]) for text in ("search_text", "unseen_text"))
        lines.append(f"search: {name} {searched} from the best seed on; on unseen text, {unseen}")
        lines.append(record.search_verdict)
    replies = record.proposer["replies"]
    if replies.get("replaced"):
        lines.append(
            f"{replies['replaced']} proposals were classical children in place of unusable or repeated replies of "
            f"{record.proposer['name']}: {options.output / 'search.jsonl'} says why."
        )
    return lines


def _reached(target: Target, recorded: dict[str, Any]) -> str:
    """Say what was predicted and measured of a target, from its part of the record."""
    value, runtime = recorded["measured"], recorded["runtime"]
    measured = f"not ({recorded['why']})" if value is None else target.said(value)
    return f"{runtime}: predicted {target.said(recorded['predicted'])}, measured {measured}"


def _request(text: str) -> tuple[int, int]:
    prompt, plus, new_tokens = text.partition("+")
    if not (plus and prompt.isdecimal() and new_tokens.isdecimal()):
        raise UserError(f"--request expects two numbers of tokens, such as 128+32; got {text!r}.")
    return int(prompt), int(new_tokens)
