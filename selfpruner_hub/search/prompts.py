"""What a language model is asked, the schema it answers in, and how its answer is read: pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from selfpruner_hub.budget import Budget, Rates
from selfpruner_hub.errors import ProposerError, UserError
from selfpruner_hub.search.proposers import Operation, Proposal, Scored

SHOWN = 5
"""Earlier solutions in a prompt, worst to best; their numbers are their ranks, so the best is number 1."""
PARENTS: dict[Operation, int] = {"initial": 0, "crossover": 2, "mutation": 1}
"""Parents that the reply must name."""
CHANGES = {"rates": (1, 4), "ffn": (1, 4), "attention": (0, 2)}
"""Fewest and most layers of which a mutation removes more, and less, by part."""
REACH = 15
"""Most percentage points by which a mutation changes a rate; of attention it moves one KV group."""
LISTED = 8
"""Layers listed in a prompt for each direction that was measured."""


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
    """Rates as they stand in prompts and replies: whole percentages, compact JSON."""
    return json.dumps(_percent(budget, rates), separators=(",", ":"))


def _percent(budget: Budget, rates: Rates) -> dict[str, list[int]]:
    lists = {"rates": rates.ffn} if budget.tied else {"attention": rates.attention, "ffn": rates.ffn}
    return {name: [round(100 * rate) for rate in values] for name, values in lists.items()}


def schema(operation: Operation, history: Sequence[Scored], budget: Budget, *, narrow: bool = False) -> dict[str, Any]:
    """JSON schema of a reply.

    Args:
        operation: `initial` and `crossover` want one whole percentage per layer and part; `mutation` lists of
            layers of which more and less is removed. Replies to all but `initial` name their parents first.
        history: Scored plans, best first; without any, every operation wants whole solutions.
        budget: Gives bounds and geometry.
        narrow: Offer the better half as parents, hold each value of a crossover child to the range of the solutions
            shown, and the layers of a mutation to those that measured best, for models that are too small to do so
            on their own. (A schema per position: not every server takes one.)

    Returns:
        The schema, an object without other properties.
    """
    properties: dict[str, Any] = {}
    if PARENTS[operation] and history:
        listed = len(shown(history))
        number = {"type": "integer", "minimum": 1, "maximum": -(-listed // 2) if narrow else listed}
        properties["parents"] = _list(number, PARENTS[operation], PARENTS[operation])
    if operation == "mutation" and history:
        return _object(properties | _changes(history, budget, narrow))
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


def _changes(history: Sequence[Scored], budget: Budget, narrow: bool) -> dict[str, dict[str, Any]]:
    """Per part, the layers that lose more and those that lose less; a narrow schema offers the promising ones."""
    rules = {}
    for part in _parts(budget):
        least, most = CHANGES[part]
        directions = {}
        for direction in ("more", "less"):
            layer: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": budget.shape.num_layers}
            offered = _promising(history, part, direction) if narrow else None
            if offered:
                layer = {"enum": offered}
            directions[direction] = _list(layer, least, most if offered is None or offered else 0)
        points = {} if part == "attention" else {"points": {"type": "integer", "minimum": 1, "maximum": REACH}}
        rules[part] = _object({**directions, **points})
    return rules


def _promising(history: Sequence[Scored], part: str, direction: str) -> list[int] | None:
    """Layers of which more (or less) should be removed, the most promising first; None where nothing was measured."""
    measured = next((s.slopes for s in history[:SHOWN] if s.slopes), None)
    if measured is None:
        return None
    name = f"{'attention' if part == 'attention' else 'ffn'}_{'removed' if direction == 'more' else 'restored'}"
    values = getattr(measured, name)
    ranked = sorted((layer for layer, v in enumerate(values, 1) if math.isfinite(v)), key=lambda n: values[n - 1])
    return ranked[:LISTED]


def _measured(history: Sequence[Scored], budget: Budget) -> str:
    """What the slopes say, in words, for the solution at which they were measured."""
    number = next((rank for rank, s in enumerate(history[:SHOWN], 1) if s.slopes), None)
    if number is None:
        return ""
    told = []
    for direction, effect in (("more", "costs"), ("less", "gains")):
        for part in _parts(budget):
            if layers := _promising(history, part, direction):
                where = "" if part == "rates" else f" of {part}"
                most = "least" if direction == "more" else "most"
                told.append(f"removing {direction}{where} {effect} {most} in layers {', '.join(map(str, layers))}")
    return f"\n\nMeasured at solution {number}, best first: {'; '.join(told)}."


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
    parents = tuple(n - 1 for n in numbers[:2])
    if operation == "mutation" and any(isinstance(value.get(part), dict) for part in _parts(budget)):
        if not parents:
            raise ProposerError(f"The reply names no parent from 1 to {listed}.")
        return _changed(history[parents[0]].rates, value, budget), parents
    lists = [_percentages(value, name, budget.shape.num_layers) for name in _parts(budget)]
    return Rates(lists[0], lists[-1]), parents


def _changed(rates: Rates, value: dict[str, Any], budget: Budget) -> Rates:
    """The parent's rates, with more removed from some layers and less from others; within [0, 1]."""
    layers = budget.shape.dense.layers
    parts = {"rates": list(rates.ffn)} if budget.tied else {"attention": list(rates.attention), "ffn": list(rates.ffn)}
    for part, values in parts.items():
        change = value.get(part, {})
        if not isinstance(change, dict):
            raise ProposerError(f"The reply's {part!r} is not an object.")
        points = change.get("points", 0)
        if type(points) not in (int, float) or not 0 <= points <= 100:
            raise ProposerError(f"The change of {part!r} in the reply is not in percentage points.")
        for direction, sign in (("more", 1), ("less", -1)):
            for layer in _layers(change.get(direction, []), len(layers)):
                step = 1 / layers[layer - 1].num_key_value_heads if part == "attention" else points / 100
                values[layer - 1] = min(max(values[layer - 1] + sign * step, 0.0), 1.0)
    lists = [tuple(values) for values in parts.values()]
    return Rates(lists[0], lists[-1])


def _layers(numbers: Any, count: int) -> set[int]:
    if not isinstance(numbers, list) or not all(type(n) is int and 1 <= n <= count for n in numbers):
        raise ProposerError(f"The reply does not list layers from 1 to {count}.")
    return set(numbers)


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
