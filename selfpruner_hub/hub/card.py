"""The model card: rendered from the record alone, so that no number in it can differ from the JSON."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from selfpruner_hub.evaluation.figures import ANSWERED, CHAT_FIGURES, KEPT
from selfpruner_hub.models.loading import is_repo_id
from selfpruner_hub.models.weights import saved_hash
from selfpruner_hub.plans.plan import BY_EXPERT
from selfpruner_hub.provenance import changed_in_place
from selfpruner_hub.search.llm.endpoint_proposer import BEHIND
from selfpruner_hub.storage.layout import asset
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Metric, Record, read_record
from selfpruner_hub.storage.staging import write_atomically

CHAT_TEMPLATE = "chat_template.jinja"
"""Name of the file with the chat template; a saved model that has it is a chat model."""

OLDEST_TRANSFORMERS = "5.24"
"""Oldest version of transformers that the code of saved models was tested with."""
WEIGHTS_OF_GRAPHS = {"": "float32", "_fp16": "float16", "_quantized": "8 bits", "_q4": "4 bits"}
"""Weights of a graph, by what Transformers.js appends to the name of its file."""


def render_card(
    record: Record,
    repo: str = "path/to/this/directory",
    revision: str | None = None,
    *,
    pictures: Collection[str] = (),
    exports: Collection[str] = (),
    graphs: str = "",
    chat: bool = False,
) -> str:
    """Render `model_cards/template.md`.

    Args:
        record: Record of the model; figures that it lacks are left out of the card.
        repo: Hub id or directory of the model, for the code blocks.
        revision: Branch of the repository, for the code blocks; None names none.
        pictures: Paths of the plots of the search, relative to the card.
        exports: Formats of the exports, each in a folder of its name beside the card.
        graphs: Hub repository of the graphs for ONNX Runtime GenAI and Transformers.js; empty where there is none.
        chat: Whether the tokenizer has a chat template: the code blocks use it, and the card reports figures of chat.

    Returns:
        Markdown with YAML front matter.
    """
    on_hub = is_repo_id(record.base_model)
    name = record.base_model.rpartition("/")[2]  # a path of this machine means nothing to a reader
    title = _title(record)
    figures = {key: metric for key, metric in record.metrics.items() if not _is_of_the_search(key)}
    results = [_eval_result(key, metric) for key, metric in figures.items() if metric.dataset]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "structured-pruning", "selfpruner", *(tag for tag in ("onnx", "gguf") if tag in exports)],
        base_model=record.base_model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,  # the Hub has no relation for pruned models
        model_name=title if results else None,
        eval_results=results or None,
        license=record.licence.get("license"),
        license_name=record.licence.get("license_name"),
        license_link=record.licence.get("license_link"),
    )
    return _template("template.md").render(
        card_data=data.to_yaml(),
        title=title,
        base_model=record.base_model if on_hub else name,
        base_link=f"https://huggingface.co/{record.base_model}" if on_hub else "",
        record=record,
        experts=BY_EXPERT in record.widths,
        oldest_transformers=OLDEST_TRANSFORMERS,
        chat=chat,
        answers={key: figures[key] for key in CHAT_FIGURES if key in figures},
        answered=answered(figures),
        quality={key: metric for key, metric in figures.items() if not metric.machine and key not in CHAT_FIGURES},
        speed={key: metric for key, metric in figures.items() if metric.machine},
        search={key: metric for key, metric in record.metrics.items() if _is_of_the_search(key)},
        proposer=_called(str(record.proposer["name"])),
        licence=_licence(record.licence),
        repo=repo,
        revision=revision,
        pictures=pictures,
        exports=exports,
        graphs=graphs,
    )


def render_onnx_card(
    record: Record,
    repo: str,
    model: str,
    graphs: Mapping[str, Path],
    *,
    revision: str | None = None,
    dense: str = "",
    chat: bool = False,
) -> str:
    """Render `model_cards/onnx_template.md`, the card of graphs for ONNX Runtime GenAI and Transformers.js.

    Args:
        record: Record of the model.
        repo: Hub repository of the graphs.
        model: Hub repository of the model.
        graphs: Files of the repository.
        revision: Branch of both repositories, for the code blocks; None names none.
        dense: Folder with graphs of the dense parent; empty where there is none.
        chat: Whether the tokenizer has a chat template, which the code blocks then use.

    Returns:
        Markdown with YAML front matter.
    """
    on_hub = is_repo_id(record.base_model)
    data = ModelCardData(
        library_name="transformers.js",
        pipeline_tag="text-generation",
        tags=["onnx", "onnxruntime-genai", "pruned", "structured-pruning", "selfpruner"],
        base_model=model,
        base_model_relation="quantized",
        license=record.licence.get("license"),
        license_name=record.licence.get("license_name"),
        license_link=record.licence.get("license_link"),
    )
    sizes = [(f"onnx/model{suffix}.onnx", weights) for suffix, weights in WEIGHTS_OF_GRAPHS.items()]
    return _template("onnx_template.md").render(
        card_data=data.to_yaml(),
        title=f"{_title(record)}: ONNX",
        base_model=record.base_model,
        base_link=f"https://huggingface.co/{record.base_model}" if on_hub else "",
        graphs=[(name, weights, graphs[f"{name}_data"].stat().st_size) for name, weights in sizes],
        licence=_licence(record.licence),
        repo=repo,
        model=model,
        revision=revision,
        dense=dense,
        chat=chat,
    )


def _title(record: Record) -> str:
    return f"{record.base_model.rpartition('/')[2]}, pruned by {100 * record.achieved_beta:.0f} %"


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((asset("model_cards") / name).read_text(encoding="utf-8"))


def save_metrics(directory: Path, metrics: Mapping[str, Metric]) -> Record:
    """Add figures to the record and the card of a saved model; they replace older ones of the same names.

    Args:
        directory: Directory of a saved model.
        metrics: Figures by name.

    Returns:
        The new record.

    Raises:
        SavedModelError: The directory holds no pruned model.
        OutputError: The record or the card cannot be written.
    """
    record = read_record(directory)
    if record.weights and (weights := saved_hash(directory)) != record.weights:
        record = replace(changed_in_place(record), weights=weights)
    record = replace(record, metrics={**record.metrics, **record.marked(metrics)})
    write_atomically(directory / MODEL_RECORD_FILE, record.to_json())
    write_atomically(directory / "README.md", render_card(record, chat=(directory / CHAT_TEMPLATE).is_file()))
    return record


def answered(figures: Mapping[str, Metric]) -> str:
    """Return the share of answered questions as a sentence; empty where it was not measured."""
    if (share_kept := figures.get(KEPT)) is not None:
        return f"Of the plain questions that its parent answers, it answers {100 * share_kept.value:.0f} %."
    if (answers := figures.get(ANSWERED)) is not None:
        return f"It answers {100 * answers.value:.0f} % of the plain questions."
    return ""


def _is_of_the_search(key: str) -> bool:
    """Return whether a figure belongs to the search; such figures are no measure of quality."""
    return key.startswith("search_")


def _eval_result(key: str, metric: Metric) -> EvalResult:
    on_hub = is_repo_id(metric.dataset)
    return EvalResult(
        task_type="text-generation",
        dataset_type=metric.dataset if on_hub else re.sub(r"[^\w.-]+", "-", metric.dataset),
        dataset_name=metric.dataset,
        metric_type=re.sub(r"[^\w-]+", "_", re.split(r"\s*[,(]", key)[0]),
        metric_name=key,
        metric_value=metric.value,
    )


def _called(proposer: str) -> str:
    """Return a proposer's name as Markdown."""
    name, behind, _ = proposer.partition(BEHIND)
    return f"`{name}`{behind}"


def _licence(licence: dict[str, str]) -> str:
    """Return the licence as Markdown, with a link where there is one; empty where the licence is unknown."""
    name = licence.get("license_name") or licence.get("license", "")
    return f"[{name}]({licence['license_link']})" if "license_link" in licence else name
