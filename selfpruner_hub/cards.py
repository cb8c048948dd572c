"""The model card: rendered from the record alone, so that no number in it can differ from the JSON."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData

from selfpruner_hub.records import Record


def render_card(record: Record, repo: str = "path/to/this/directory") -> str:
    """Render `model_cards/template.md`.

    Args:
        record: What is known of the model; a figure that it lacks is left out of the card.
        repo: Hub id of the model, for the code blocks.

    Returns:
        Markdown with YAML front matter.
    """
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", record.base_model) is not None
    name = record.base_model.rpartition("/")[2]  # a path of this host says nothing to a reader
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "structured-pruning", "selfpruner"],
        base_model=record.base_model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,  # the Hub has no relation for pruned models
    )
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        (asset("model_cards") / "template.md").read_text(encoding="utf-8")
    )
    return template.render(
        card_data=data.to_yaml(),
        title=f"{name}, pruned by {100 * record.achieved_beta:.0f} %",
        base_model=record.base_model if on_hub else name,
        base_link=f"https://huggingface.co/{record.base_model}" if on_hub else "#",
        record=record,
        repo=repo,
    )


def asset(name: str) -> Path:
    """A folder that a wheel carries inside the package, and a checkout beside it."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parents[1] / name
