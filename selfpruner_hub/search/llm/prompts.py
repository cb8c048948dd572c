"""Prompts for a language model: the templates and the values that fill them. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from selfpruner_hub.errors import UserError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.predicted_loss import paying_moves
from selfpruner_hub.search.proposers import Operation, Scored

SHOWN = 5
"""Number of earlier solutions in a prompt, ordered worst to best; each is numbered by its rank, so the best is 1."""
LISTED = 12
"""Maximum number of layers in a list of changes that lower the loss, and in the reply to it."""


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
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt template {operation}.txt cannot be used: {error}.") from error


def shown(history: Sequence[Scored]) -> list[Scored]:
    """Select the solutions that a prompt shows, ordered worst to best, from a history that has the best first.

    The solution whose changes were measured is always among them; if necessary it replaces the worst one.
    """
    best = list(history[:SHOWN])
    measured = next((s for s in history if s.slopes), None)
    if measured is not None and measured not in best:
        best[-1] = measured
    return best[::-1]


def render(
    operation: Operation, history: Sequence[Scored], budget: Budget, model: str, templates: Path | None = None
) -> str:
    """Fill the template of an operation.

    Args:
        operation: Kind of proposal.
        history: Scored plans, best first.
        budget: Parameter budget, with β, the bounds of rates and the geometry of the model.
        model: Name of the model that is being pruned.
        templates: Directory of templates, as for `template`.

    Returns:
        The prompt.

    Raises:
        UserError: A template cannot be read or has an unknown placeholder.
    """
    shape, dense = budget.shape, budget.shape.dense.layers[0]
    values = {
        "model": model,
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "heads": dense.num_key_value_heads * shape.queries_per_group,
        "groups": dense.num_key_value_heads,
        "channels": dense.intermediate_size,
        "beta": f"{100 * budget.beta:g}",
        "p_max": round(100 * budget.p_max),
        "parts": "" if budget.tied else ', for attention ("attention") and feed-forward ("ffn")',
        "history": "\n".join(
            f"{len(shown(history)) - i}. loss {s.fitness:.4f}: {solution(budget, s.rates)}"
            for i, s in enumerate(shown(history))
        )
        or "(none)",
        "measured": _measured(history, budget),
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


def part_names(budget: Budget) -> tuple[str, ...]:
    """Return the names of the lists of a solution: one list where attention and FFN share their rates."""
    return ("rates",) if budget.tied else ("attention", "ffn")


def measured_number(history: Sequence[Scored]) -> int | None:
    """Return the number, in the prompt, of the solution whose changes were measured; None where none was."""
    return next((number for number, s in enumerate(reversed(shown(history)), 1) if s.slopes), None)


def promising(history: Sequence[Scored], budget: Budget) -> dict[tuple[str, str], list[int]]:
    """List the layers (from 1) whose change lowers the loss, best first, by part and direction; empty if none does."""
    slopes = next((s.slopes for s in shown(history) if s.slopes), None)
    if slopes is None:
        return {}
    moves = paying_moves(slopes, budget.shape)
    found = {
        (part, way): [layer + 1 for layer in moves[f"{'ffn' if part == 'rates' else part}_{direction}"]][:LISTED]
        for part in part_names(budget)
        for way, direction in (("more", "removed"), ("less", "restored"))
    }
    return found if any(found.values()) else {}


def _measured(history: Sequence[Scored], budget: Budget) -> str:
    """Put the predicted effects of small changes into words, for the solution at which they were measured."""
    told = []
    for (part, way), layers in promising(history, budget).items():
        if layers:
            where = "" if part == "rates" else f" of {part}"
            effect = "costs least" if way == "more" else "gains most"
            told.append(f"removing {way}{where} {effect} in layers {', '.join(map(str, layers))}")
    return f"\n\nMeasured at solution {measured_number(history)}, best first: {'; '.join(told)}." if told else ""
