"""What a language model is asked, the schema it answers in, and how its answer is read: pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from selfpruner_hub.budget import Budget, Rates
from selfpruner_hub.errors import ProposerError, UserError
from selfpruner_hub.search.proposers import Operation, Proposal, Scored

SHOWN = 5
"""Earlier solutions in a prompt, worst to best (the last is the best)."""
PARENTS: dict[Operation, int] = {"initial": 0, "crossover": 2, "mutation": 1}
"""Parents that the reply must name."""
CHANGES = (2, 6)
"""Fewest and most layers that a mutation changes."""
REACH = 15
"""Most percentage points by which a mutation changes a rate."""


def template(operation: Operation, templates: Path | None = None) -> str:
    """Read the prompt template of an operation.

    Args:
        operation: Which one.
        templates: Directory with `initial.txt`, `crossover.txt` and `mutation.txt`; None uses the built-in ones.

    Returns:
        Its text, with `$placeholders`.

    Raises:
        UserError: It cannot be read.
    """
    source = (resources.files(__package__) / "templates") if templates is None else templates
    try:
        return (source / f"{operation}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt template {operation}.txt cannot be used: {error}.") from error


def shown(history: Sequence[Scored]) -> list[Scored]:
    """The solutions that a prompt shows, out of a history with the best first: worst to best."""
    return list(reversed(history[:SHOWN]))


def render(
    operation: Operation, history: Sequence[Scored], budget: Budget, model: str, templates: Path | None = None
) -> str:
    """Fill the template of an operation.

    Args:
        operation: Which template.
        history: Scored plans, best first.
        budget: Gives β, bounds and geometry.
        model: Name of the model that is being pruned.
        templates: As for `template`.

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
            f"{number}. loss {s.fitness:.4f}: {solution(budget, s.rates)}" for number, s in enumerate(shown(history), 1)
        )
        or "(none)",
    }
    try:
        return Template(template(operation, templates)).substitute(values)
    except (KeyError, ValueError) as error:
        raise UserError(f"The prompt template {operation}.txt cannot be used: {error}.") from error


def solution(budget: Budget, rates: Rates) -> str:
    """Rates as they stand in prompts and replies: whole percentages, compact JSON."""
    return json.dumps(_percent(budget, rates), separators=(",", ":"))


def _percent(budget: Budget, rates: Rates) -> dict[str, list[int]]:
    lists = {"rates": rates.ffn} if budget.tied else {"attention": rates.attention, "ffn": rates.ffn}
    return {name: [round(100 * rate) for rate in values] for name, values in lists.items()}


def schema(operation: Operation, history: Sequence[Scored], budget: Budget, *, narrow: bool = False) -> dict[str, Any]:
    """JSON schema of a reply.

    Args:
        operation: `initial` and `crossover` want one whole percentage per layer and part; `mutation` a few changes in
            percentage points. Replies to all but `initial` name their parents first.
        history: Scored plans, best first; without any, every operation wants whole solutions.
        budget: Gives bounds and geometry.
        narrow: Hold each value of a crossover child to the range of the solutions shown, for models that are too small
            to stay near them on their own. (A schema per position: not every server takes one.)

    Returns:
        The schema, an object without other properties.
    """
    properties: dict[str, Any] = {}
    if PARENTS[operation] and history:
        number = {"type": "integer", "minimum": 1, "maximum": len(shown(history))}
        properties["parents"] = _list(number, PARENTS[operation], PARENTS[operation])
    if operation == "mutation" and history:
        properties["changes"] = _list(_change(budget), *CHANGES)
        return _object(properties)
    layers = budget.shape.num_layers
    for part, rule in _parts(budget).items():
        properties[part] = _list(rule, layers, layers)
        if narrow and operation == "crossover" and history:
            seen = zip(*(_percent(budget, s.rates)[part] for s in shown(history)), strict=True)
            places = [{"type": "integer", "minimum": min(v), "maximum": max(v)} for v in seen]
            if "enum" in rule:
                places = [
                    {"enum": [s for s in rule["enum"] if p["minimum"] <= s <= p["maximum"]] or rule["enum"][:1]}
                    for p in places
                ]
            properties[part] = {**_list(rule, layers, layers), "prefixItems": places}
            del properties[part]["items"]
    return _object(properties)


def _parts(budget: Budget) -> dict[str, dict[str, Any]]:
    """The lists of a whole solution, and the rule of their values."""
    most = round(100 * budget.p_max)
    percent = {"type": "integer", "minimum": 0, "maximum": most}
    if budget.tied:
        return {"rates": percent}
    steps = [step for step in _steps(budget) if step <= most]
    return {"attention": {"enum": steps} if len(steps) <= 8 else percent, "ffn": percent}


def _steps(budget: Budget) -> list[int]:
    """Attention rates that whole KV groups allow, in percent."""
    groups = budget.shape.dense.layers[0].num_key_value_heads
    return sorted({round(100 * g / groups) for g in range(groups)})


