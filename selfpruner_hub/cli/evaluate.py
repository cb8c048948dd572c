"""The verb `selfpruner evaluate`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfpruner_hub.cli.options import Result, from_pretrained, loading, quieten
from selfpruner_hub.errors import DataError, ModelError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from selfpruner_hub.calibration.corpus import Corpus
    from selfpruner_hub.evaluation.chat import ChatMeasure
    from selfpruner_hub.evaluation.metrics import Teacher
    from selfpruner_hub.progress import Bars, Progress
    from selfpruner_hub.storage.model_record import Metric, Record

logger = logging.getLogger(__name__)
HALF = "report"
"""Name of the half of the plain questions that no setting was chosen on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("model", metavar="MODEL_OR_DIR")
    parser.add_argument(
        "--data", help="perplexity on wikitext2 (test split) or c4 (validation split), or a .txt or .jsonl file "
        "(default without tasks: wikitext2)",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=int, metavar="W", help="tokens a window: papers take 2048 or 128 (default: 2048, or as "
        "many as the model was made to read)",
    )  # fmt: skip
    parser.add_argument(
        "--windows", type=int, metavar="N", help="only the first N windows (default: all, or 256 of c4)"
    )
    parser.add_argument("--tasks", metavar="T,…", help="zero-shot tasks: seven (the paper's), or their names")
    parser.add_argument("--tasks-dir", type=Path, metavar="DIR", help="read their items from DIR/TASK.jsonl")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the likelihoods of items here, to go on from")
    parser.add_argument(
        "--no-chat", dest="chat", action="store_false", help="of a model with a chat template, leave out what is "
        "measured by default: plain questions and, with --against, conversations",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="MODEL", help="the dense parent: the same figures of it, and how near the model is to it"
    )
    parser.add_argument("--against-gguf-file", metavar="FILE", help="load its weights from this GGUF file of it")
    parser.add_argument(
        "--save", action="store_true", help="write the figures into the record and the card of MODEL_OR_DIR as well"
    )
    from_pretrained(parser)


def run(options: argparse.Namespace) -> Result:
    """Evaluate a model.

    Args:
        options: Parsed command line.

    Returns:
        One line per figure, or JSON.

    Raises:
        UserError: An option is wrong, or the model, the text or the items cannot be loaded. Figures of the model that
            were measured before are printed, and saved if asked for.
    """
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit expects a whole number above 0; got {options.limit}.")

    from selfpruner_hub.evaluation.tasks import check_tasks, named
    from selfpruner_hub.models.devices import described
    from selfpruner_hub.models.loading import load_config, load_model
    from selfpruner_hub.models.patching import working_on
    from selfpruner_hub.progress import Bars
    from selfpruner_hub.storage.model_record import read_record

    quieten(options)
    tasks = named(options.tasks) if options.tasks is not None else []
    if tasks:
        check_tasks(tasks, options.tasks_dir)
    record = read_record(Path(options.model)) if options.save else None
    arguments = loading(options)
    metrics: dict[str, Metric] = {}
    try:
        with Bars(not options.quiet) as progress:
            parent = None
            if options.against is not None:
                load_config(options.model, **arguments)  # its errors come first; only one model is in memory at a time
                parent = _parent(options, tasks, record, progress)
            model, tokenizer = load_model(options.model, **arguments)
            progress.say(f"{options.model} on {described(model)}")
            with working_on(model):
                for measured in _metrics(options, tasks, model, tokenizer, progress, parent):
                    metrics |= {name: _beside(name, metric, parent) for name, metric in measured.items()}
    except (Exception, KeyboardInterrupt):
        if metrics:  # they may have taken hours
            print(_told(options, metrics))
        raise
    return Result(_told(options, metrics))


def _told(options: argparse.Namespace, metrics: dict[str, Metric]) -> str:
    """Save the figures if asked for, and return them as lines or as JSON."""
    from selfpruner_hub.hub.card import save_metrics

    if options.save:
        saved = save_metrics(Path(options.model), metrics)
        metrics = {name: saved.metrics[name] for name in metrics}
    if options.json:
        return json.dumps({"metrics": {name: asdict(metric) for name, metric in metrics.items()}})
    return "\n".join(_line(name, metric) for name, metric in metrics.items())


@dataclass(frozen=True)
class _Parent:
    """Results of the dense model, which is no longer in memory."""

    figures: dict[str, Metric]
    vocabulary: dict[str, int] | None
    teacher: Teacher | None
    """Most likely next tokens on the text, with probabilities; None where no text is read."""
    chat: ChatMeasure | None
    right: list[bool] | None
    """Whether the dense model answers each plain question correctly."""


