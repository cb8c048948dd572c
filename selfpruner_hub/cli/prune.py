"""The verbs `selfpruner prune` and `selfpruner settings`, which lists what `prune --set` takes."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path

from exporters.format import metered
from selfpruner_hub.cli.options import from_pretrained, listed, loading, number, path, quieten, settings_of
from selfpruner_hub.cli.recover import told
from selfpruner_hub.errors import OutputError, UserError
from selfpruner_hub.settings import (
    PRESETS,
    SEARCH,
    DescribedSetting,
    check_minutes,
    check_seed,
    explained,
    proposer_options,
    resolve,
)

OWN_OPTIONS = ("fitness", "evaluations")
"""Names of the settings that have their own option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub repository")
    made = parser.add_argument_group("what is made")
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument("--beta", type=number, help="mean fraction of weights to remove, 0 < β < 1")
    asked.add_argument(
        "--target", metavar="NAME=VALUE",
        help="in place of it: speedup=1.5, latency=MS, memory=200MB or kv_cache=0.5 (or bytes a token) in the runtime",
    )  # fmt: skip
    made.add_argument("--runtime", help=f"of the target: {listed(metered())} (default: torch)")
    made.add_argument("--python", type=Path, metavar="PATH", help="the Python of vLLM's environment (vllm only)")
    made.add_argument(
        "--request", metavar="P+N",
        help="tokens of the prompt and of the answer that the target's time is for (default: 128+32)",
    )  # fmt: skip
    made.add_argument("--output", required=True, type=path, metavar="DIR", help="where the pruned model goes")
    made.add_argument("--overwrite", action="store_true", help="replace a model in DIR that selfpruner did not write")
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--base-model", metavar="REPO", help="the Hub repository that the directory MODEL is a copy of, for the record"
    )
    from_pretrained(model)
    model.add_argument(
        "--offload", action="store_true", help="keep weights and statistics in files, for a model larger than memory"
    )
    text = parser.add_argument_group("the text of calibration and search")
    text.add_argument(
        "--data",
        help="chat, self, wikitext2, c4, or a .txt or .jsonl file; several with + between them (default: "
        "chat+wikitext2 for a chat model, else wikitext2)",
    )
    searching = parser.add_argument_group("the search")
    searching.add_argument(
        "--evaluations", type=number, metavar="N",
        help="length, in evaluations on the whole text; 0 takes the best starting point "
        f"(default: 0; paper: {PRESETS['paper'].schedule.evaluations}; {SEARCH} with a proposer)",
    )  # fmt: skip
    searching.add_argument("--fitness", help="kl or perplexity (default: kl; paper: perplexity)")
    searching.add_argument(
        "--proposer",
        help="self (the model), evolution, slopes, random, another model, or an endpoint's URL; one that is given "
        "searches (default: self, where --evaluations or the preset ask for a search)",
    )  # fmt: skip
    searching.add_argument("--proposer-model", metavar="M", help="name of the model at the endpoint")
    searching.add_argument(
        "--proposer-option", action="append", default=[], metavar="NAME=VALUE",
        help="of a language model that proposes: temperature, templates; of an endpoint: request_limit, token_limit, "
        "token_price",
    )  # fmt: skip
    searching.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    searching.add_argument("--run-dir", type=path, metavar="DIR", help="where the journal lives (default: OUTPUT.run)")
    searching.add_argument(
        "--executor", metavar="ray", help="score candidates on Ray workers (default: in this process)"
    )
    method = parser.add_argument_group("the method")
    method.add_argument(
        "--preset", help=f"{', '.join(PRESETS)} (default: default; with --minutes what fits)"
    )  # fmt: skip
    method.add_argument(
        "--minutes",
        type=number,
        metavar="N",
        help="minutes in all: the preset that fits, and recovery until they are over",
    )
    method.add_argument(
        "--recover", type=number, metavar="N", help="minutes of recovery after the cut, as of the verb recover; 0 "
        "trains nothing (default: none, or what is left of --minutes)",
    )  # fmt: skip
    method.add_argument(
        "--uniform", action="store_true", help="one FFN width for all layers, and all attention: a stock model"
    )
    method.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="any other setting; `selfpruner settings` lists them with their defaults",
    )  # fmt: skip