def _change(budget: Budget) -> dict[str, Any]:
    points = {"type": "integer", "minimum": -REACH, "maximum": REACH}
    rule: dict[str, Any] = {"layer": {"type": "integer", "minimum": 1, "maximum": budget.shape.num_layers}}
    if budget.tied:
        return _object({**rule, "rate": points})
    group = round(100 / budget.shape.dense.layers[0].num_key_value_heads)
    return _object({**rule, "attention": {"enum": [-group, 0, group]}, "ffn": points})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def example(rule: Mapping[str, Any]) -> Any:
    """A long value under one of our schemas, from which the room for a reply is reckoned."""
    if "properties" in rule:
        return {name: example(inner) for name, inner in rule["properties"].items()}
    if rule.get("type") == "array":
        return [example(place) for place in rule.get("prefixItems") or [rule["items"]] * rule["maxItems"]]
    return max(rule["enum"]) if "enum" in rule else rule["maximum"]


def parse(operation: Operation, reply: str, history: Sequence[Scored], budget: Budget) -> tuple[Rates, tuple[int, ...]]:
    """Read a reply, which is never trusted: it may be prose, truncated, or of any shape.

    Args:
        operation: What was asked for.
        reply: What the language model wrote.
        history: Behind the prompt, best first: changes count from the parent that the reply names.
        budget: Says how many rates there must be.

    Returns:
        The proposed rates in [0, 1], and the indices into the history of the parents it named.

    Raises:
        ProposerError: It is not an object with the right lists of finite percentages, or changes nothing known.
    """
    try:
        value = json.loads(reply[: reply.rindex("}") + 1][reply.index("{") :])
    except (ValueError, RecursionError) as error:
        raise ProposerError("The reply is not a JSON object.") from error
    if not isinstance(value, dict):
        raise ProposerError("The reply is not a JSON object.")
    listed = len(shown(history))
    named = value.get("parents")
    numbers = [n for n in named if type(n) is int and 1 <= n <= listed] if isinstance(named, list) else []
    parents = tuple(listed - n for n in numbers[:2])  # number 1 is the worst that was shown
    if operation == "mutation" and history and "changes" in value:
        if not parents:
            raise ProposerError(f"The reply names no parent from 1 to {listed}.")
        return _changed(history[parents[0]].rates, value["changes"], budget), parents
    lists = [_percentages(value, name, budget.shape.num_layers) for name in _parts(budget)]
    return Rates(lists[0], lists[-1]), parents


def _changed(rates: Rates, changes: Any, budget: Budget) -> Rates:
    """The parent's rates with the changes, each in percentage points, within [0, 1]."""
    parts = {"rate": list(rates.ffn)} if budget.tied else {"attention": list(rates.attention), "ffn": list(rates.ffn)}
    if not isinstance(changes, list) or not changes:
        raise ProposerError("The reply's 'changes' are not a list.")
    for change in changes:
        layer = change.get("layer") if isinstance(change, dict) else None
        if type(layer) is not int or not 1 <= layer <= budget.shape.num_layers:
            raise ProposerError(f"A change in the reply has no layer from 1 to {budget.shape.num_layers}.")
        for name, values in parts.items():
            points = change.get(name, 0)
            if type(points) not in (int, float) or not -100 <= points <= 100:
                raise ProposerError(f"A change of {name!r} in the reply is not in percentage points.")
            values[layer - 1] = min(max(values[layer - 1] + points / 100, 0.0), 1.0)
    lists = [tuple(values) for values in parts.values()]
    return Rates(lists[0], lists[-1])


def proposal(
    operation: Operation, prompt: str, reply: str, history: Sequence[Scored], budget: Budget, tokens: int
) -> Proposal:
    """Turn a reply into a proposal, or into a refusal that says what is wrong with it.

    Args:
        operation: What was asked for.
        prompt: How it was asked.
        reply: What the language model wrote.
        history: Behind the prompt, best first.
        budget: Says how many rates there must be.
        tokens: Tokens read and written for this reply.

    Returns:
        A proposal whose parents are indices into the history.
    """
    try:
        rates, parents = parse(operation, reply, history, budget)
    except ProposerError as error:
        return Proposal(None, prompt=prompt, reply=reply, error=str(error), tokens=tokens)
    return Proposal(rates, parents, prompt, reply, tokens=tokens)


def _percentages(value: Any, name: str, length: int) -> tuple[float, ...]:
    numbers = value.get(name) if isinstance(value, dict) else None
    if not isinstance(numbers, list) or len(numbers) != length:
        raise ProposerError(f"The reply has no list of {length} numbers under {name!r}.")
    if not all(type(n) in (int, float) and 0 <= n <= 100 for n in numbers):
        raise ProposerError(f"The reply's {name!r} are not percentages.")
    return tuple(n / 100 for n in numbers)