def _parent(options: argparse.Namespace, tasks: list[str], record: Record | None, progress: Bars) -> _Parent:
    """Load the dense model, check that it is the parent in the record, and measure it."""
    from selfpruner_hub.models.devices import described
    from selfpruner_hub.models.loading import load_model
    from selfpruner_hub.models.patching import working_on
    from selfpruner_hub.models.weights import identity_of
    from selfpruner_hub.provenance import check_parent, revision_of

    files: dict[str, Any] = revision_of(record, options.against) if record is not None else {}
    files |= {"gguf_file": options.against_gguf_file} if options.against_gguf_file else {}
    arguments = loading(options)
    placement = {key: arguments[key] for key in ("device", "device_map", "dtype") if key in arguments}
    if record is not None and placement.get("dtype") == "auto":  # that of the run, so that weights are compared
        placement["dtype"] = record.parent.get("dtype", "auto")
    model, tokenizer = load_model(options.against, **placement, **files)
    if record is not None:
        check_parent(record, identity_of(model), options.against)
    progress.say(f"{options.against} on {described(model)}")
    with working_on(model):
        return _measured_parent(options, tasks, model, tokenizer, progress)


def _measured_parent(
    options: argparse.Namespace,
    tasks: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> _Parent:
    from selfpruner_hub.evaluation.chat import ChatMeasure
    from selfpruner_hub.evaluation.figures import conversation_figures, question_figures, text_figures
    from selfpruner_hub.evaluation.metrics import teach
    from selfpruner_hub.evaluation.questions import load_questions, rightly_answered

    figures: dict[str, Metric] = {}
    chat: ChatMeasure | None = None
    right: list[bool] | None = None
    corpus = _corpus(options, tasks, model, tokenizer)  # what is wrong with it is told before anything is generated
    if tokenizer is not None and _chats(options, tokenizer):
        try:
            chat = ChatMeasure(model, tokenizer, progress=progress)
        except DataError as error:
            raise DataError(error.message, "Leave conversations out with --no-chat.") from error
        right = rightly_answered(model, tokenizer, load_questions(HALF), progress)
        figures |= {**question_figures(model, right, HALF), **conversation_figures(model, chat)}
    if corpus is not None:
        figures |= text_figures(model, corpus)
    for scored in _tasks(options, tasks, options.against, model, tokenizer):
        figures |= scored
    vocabulary = None if tokenizer is None else tokenizer.get_vocab()
    teacher = None if corpus is None else teach(model, corpus.windows, counted=corpus.counted)
    return _Parent(figures, vocabulary, teacher, chat, right)


def _metrics(
    options: argparse.Namespace,
    tasks: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
    parent: _Parent | None,
) -> Iterator[dict[str, Metric]]:
    """Yield the figures of one measurement after another; divergence needs two models with the same vocabulary."""
    from selfpruner_hub.evaluation.figures import conversation_figures, question_figures, text_figures
    from selfpruner_hub.evaluation.questions import load_questions, rightly_answered

    corpus = _corpus(options, tasks, model, tokenizer)
    comparable = parent if parent and tokenizer is not None and parent.vocabulary == tokenizer.get_vocab() else None
    if parent and not comparable:
        logger.warning("The two models have other vocabularies, so that divergence and agreement are left out.")
    if tokenizer is not None and _chats(options, tokenizer):
        right = rightly_answered(model, tokenizer, load_questions(HALF), progress)
        yield question_figures(model, right, HALF, parent.right if parent else None)
        if comparable and comparable.chat:
            yield conversation_figures(model, comparable.chat)
    if corpus is not None:
        yield text_figures(model, corpus, comparable.teacher if comparable else None)
    yield from _tasks(options, tasks, options.model, model, tokenizer)


def _chats(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> bool:
    from selfpruner_hub.calibration.chat_template import has_chat_template

    return bool(options.chat) and has_chat_template(tokenizer)


def _corpus(
    options: argparse.Namespace, tasks: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Corpus | None:
    """Return the text for perplexity; None where only tasks are requested."""
    from selfpruner_hub.calibration.corpus import consecutive_windows
    from selfpruner_hub.evaluation.figures import window_of
    from selfpruner_hub.models.forward import check_ids

    if options.data is None and tasks:
        return None
    window = window_of(model, options.window)
    corpus = consecutive_windows(options.data or "wikitext2", tokenizer, window, options.windows)
    check_ids(model, int(corpus.windows.max()))
    return corpus


def _tasks(
    options: argparse.Namespace,
    tasks: list[str],
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[dict[str, Metric]]:
    """Yield the figures of one task after another."""
    from selfpruner_hub.evaluation.figures import task_figures
    from selfpruner_hub.evaluation.tasks import evaluate_tasks

    for task in tasks:
        if tokenizer is None:
            raise ModelError(f"{name!r} has no tokenizer, and tasks need one.", "Copy the model's tokenizer beside it.")
        scores = evaluate_tasks(
            model,
            tokenizer,
            [task],
            directory=options.tasks_dir,
            limit=options.limit,
            cache=options.cache,
            progress=not options.quiet,
        )
        yield task_figures(model, scores, limited=options.limit is not None)


def _beside(name: str, metric: Metric, parent: _Parent | None) -> Metric:
    """Add the parent's value to a figure; a divergence from the parent has none."""
    dense = parent.figures.get(name) if parent and not name.startswith("KL ") else None
    return metric if dense is None else replace(metric, dense=dense.value)


def _line(name: str, metric: Metric) -> str:
    beside = "" if metric.dense is None else f", dense {metric.dense:g}"
    return f"{name} {metric.value:g}{beside} ({metric.dataset}: {metric.protocol})"