def run(options: argparse.Namespace) -> str:
    """Prune a model and save it.

    Args:
        options: Parsed command line; its attribute `kept` is set to the message for an interrupted run.

    Returns:
        Text to print: a few lines, or JSON.

    Raises:
        UserError: An option is wrong, or the model or the text cannot be loaded.
        OutputError: The output cannot be written.
    """
    from selfpruner_hub.plans.target import check_beta, needs_target, parse_target, target_of
    from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE
    from selfpruner_hub.storage.run_lock import default_run_dir, output_lock
    from selfpruner_hub.storage.staging import check_replaceable, check_writable

    settings = settings_of(options.set, ("preset", *OWN_OPTIONS)) | ({"uniform": True} if options.uniform else {})
    asking = settings_of(options.proposer_option)
    # All that is wrong is said before torch and the model are loaded, which takes seconds.
    request = None if options.request is None else _request(options.request)
    if options.target is None:
        check_beta(options.beta)
        needs_target(options.runtime or options.python, request)
        wanted = target = None
    else:
        wanted = parse_target(options.target)
        target = target_of(wanted, options.runtime, request)
    check_seed(options.seed)
    check_minutes(options.minutes, options.recover, settings)
    resolve(options.preset, fitness=options.fitness, evaluations=options.evaluations, **settings)
    proposer_options(options.proposer, asking)
    check_writable(options.output)
    if options.output.exists() and Path(options.model).exists() and options.output.samefile(options.model):
        raise OutputError("The output would replace the model that is pruned.", "Choose another output.")
    check_replaceable(options.output, MODEL_RECORD_FILE, options.overwrite)
    run_dir = options.run_dir or default_run_dir(options.output)
    options.kept = f"What was scored is in {run_dir}: the same command again goes on from there."

    from selfpruner_hub.aim import meter_of
    from selfpruner_hub.pruner import AutoPruner
    from selfpruner_hub.search.journal import JOURNAL_FILE

    quieten(options)
    meter = None if target is None else meter_of(target.runtime, options.python)
    with output_lock(options.output, run_dir):
        pruner = AutoPruner.from_pretrained(
            options.model,
            base_model=options.base_model,
            offload_folder=run_dir if options.offload else None,
            **loading(options),
        )
        pruned = pruner.prune(
            options.beta,
            target=wanted,
            runtime=meter,
            request=request,
            preset=options.preset,
            proposer=options.proposer,
            proposer_model=options.proposer_model,
            proposer_options=asking,
            data=options.data,
            fitness=options.fitness,
            evaluations=options.evaluations,
            minutes=options.minutes,
            recover=options.recover,
            seed=options.seed,
            run_dir=run_dir,
            executor=options.executor,
            progress=not options.quiet,
            **settings,
        )
        pruned.save_pretrained(options.output, overwrite=options.overwrite)
        if options.run_dir is None:
            (run_dir / JOURNAL_FILE).unlink(missing_ok=True)  # it is in the output now
    report = pruned.report
    if options.json:
        return json.dumps({"output": str(options.output), **asdict(report)})
    dense, left = report.parameters["dense"], report.parameters["pruned"]
    lines = [f"{options.output}: {left:,} of {dense:,} parameters, β = {report.achieved_beta:.4f}"]
    if target is not None:
        known = report.method["target"]
        found = target.said(known["measured"]) if known["measured"] is not None else f"not ({known['why']})"
        lines.append(
            f"{options.target} in {known['runtime']}: predicted {target.said(known['predicted'])}, measured {found}"
        )
    lines += told(str(options.output), report)
    gains, name = report.proposer["gains"], report.method["fitness"]
    if "search_text" in gains and "unseen_text" in gains:
        own, unseen = ("{:.4f} -> {:.4f}".format(*gains[text]) for text in ("search_text", "unseen_text"))
        lines.append(f"search: {name} {own} from the best seed on; on unseen text, {unseen}")
        lines.append(report.search_verdict)
    replies = report.proposer["replies"]
    if replies.get("replaced"):
        lines.append(
            f"{replies['replaced']} proposals were classical children in place of unusable or repeated replies of "
            f"{report.proposer['name']}: {options.output / 'search.jsonl'} says why."
        )
    return "\n".join(lines)


def _request(text: str) -> tuple[int, int]:
    prompt, plus, new_tokens = text.partition("+")
    if not (plus and prompt.isdecimal() and new_tokens.isdecimal()):
        raise UserError(f"--request expects two numbers of tokens, such as 128+32; got {text!r}.")
    return int(prompt), int(new_tokens)


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument(
        "--preset",
        default="default",
        help=f"with the values of this preset: {', '.join(PRESETS)} (default: %(default)s)",
    )


def list_settings(options: argparse.Namespace) -> str:
    """List the settings that `selfpruner prune --set` takes.

    Args:
        options: Parsed command line.

    Returns:
        Text to print: each setting with its default, as `--set` takes it, and its meaning; or JSON.

    Raises:
        UserError: The preset is unknown.
    """
    found = explained(options.preset)
    settings = [setting for setting in found if setting.name.rpartition(".")[2] not in OWN_OPTIONS]
    if options.json:
        return json.dumps([asdict(setting) for setting in settings])
    width = min(100, shutil.get_terminal_size().columns)
    first = f"Settings of the preset {options.preset}. `selfpruner prune` changes one by --set NAME=VALUE."
    return "\n".join([first, *(_told(setting, width) for setting in settings)])


def _told(setting: DescribedSetting, width: int) -> str:
    value = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
    meaning = textwrap.fill(setting.meaning, width, initial_indent="    ", subsequent_indent="    ")
    return f"\n{setting.name}={value}\n{meaning}"
