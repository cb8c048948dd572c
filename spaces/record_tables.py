"""Facts about the pruned model: figures from `selfpruner.json`, and data for plots from it and the journal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd
from model_source import record, shown

REMOVED = ["layer", "part", "removed"]
SCORED = ["evaluations", "fitness", "from"]
BEST = ["evaluations", "fitness"]
_ANSWERED, _KEPT, _AGREEMENT = "plain questions answered", "plain questions kept", "agreement (conversations)"
CHAT_ORDER = (_KEPT, _ANSWERED, _AGREEMENT, "KL (conversations)")
"""Names of the figures of a chat model in the record, as `selfpruner evaluate` writes them."""


def journal() -> list[dict[str, Any]]:
    """Read the records of `search.jsonl`; empty where the model has no journal."""
    try:
        return lines(shown().file("search.jsonl").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def lines(text: str) -> list[dict[str, Any]]:
    """Parse the complete lines of a journal; the last line may still be incomplete."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def removed(widths: dict[str, list[int]], rates: Iterable[float], shape: dict[str, Any] | None) -> pd.DataFrame:
    """Return the percentage of each layer's prunable weights that was removed, by part where the dense shape is known.

    Args:
        widths: Widths that are kept: `intermediate_size` (or `num_experts`) and `num_key_value_heads`, one value per
            layer.
        rates: Share of each layer's prunable weights that was removed, in [0, 1].
        shape: Shape of the dense model, from the journal's header; None where unknown.

    Returns:
        One row per layer and part.
    """
    if shape is None:
        rows = [(str(i), "layer", 100 * rate) for i, rate in enumerate(rates, 1)]
        return pd.DataFrame(rows, columns=REMOVED)
    name = "num_experts" if "num_experts" in shape else "intermediate_size"
    group, unit = shape["group_weights"], shape["expert_weights" if name == "num_experts" else "channel_weights"]
    rows = []
    for i, (ffn, groups) in enumerate(zip(shape[name], shape["num_key_value_heads"], strict=True)):
        whole = max(1, group * groups + unit * ffn)  # nothing is prunable in a layer without experts
        part = "experts" if name == "num_experts" else "FFN"
        rows.append((str(i + 1), part, 100 * unit * (ffn - widths[name][i]) / whole))
        if group:
            rows.append((str(i + 1), "attention", 100 * group * (groups - widths["num_key_value_heads"][i]) / whole))
    return pd.DataFrame(rows, columns=REMOVED)


def scored(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return every plan that was scored on all windows.

    Args:
        records: Records of the journal.

    Returns:
        Rows of (evaluations spent, fitness, source of the plan).
    """
    spent, rows = 0.0, []
    for entry in records:
        spent += entry.get("share", 0)
        if entry.get("kind") == "score" and entry["share"] == 1 and entry["fitness"] is not None:
            rows.append((round(spent, 3), entry["fitness"], entry["origin"].partition(":")[0]))
    return pd.DataFrame(rows, columns=SCORED)


def best_so_far(plans: pd.DataFrame) -> pd.DataFrame:
    """Return the best fitness so far against the evaluations spent, as a step curve."""
    rows: list[tuple[float, float]] = []
    for spent, fitness in zip(plans["evaluations"], plans["fitness"].cummin(), strict=True):
        if rows and fitness != rows[-1][1]:
            rows.append((spent, rows[-1][1]))
        rows.append((spent, fitness))
    return pd.DataFrame(rows, columns=BEST)


def header(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the search from the journal's header; empty where there is no journal."""
    return records[0].get("settings", {}) if records else {}


def title() -> tuple[str, str]:
    """Return a headline, and a description of the model: its size, its quality, and who searched."""
    facts = record()
    count = facts["parameters"]
    name = facts["base_model"].rpartition("/")[2]
    lost = "routed experts" if "num_experts" in facts["widths"] else "layers"
    training = facts["method"].get("training")
    sentence = (
        f"The same prompt, answered by **{name}** and by a copy that lost {100 * facts['achieved_beta']:.0f} % of the "
        f"weights of its {lost} {f'and was then trained ({training})' if training else 'without retraining'}.",
        quality(),
        _who(str(facts["proposer"]["best_from"])),
    )
    return f"{name}, {100 * (1 - count['pruned'] / count['dense']):.0f} % smaller", " ".join(filter(None, sentence))


def _who(origin: str) -> str:
    """Say who chose how much each layer loses, from the origin of the plan."""
    if origin == "seed:uniform":
        return "All layers lose the same share."
    who = {"seed": "Measurements of its layers say", "self": "The model itself proposed"}
    return f"{who.get(origin.partition(':')[0], 'A search found')} how much each layer can lose."


def quality() -> str:
    """Return the quality of the model in a sentence or two: of its answers, else on text; empty if not measured."""
    facts = record()["metrics"]
    value = {name: metric["value"] for name, metric in facts.items()}
    sentences = []
    if _KEPT in value:
        sentences.append(f"Of the plain questions that its parent answers, it answers **{100 * value[_KEPT]:.0f} %**.")
    elif _ANSWERED in value:
        sentences.append(f"It answers **{100 * value[_ANSWERED]:.0f} %** of the plain questions.")
    if _AGREEMENT in value:
        sentences.append(
            f"On **{100 * value[_AGREEMENT]:.0f} %** of the tokens of its parent's answers it chooses the same."
        )
    text = next((metric for name, metric in facts.items() if name.startswith("perplexity (")), None)
    if text and not sentences:
        parent = "" if text["dense"] is None else f", its parent's {text['dense']:.4g}"
        sentences.append(f"Its perplexity on text is **{text['value']:.4g}**{parent}.")
    return " ".join(sentences)


def _rank(name: str, metric: dict[str, Any]) -> int:
    """Return the rank of a figure in the table: answers (in `CHAT_ORDER`), text, speed, figures of the search."""
    if name in CHAT_ORDER:
        return CHAT_ORDER.index(name)
    if name.startswith("search_"):
        return len(CHAT_ORDER) + 2
    return len(CHAT_ORDER) + bool(metric.get("machine") or metric.get("unit"))


def figures() -> str:
    """Return parameters and all measured figures as a Markdown table, followed by the protocol of each figure."""
    facts = record()
    count = facts["parameters"]
    rows = [f"| parameters | {count['dense']:,} | {count['pruned']:,} |"]
    notes = []
    for name, metric in sorted(facts["metrics"].items(), key=lambda item: _rank(*item)):
        unit = f" {metric['unit']}" if metric.get("unit") else ""
        dense = "–" if metric["dense"] is None else f"{metric['dense']:.5g}{unit}"
        rows.append(f"| {name.replace('_', ' ')} | {dense} | {metric['value']:.5g}{unit} |")
        more = [metric.get(key) for key in ("dataset", "machine", "date")]
        notes.append(f"* **{name.replace('_', ' ')}**: {'; '.join([metric['protocol'], *filter(None, more)])}.")
    return "\n".join(["| | dense | pruned |", "| --- | ---: | ---: |", *rows, "", *notes])
