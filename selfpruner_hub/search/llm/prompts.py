"""Prompts for a language model: the templates and the values that fill them. Pure functions."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from string import Template

from selfpruner_hub.errors import UserError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.search.llm.question import Question, part_names
from selfpruner_hub.search.proposers import Operation


def template(operation: Operation, templates: Path | None = None) -> str:
    """Read the prompt template of an operation.

    Args:
        operation: Kind of proposal.
        templates: Directory with `initial.txt`, `crossover.txt` and `mutation.txt`; None uses the built-in ones.

    Returns:
        Text of the template, with `$placeholders`.

    Raises:
        UserError: The template cannot be read.
    """
    source = (resources.files(__package__) / "templates") if templates is None else templates
    try:
        return (source / f"{operation}.txt").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8 text, or no path
        raise UserError(f"The prompt template {operation}.txt cannot be used: {error}.") from error


def render(question: Question, model: str, templates: Path | None = None) -> str:
    """Fill the template of the question's operation.

    Args:
        question: Kind of proposal, and the solutions to show.
        model: Name of the model that is being pruned.
        templates: Directory of templates, as for `template`.

    Returns:
        The prompt.

    Raises:
        UserError: A template cannot be read or has an unknown placeholder.
    """
    operation, budget = question.operation, question.budget
    shape, dense = budget.shape, budget.shape.dense.layers[0]
    units = max(w.intermediate_size for w in shape.dense.layers) if shape.expert_weights else dense.intermediate_size
    numbered = [f"{n}. loss {s.fitness:.4f}: {solution(budget, s.rates)}" for n, s in enumerate(question.shown, 1)]
    values = {
        "model": model,
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "heads": dense.num_key_value_heads * shape.queries_per_group,
        "groups": dense.num_key_value_heads,
        "channels": dense.intermediate_size,
        "units": f"{units} {'routed experts' if shape.expert_weights else 'feed-forward channels'}",
        "beta": f"{100 * budget.share:.5g}" if budget.target else f"{100 * budget.share:g}",
        "goal": _goal(budget),
        "p_max": round(100 * budget.p_max),
        "parts": "" if budget.tied else ', for attention ("attention") and feed-forward ("ffn")',
        "history": "\n".join(reversed(numbered)) or "(none)",
        "measured": _measured(question),
    }
    try:
        return Template(template(operation, templates)).substitute(values)
    except (KeyError, ValueError) as error:
        raise UserError(f"The prompt template {operation}.txt cannot be used: {error}.") from error


def solution(budget: Budget, rates: Rates) -> str:
    """Write rates as prompts and replies have them: whole percentages, compact JSON."""
    return json.dumps(percent(budget, rates), separators=(",", ":"))


def percent(budget: Budget, rates: Rates) -> dict[str, list[int]]:
    """Return the rates as whole percentages, by the name of their list."""
    lists = (rates.ffn,) if budget.tied else (rates.attention, rates.ffn)
    return {name: [round(100 * r) for r in values] for name, values in zip(part_names(budget), lists, strict=True)}


def _goal(budget: Budget) -> str:
    """Write the constraint on all rates together: β, or the target and the cost of each part."""
    if budget.target is None:
        return f"The mean over all weights must be {100 * budget.share:g} %."
    costs = budget.costs
    prices = [
        f"1 % of {part} saves {sum(float(t[-1]) for t in tables) / costs.prunable:.2f} %"
        for part, tables in (("the attention", costs.attention), ("the feed-forward", costs.ffn))
    ]
    return (
        f"What is removed must save {100 * budget.share:.3g} % of {budget.target.charged}, as far as layers cause it: "
        f"{', '.join(prices)}."
    )


def _measured(question: Question) -> str:
    """Put the predicted effects of small changes into words, for the solution at which they were measured."""
    lines = []
    for (part, way), layers in question.promising.items():
        if layers:
            where = "" if part == "rates" else f" of {part}"
            effect = "costs least" if way == "more" else "gains most"
            lines.append(f"removing {way}{where} {effect} in layers {', '.join(map(str, layers))}")
    return f"\n\nMeasured at solution {question.measured}, best first: {'; '.join(lines)}." if lines else ""
