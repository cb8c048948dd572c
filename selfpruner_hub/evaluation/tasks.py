"""Zero-shot tasks through lm-evaluation-harness, with items from the Hub or from files."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import has_chat_template
from selfpruner_hub.errors import DataError, MissingExtraError, UserError
from selfpruner_hub.models.devices import out_of_memory
from selfpruner_hub.models.weights import identity_of

SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The tasks of the paper (arXiv 2502.14413)."""
FORMS = {
    frozenset({"query", "choices", "gold"}): {"doc_to_choice": "choices", "doc_to_target": "gold"},
    # Partial evaluation, as in winogrande: the same ending is scored after each of two contexts.
    frozenset({"context_options", "continuation", "gold"}): {
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
}
"""Task settings of the harness, by the fields of an item in a file."""
_NEEDED = " or ".join(", ".join(sorted(form)) for form in FORMS)
CHOICE_FIGURES = ("acc", "acc_norm")
FIGURES = (
    *CHOICE_FIGURES,
    "exact_match",  # gsm8k, once for each way to extract the answer from the text
    *("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc"),  # ifeval
)
"""Figures of the harness that are kept; all are in [0, 1]."""
CHAT_TASKS = ("ifeval", "gsm8k")
"""Tasks that use the chat template if the model has one."""
BATCH_SIZE = 16
"""Number of requests in a forward pass."""
LIKELIHOODS = "float32"
"""Dtype of the likelihoods; in bfloat16, that of most models, different ones are rounded to the same value."""


@dataclass(frozen=True)
class TaskScore:
    """The score of a model on a task."""

    task: str
    items: int
    source: str
    """Source of the items: a dataset on the Hub, or the name of a file."""
    version: str
    """Version of lm-evaluation-harness."""
    figures: dict[str, float]
    """Figures of the task by name, from `FIGURES`, such as `acc_norm` (likelihood normalised by bytes); in [0, 1]."""
    errors: dict[str, float]
    """Standard error of each figure over the items; 0 if the harness gives none."""
    chat: bool = False
    """Whether the task was asked through the chat template."""


def named(tasks: str) -> list[str]:
    """Parse a list of tasks: `"seven"`, or names separated by commas.

    Args:
        tasks: Text from the user.

    Returns:
        The names, without repeats.

    Raises:
        UserError: There is no name.
    """
    names = SEVEN if tasks == "seven" else tuple(filter(None, map(str.strip, tasks.split(","))))
    if not names:
        raise UserError("No task was named.", "Use --tasks seven, or names with commas between them.")
    return list(dict.fromkeys(names))


def check_tasks(tasks: Sequence[str], directory: Path | None) -> None:
    """Check that the tasks can be run, before a model is loaded.

    Args:
        tasks: Names of tasks.
        directory: Directory of the task files; None reads the items from the Hub.

    Raises:
        MissingExtraError: lm-eval is not installed.
        DataError: A task file is missing or has another format, or a task of the harness gives none of `FIGURES`.
        UserError: The harness has no such task, or only a group or a tag of that name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval")
    if directory is not None:
        for task in tasks:
            _form(_file(directory, task))
    else:
        index = _manager(defaults=True).task_index
        for task in tasks:
            if task not in index:
                raise UserError(f"lm-evaluation-harness knows no task {task!r}.", f"Such as: {', '.join(SEVEN)}.")
            if (members := _members(index, task)) != [task]:
                few = ", ".join(members[:4])
                raise UserError(f"{task!r} stands for several tasks.", f"Name those that you mean, such as: {few}.")
            metrics = [each["metric"] for each in index[task].cfg.get("metric_list") or ()]
            if metrics and not any(metric in FIGURES for metric in metrics):
                raise _no_figure(task)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    directory: Path | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> list[TaskScore]:
    """Score a model on tasks, zero-shot.

    Tasks that the harness scores by likelihoods are asked as plain text; `CHAT_TASKS` use the chat template.

    Args:
        model: A causal language model, dense or pruned.
        tokenizer: Its tokenizer.
        tasks: Names of tasks in lm-evaluation-harness, or of files.
        directory: Directory with a `TASK.jsonl` per task, with items of one of `FORMS`; None reads them from the Hub.
        limit: Number of items per task, from the first; None uses all.
        cache: Directory that caches the model's answers, by its identity; the same call resumes from it.
        progress: Whether to show a progress bar on stderr.

    Returns:
        One score per task, in the order of `tasks`.

    Raises:
        MissingExtraError: lm-eval is not installed.
        UserError: `check_tasks` fails, a task needs a library that is missing, or a cache is asked for where weights
            are offloaded.
        DataError: The items cannot be loaded, or a task gives none of `FIGURES`.
        ModelError: Memory is too small.
    """
    check_tasks(tasks, directory)
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, softmax_dtype=LIKELIHOODS)
    if not progress:
        lm.loglikelihood = functools.partial(lm.loglikelihood, disable_tqdm=True)
        lm.generate_until = functools.partial(lm.generate_until, disable_tqdm=True)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        identity = identity_of(model)
        if identity["weights"] is None:
            raise UserError(
                "Answers of a model that is partly offloaded cannot be cached: its weights tell whose they are.",
                "Leave out --cache, or --device-map.",
            )
        cache /= f"{identity['weights'][:16]}-{identity['configuration'][:16]}-{identity['dtype']}-{LIKELIHOODS}"
    scores = []
    for task in tasks:
        task_or_config = task if directory is None else _config(task, _file(directory, task))
        chat = directory is None and task in CHAT_TASKS and has_chat_template(tokenizer)
        cache_path = None if cache is None else f"{cache}-{task}"
        try:
            report = evaluator.simple_evaluate(
                lm,
                tasks=[task_or_config],
                num_fewshot=0,
                apply_chat_template=chat,
                limit=limit,
                use_cache=cache_path,
                bootstrap_iters=1,
                log_samples=False,
                task_manager=_manager(defaults=directory is None),
            )  # standard errors of means need no bootstrap, but the harness gives none without it
        except ImportError as error:
            raise UserError(
                f"The task {task} needs {error.name or 'a library'}, which is not installed.",
                'Install it with: pip install "selfpruner-hub[eval]"',
            ) from error
        except Exception as error:  # the errors of the Hub's clients have no common base class
            if (short := out_of_memory(error)) is not None:
                raise short from error
            if directory is not None:
                raise
            raise DataError(
                f"Cannot load the items of {task} from the Hugging Face Hub ({type(error).__name__}).",
                "Check the network (or HF_ENDPOINT), or give files with --tasks-dir.",
            ) from error
        scores.append(_score(task, report, directory, chat))
    return scores


def _score(task: str, report: Any, directory: Path | None, chat: bool = False) -> TaskScore:
    from lm_eval import __version__

    results = report["results"][task]
    keys = [tuple(key.split(",", 1)) for key in results if key.partition(",")[0] in FIGURES]
    if not keys:
        raise _no_figure(task)
    named_keys = {figure if by == "none" else f"{figure}, {by}": (figure, by) for figure, by in keys}
    source = report["configs"][task]["dataset_path"] if directory is None else f"{task}.jsonl"
    return TaskScore(
        task,
        int(report["n-samples"][task]["effective"]),
        source,
        __version__,
        {name: float(results[f"{figure},{by}"]) for name, (figure, by) in named_keys.items()},
        {name: _number(results.get(f"{figure}_stderr,{by}")) for name, (figure, by) in named_keys.items()},
        chat,
    )


def _no_figure(task: str) -> DataError:
    return DataError(f"The task {task!r} gives none of the figures {', '.join(FIGURES)}.", "Leave it out.")


def _members(index: dict[str, Any], entry: Any) -> list[str]:
    """The tasks that an entry of the harness stands for: itself, or those of a group, of a tag or of a list."""
    if isinstance(entry, list):
        return list(dict.fromkeys(task for each in entry for task in _members(index, each)))
    if isinstance(entry, dict):  # of a group, with settings
        return _members(index, entry.get("task", entry.get("group")))
    kind = index[entry].kind.name if entry in index else "TASK"
    if kind == "GROUP":
        return _members(index, index[entry].cfg["task"])
    return sorted(index[entry].tags) if kind == "TAG" else [entry]


def _number(value: Any) -> float:
    """A standard error as a number; 0 for "N/A", which the harness writes if there is none, as for a single item."""
    return float(value) if isinstance(value, float) else 0.0


@functools.cache
def _manager(defaults: bool) -> Any:
    """The harness's index of tasks; `defaults` includes its own thousands, which take many seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _file(directory: Path, task: str) -> Path:
    path = directory / f"{task}.jsonl"
    if not path.is_file():
        raise DataError(f"There is no {str(path)!r}.", "A task's items stand in TASK.jsonl of --tasks-dir.")
    return path


def _form(path: Path) -> dict[str, Any]:
    """The task settings for a file, by the fields of its first item."""
    try:
        with path.open(encoding="utf-8") as file:
            fields = frozenset(dict(json.loads(file.readline())))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{str(path)!r} is no file of JSON objects, a line each.", f"Needed: {_NEEDED}.") from error
    for form, how in FORMS.items():
        if form <= fields:
            return how
    raise DataError(f"The items of {str(path)!r} have the fields {', '.join(sorted(fields))}.", f"Needed: {_NEEDED}.")


def _prompt(item: dict[str, Any]) -> str:
    """The prompt of an item, in the harness's own wording: a question and "Answer:", or a text to continue."""
    query = str(item["query"]).rstrip()
    return f"{query}\nAnswer:" if query.startswith("Question:") and not query.endswith("Answer:") else query


def _config(task: str, path: Path) -> dict[str, Any]:
    form = _form(path)
    figures = CHOICE_FIGURES if "doc_to_text" not in form else CHOICE_FIGURES[:1]
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _prompt,
        "metric_list": [{"metric": f, "aggregation": "mean", "higher_is_better": True} for f in figures],
        "metadata": {"version": 1.0},
        **form,
    }
