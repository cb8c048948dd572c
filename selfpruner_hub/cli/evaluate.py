"""The verb `selfpruner evaluate`."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfpruner_hub.errors import ModelError, UserError

if TYPE_CHECKING:
    from selfpruner_hub.storage.model_record import Metric


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes.

    Args:
        parser: Of the verb.
    """
    parser.add_argument("model", metavar="MODEL_OR_DIR")
    parser.add_argument(
        "--data", help="perplexity on wikitext2 or c4 (test split), or a .txt or .jsonl file (default without tasks: "
        "wikitext2)",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=int, default=2048, metavar="W",
        help="tokens a window: papers take 2048 or 128 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--windows", type=int, metavar="N", help="only the first N windows")
    parser.add_argument("--tasks", metavar="T,…", help="zero-shot tasks: seven (the paper's), or their names")
    parser.add_argument("--tasks-dir", type=Path, metavar="DIR", help="read their items from DIR/TASK.jsonl")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the likelihoods of items here, to go on from")
    parser.add_argument("--against", metavar="MODEL", help="the dense parent: the same figures of it")
    parser.add_argument("--against-gguf-file", metavar="FILE", help="load its weights from this GGUF file of it")
    parser.add_argument(
        "--save", action="store_true", help="write the figures into the record and the card of MODEL_OR_DIR as well"
    )


def run(options: argparse.Namespace, loading: dict[str, Any]) -> str:
    """Evaluate.

    Args:
        options: The parsed command line.
        loading: Keywords of `from_pretrained` for the model.

    Returns:
        What is printed: a line a figure, or JSON.

    Raises:
        UserError: An option is wrong, or the model, the text or the items cannot be loaded.
    """
    from selfpruner_hub.evaluation.tasks import check_tasks, named
    from selfpruner_hub.hub.card import save_metrics
    from selfpruner_hub.storage.model_record import read_record

    tasks = named(options.tasks) if options.tasks is not None else []
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit expects a whole number above 0; got {options.limit}.")
    if tasks:
        check_tasks(tasks, options.tasks_dir)
    if options.save:
        read_record(Path(options.model))
    own = _figures(options, tasks, options.model, loading)
    dense: dict[str, Metric] = {}
    if options.against is not None:
        gguf = {"gguf_file": options.against_gguf_file} if options.against_gguf_file else {}
        dense = _figures(options, tasks, options.against, {"dtype": loading.get("dtype", "auto"), **gguf})
    metrics = {name: _beside(metric, dense.get(name)) for name, metric in own.items()}
    if options.save:
        save_metrics(Path(options.model), metrics)
    if options.json:
        return json.dumps({"metrics": {name: asdict(metric) for name, metric in metrics.items()}})
    return "\n".join(_line(name, metric) for name, metric in metrics.items())


def _figures(options: argparse.Namespace, tasks: list[str], name: str, loading: dict[str, Any]) -> dict[str, Metric]:
    from selfpruner_hub.calibration.corpus import consecutive_windows
    from selfpruner_hub.evaluation.metrics import perplexity
    from selfpruner_hub.evaluation.tasks import evaluate_tasks
    from selfpruner_hub.models.loading import load_model
    from selfpruner_hub.storage.model_record import Metric

    model, tokenizer = load_model(name, **loading)
    today, found = datetime.now(UTC).date().isoformat(), {}
    if options.data is not None or not tasks:
        corpus = consecutive_windows(options.data or "wikitext2", tokenizer, options.window, options.windows)
        found[f"perplexity ({options.window})"] = Metric(
            value=_rounded(perplexity(model, corpus.windows)),
            dense=None,
            protocol=f"{len(corpus.windows)} consecutive windows of {options.window} tokens, no overlap, "
            f"{str(model.dtype).removeprefix('torch.')}; sha256 of the text {corpus.sha256[:12]}",
            dataset=corpus.name,
            date=today,
        )
    if not tasks:
        return found
    if tokenizer is None:
        raise ModelError(f"{name!r} has no tokenizer, and tasks need one.", "Copy the model's tokenizer beside it.")
    scores = evaluate_tasks(
        model,
        tokenizer,
        tasks,
        directory=options.tasks_dir,
        limit=options.limit,
        cache=options.cache,
        progress=not options.quiet,
    )
    for score in scores:
        for figure, value in score.figures.items():
            found[f"{figure} ({score.task})"] = Metric(
                value=round(value, 4),
                dense=None,
                protocol=f"zero-shot, {'first ' if options.limit else ''}{score.items} items, ± "
                f"{score.errors[figure]:.4f}, lm-evaluation-harness {score.version}",
                dataset=score.source,
                date=today,
            )
    return found


def _rounded(value: float) -> float:
    """Three decimals; a perplexity without bound is said as such, since JSON has no infinity."""
    if not math.isfinite(value):
        raise UserError("The model's perplexity on this text is not a number.", "Its weights may be damaged.")
    return round(value, 3)


def _beside(metric: Metric, dense: Metric | None) -> Metric:
    return metric if dense is None else replace(metric, dense=dense.value)


def _line(name: str, metric: Metric) -> str:
    beside = "" if metric.dense is None else f", dense {metric.dense:g}"
    return f"{name} {metric.value:g}{beside} ({metric.dataset}: {metric.protocol})"
