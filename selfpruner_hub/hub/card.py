"""The model card: rendered from the record alone, so that no number in it can differ from the JSON."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from selfpruner_hub.evaluation.figures import ANSWERED, CHAT_FIGURES, KEPT
from selfpruner_hub.models.loading import is_repo_id
from selfpruner_hub.storage.layout import asset
from selfpruner_hub.storage.model_record import FILE_NAME, Metric, Record, read_record
from selfpruner_hub.storage.staging import write_atomically

CHAT_TEMPLATE = "chat_template.jinja"
"""The file beside a saved model that makes it a chat model."""


def render_card(
    record: Record,
    repo: str = "path/to/this/directory",
    revision: str | None = None,
    *,
    pictures: Collection[str] = (),
    exports: Collection[str] = (),
    chat: bool = False,
) -> str:
    """Render `model_cards/template.md`.

    Args:
        record: What is known of the model; a figure that it lacks is left out of the card.
        repo: Hub id of the model, for the code blocks.
        revision: Branch of it that the code blocks name.
        pictures: Those of the search that stand beside the card, by their path.
        exports: Formats that stand beside it, each in a folder of its name.
        chat: Whether the tokenizer has a chat template: the code blocks use it, and the card says what is left of chat.

    Returns:
        Markdown with YAML front matter.
    """
    on_hub = is_repo_id(record.base_model)
    name = record.base_model.rpartition("/")[2]  # a path of this host says nothing to a reader
    title = f"{name}, pruned by {100 * record.achieved_beta:.0f} %"
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
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        (asset("model_cards") / "template.md").read_text(encoding="utf-8")
    )
    return template.render(
        card_data=data.to_yaml(),
        title=title,
        base_model=record.base_model if on_hub else name,
        base_link=f"https://huggingface.co/{record.base_model}" if on_hub else "",
        record=record,
        chat=chat,
        answers={key: figures[key] for key in CHAT_FIGURES if key in figures},
        answered=_answered(figures),
        quality={key: metric for key, metric in figures.items() if not metric.machine and key not in CHAT_FIGURES},
        speed={key: metric for key, metric in figures.items() if metric.machine},
        search={key: metric for key, metric in record.metrics.items() if _is_of_the_search(key)},
        proposer=_called(str(record.proposer["name"])),
        licence=_licence(record.licence),
        repo=repo,
        revision=revision,
        pictures=pictures,
        exports=exports,
    )


def save_metrics(directory: Path, metrics: Mapping[str, Metric]) -> Record:
    """Add figures to the record of a saved model, in place of older ones of the same names, and to its card.

    Args:
        directory: A saved model.
        metrics: By name.

    Returns:
        The record as it is now.

    Raises:
        SavedModelError: The directory holds no pruned model.
        OutputError: It cannot be written.
    """
    record = read_record(directory)
    record = replace(record, metrics={**record.metrics, **metrics})
    write_atomically(directory / FILE_NAME, record.to_json())
    write_atomically(directory / "README.md", render_card(record, chat=(directory / CHAT_TEMPLATE).is_file()))
    return record


def _answered(figures: Mapping[str, Metric]) -> str:
    """What is left of chat in one sentence; empty where no question was asked."""
    if (kept := figures.get(KEPT)) is not None:
        return f"Of the plain questions that its parent answers, it answers {100 * kept.value:.0f} %."
    if (found := figures.get(ANSWERED)) is not None:
        return f"It answers {100 * found.value:.0f} % of the plain questions."
    return ""


def _is_of_the_search(key: str) -> bool:
    """What the search selected on is no figure of quality."""
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
    """A proposer's name for readers; the address of a server is nothing to them."""
    address, _, model = proposer.partition(" ")
    return f"`{model}` behind an OpenAI-compatible endpoint" if "://" in address else f"`{proposer}`"


def _licence(known: dict[str, str]) -> str:
    """A licence for readers, linked where there is a link; empty where it is not known."""
    name = known.get("license_name") or known.get("license", "")
    return f"[{name}]({known['license_link']})" if "license_link" in known else name
